"""What a run's log says of its options: which contradict each other, and which were not as asked."""

from fastllama.lab.options import flags
from fastllama.lab.options.setting import Setting
from fastllama.lab.options.subject import threads_of

_DEFAULT_NOT_VANILLA = ("context", "cache_k", "cache_v")


def notes(setting: Setting, values: dict, subject) -> list[str]:
    """Sentences, as the log has them."""
    said = list(flags.sampling(values, 0).ignored)
    if threads_of(values) != values["threads"]:
        said.append(f"-t {values['threads']} is cut to {threads_of(values)}, the processors that can be used")
    if not subject.source.is_llama:
        names = ", ".join(flags.SPELLING[name] for name in _DEFAULT_NOT_VANILLA)
        return [*said, f"the defaults of {names} are not applied: transformers' own cache runs"]
    if values["grp_attn_n"] > 1 and values["keep"]:
        said.append("keep has no effect beside self-extend, which replaces the context shift")
    if values["context"] > subject.source.longest:
        said.append(f"the context of {values['context']} is cut to the model's {subject.source.longest} positions")
    for name in ("parallel", "sequences"):
        if flags.whole(values[name]) != values[name]:
            asked, runs = values[name], flags.whole(values[name])
            said.append(f"{flags.SPELLING[name]} {asked} is read as {int(asked)} by llama.cpp, and {runs} runs")
    if flags.whole(values["parallel"]) > flags.whole(values["sequences"]):
        said.append("-np above -ns leaves places empty")
    return said
