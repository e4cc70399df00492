"""Settings: what the options come to, each part validated where its fields are."""

from dataclasses import dataclass, fields

from fastllama.decode.context.choose import shifts
from fastllama.decode.sampling.options import Sampling
from fastllama.lab.cli.parser import Parsed, shown
from fastllama.lab.cli.run import Run
from fastllama.lab.cli.table import OPTIONS
from fastllama.lab.points.assistance import LATER, Assistance
from fastllama.model.config import FastConfig, require_allowed

_DRAWING = ("temperature", "top_k", "top_p", "min_p", "tfs_z", "typical_p", "mirostat")
_FILTERS = ("top_k", "top_p", "min_p", "tfs_z", "typical_p")
_LLAMA_PENALTIES = ("repeat_penalty", "frequency_penalty", "presence_penalty")
_TOP_K_OF_TRANSFORMERS = 50
_LAST_N_OF_LLAMA_CPP = 64


@dataclass(frozen=True)
class Settings:
    """`switches` are the fields of FastConfig that were given; `parsed` knows by which names."""

    run: Run
    sampling: Sampling
    switches: dict
    assistance: Assistance
    parsed: Parsed

    @property
    def config(self) -> FastConfig:
        return FastConfig(**self.switches)


def make(parsed: Parsed) -> Settings:
    """Settings of what was parsed. `ValueError` in one sentence, by the names that were typed."""
    run = Run(**_of(parsed, "run"))
    switches = _switches(parsed)
    assistance = _assistance(parsed)
    settings = Settings(run, _sampling(parsed, run), switches, assistance, parsed)
    _check(settings)
    return settings


def _of(parsed: Parsed, target: str) -> dict:
    given = ((OPTIONS[name], value) for name, value in parsed.values.items())
    return {option.field: value for option, value in given if option.target == target}


def _refused(parsed: Parsed, option, allowed: str) -> ValueError:
    word = shown(parsed.words.get(option.name, "on"))
    return ValueError(f"{parsed.name(option.name)} {word} is not allowed; allowed: {allowed}")


def in_typed_words(message: str, parsed: Parsed, target: str) -> str:
    """A message that names fields, in names of options."""
    for option in OPTIONS.values():
        if option.target == target:
            message = message.replace(f"{option.field}=", f"{parsed.name(option.name)} ")
    return message


def _each(parsed: Parsed, target: str, check, allowed_of) -> None:
    """Refuses the first value that `check(field, value)` does not take."""
    for name in parsed.values:
        option = OPTIONS[name]
        if option.target != target:
            continue
        try:
            check(option.field, parsed.values[name])
        except ValueError:
            raise _refused(parsed, option, allowed_of(option.field)) from None


def _switches(parsed: Parsed) -> dict:
    of = FastConfig.__dataclass_fields__
    _each(parsed, "config", require_allowed, lambda name: of[name].metadata["allowed"].removeprefix("None, "))
    switches = _of(parsed, "config")
    try:
        FastConfig(**switches)
    except ValueError as fault:
        raise ValueError(in_typed_words(str(fault), parsed, "config")) from None
    return switches


def _assistance(parsed: Parsed) -> Assistance:
    of = Assistance.__dataclass_fields__
    _each(
        parsed,
        "assistance",
        lambda name, value: Assistance(**{name: value}),
        lambda name: of[name].metadata["allowed"].removeprefix("None or ").removeprefix("None, "),
    )
    return Assistance(**_of(parsed, "assistance"))


def _sampling(parsed: Parsed, run: Run) -> Sampling:
    values = parsed.values
    if "sampler_order" in values and "sampling_seq" in values:
        raise ValueError(f"{parsed.name('sampler_order')} and {parsed.name('sampling_seq')} both give an order")
    order = _of(parsed, "order").get("sampler_order", run.defaults)
    of = Sampling.__dataclass_fields__
    for target in ("sampling", "penalty"):
        _each(
            parsed,
            target,
            lambda name, value: Sampling(**{name: value, "sampler_order": order}),
            lambda name: of[name].metadata["allowed"],
        )
    given = _of(parsed, "sampling") | _of(parsed, "penalty") | _window(parsed)
    if run.defaults == "llama.cpp":
        before = Sampling.llama_cpp()
        base = {each.name: getattr(before, each.name) for each in fields(before)}
    elif run.do_sample or any(name in given and (name != "mirostat" or given[name]) for name in _DRAWING):
        base = {"top_k": _TOP_K_OF_TRANSFORMERS}
    else:
        base = {"temperature": 0.0}
    sampling = Sampling(**{**base, **given, "sampler_order": order})
    if sampling.is_greedy or sampling.mirostat:
        # A filter that nobody asked for is not worth a word that it has no effect.
        base = {name: value for name, value in base.items() if name not in _FILTERS}
    return Sampling(**{**base, **given, "sampler_order": order})


def _window(parsed: Parsed) -> dict:
    """How far back penalties look: the name of a penalty says whose meaning it has."""
    theirs = [name for name in _LLAMA_PENALTIES if name in parsed.values]
    ours = "repetition_penalty" in parsed.values
    if ours and "repeat_penalty" in parsed.values:
        raise ValueError(
            f"{parsed.name('repeat_penalty')} and {parsed.name('repetition_penalty')} are one penalty: leave one out"
        )
    if "repeat_last_n" in parsed.values or not (ours or theirs):
        return {}
    if ours and theirs:
        raise ValueError(
            f"{parsed.name('repetition_penalty')} looks at the whole text and {parsed.name(theirs[0])} at the last "
            f"{_LAST_N_OF_LLAMA_CPP} tokens: say which by --repeat-last-n"
        )
    return {"repeat_last_n": -1 if ours else _LAST_N_OF_LLAMA_CPP}


def _check(settings: Settings) -> None:
    """Refuses what does not go together."""
    run, parsed, named = settings.run, settings.parsed, settings.parsed.name
    if run.prompt is not None and run.file is not None:
        raise ValueError(f"{named('prompt')} and {named('file')} both give the prompt: leave one out")
    if run.interactive:
        unfit = {"json": run.json, "sequences": run.sequences > 1, "display_prompt": run.display_prompt}
        for option, is_asked in unfit.items():
            if is_asked:
                raise ValueError(f"{named(option)} does not go with {named('interactive')}")
        if settings.assistance.active:
            drafts = next(name for name in parsed.values if OPTIONS[name].target == "assistance")
            raise ValueError(
                f"{named(drafts)} does not go with {named('interactive')}: drafts are verified within one generation, "
                "and a session keeps its cache between them"
            )
    for option in ("system_prompt", "chat_template"):
        if option in parsed.values and not run.interactive:
            raise ValueError(f"{named(option)} belongs to --interactive: else the prompt is the whole text")
    for option in ("model", "draft_model"):
        if str(parsed.values.get(option, "")).lower().endswith(".gguf"):
            raise ValueError(
                f"{named(option)} {shown(parsed.words[option])}: a .gguf file is not loaded here, name a checkpoint"
            )
    if run.new_tokens == -1 and shifts(settings.config) and run.sequences > 1:
        raise ValueError(
            f"{named('sequences')} {run.sequences} does not go with {named('context_shift')} and {named('n_predict')} "
            "-1: one text without an end at a time"
        )
    _check_assistance(settings)


def _check_assistance(settings: Settings) -> None:
    assistance, named = settings.assistance, settings.parsed.name
    typed = [name for name in settings.parsed.values if OPTIONS[name].target == "assistance"]
    if not assistance.active and typed:
        raise ValueError(f"{named(typed[0])} needs --draft-model, --draft-weights or --prompt-lookup")
    moving = "context_shift" if shifts(settings.config) else "grp_attn_n" if settings.config.grp_attn_n > 1 else None
    if typed and moving is not None:
        raise ValueError(
            f"{named(moving)} does not go with {named(typed[0])}: drafted tokens are taken back, and may have moved"
        )
    if assistance.prompt_lookup is None:
        return
    for name in ("draft_model", "draft_weights", "draft_tokens", *LATER):
        if name in typed:
            raise ValueError(f"{named(name)} is for a model that drafts: leave it or {named('prompt_lookup')} out")
