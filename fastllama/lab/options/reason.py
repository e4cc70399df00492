"""Why a setting gave the default's text, where that can be known from what was asked."""

from dataclasses import dataclass

from fastllama.lab.options import flags


@dataclass(frozen=True)
class Facts:
    """Of a run: its tokens, those of its prompt among them, the context that it had, and where it ran."""

    tokens: int
    context: int
    default_context: int
    device: str


def reason(given: dict, values: dict, defaults: dict, facts: Facts) -> str | None:
    """In words; None where it is not known. `given` and `values` as `Setting` has them."""
    left = {name: value for name, value in given.items() if value != defaults[name]}
    if not left:
        return "these are the default's values"
    found = {name: _of(name, values, facts) for name in left}
    if None in found.values():
        return None
    return "; ".join(dict.fromkeys(found.values()))


def _of(name: str, values: dict, facts: Facts) -> str | None:
    sampling = flags.sampling(values, 0)
    stored = facts.tokens - 1  # the last token is never stored
    if name == "threads":
        return "threads change speed only"
    if name == "no_kv_offload":
        return "keys and values are on the CPU already" if facts.device == "cpu" else None
    if name in ("parallel", "sequences"):
        if flags.whole(values["parallel"]) == 1:
            return f"-np {values['parallel']:g} runs one sequence at a time, and each draws by itself"
        return "each sequence draws by itself, whatever runs beside it"
    if name in flags.CACHE:
        return "what it rounds changed no choice"
    if name == "p_split":
        return "a drafted token stands only where the model draws the same"
    if name == "keep" and stored <= facts.context:
        return f"the text fits the context of {facts.context}: nothing is dropped"
    if name == "keep" and values["grp_attn_n"] > 1:
        return "self-extend drops nothing"
    if name == "context" and stored <= min(facts.context, facts.default_context):
        return "the text fits either context"
    if name == "grp_attn_w" and values["grp_attn_n"] == 1:
        return "-gan 1 makes no groups, whatever their window"
    if name in flags.GROUPS and stored <= values["grp_attn_w"]:
        return f"the text fills no window of {values['grp_attn_w']}"
    if name == "repeat_last_n" and not sampling.penalises:
        return "--repeat-penalty 1 and no other penalty: nothing is penalised, whatever the window"
    if name in ("mirostat_eta", "mirostat_tau") and not values["mirostat"]:
        return "--mirostat 0 has no use for it"
    ignored = next((words for words in sampling.ignored if words.startswith(f"{name} ")), None)
    return ignored
