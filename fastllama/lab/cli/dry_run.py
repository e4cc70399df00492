"""--dry-run: what would run, in words."""

import shlex

from fastllama.lab.cli.settings import Settings
from fastllama.lab.cli.table import OPTIONS


def lines(settings: Settings) -> list[str]:
    """The command line by our own names, and what each part of it comes to."""
    run, sampling = settings.run, settings.sampling
    parts = [f"model        {run.model}, {run.dtype} on {run.device}"]
    drawn = "greedy"
    if not sampling.is_greedy:
        drawn = f"temperature {sampling.temperature:g}"
        drawn += f", mirostat {sampling.mirostat}" if sampling.mirostat else ""
    filters = {name: getattr(sampling, name) for name in ("top_k", "tfs_z", "typical_p", "top_p", "min_p")}
    drawn += "".join(f", {name} {value:g}" for name, value in filters.items() if sampling.acts(name))
    if sampling.penalises:
        names = ("repeat_penalty", "frequency_penalty", "presence_penalty")
        drawn += "".join(f", {name} {getattr(sampling, name):g}" for name in names if sampling.acts(name))
        drawn += f" over {'the whole text' if sampling.repeat_last_n < 0 else f'the last {sampling.repeat_last_n}'}"
    order = sampling.sampler_order
    drawn += "" if sampling.is_greedy else f"; order {order if isinstance(order, str) else ', '.join(order)}"
    parts.append(f"sampling     {drawn}")
    given = ", ".join(f"{name} {value}" for name, value in settings.switches.items())
    parts.append(f"switches     {given or 'none'}")
    if settings.assistance.active:
        parts.append(f"assistance   {settings.assistance}")
    new = {-1: "until the text ends", -2: "until the cache is full"}.get(run.new_tokens, f"up to {run.new_tokens}")
    parts.append(f"new tokens   {new}")
    return [*parts, command(settings)]


def command(settings: Settings) -> str:
    """The same as one command line."""
    words = ["fastllama", "generate"]
    for name, value in settings.parsed.values.items():
        option = OPTIONS[name]
        if name in ("from_llama_cpp", "dry_run"):
            continue
        if option.kind is None:
            off = next((each for each in option.off if each.startswith("--")), None)
            words += [option.canonical if value and option.names else off] if value or off else []
        else:
            given = value if option.repeats else [settings.parsed.words[name]]
            words += [word for each in given for word in (option.canonical, each)]
    return shlex.join(words)
