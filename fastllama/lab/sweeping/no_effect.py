"""No effect: points of a sweep that give the same tokens at the same speed as with an option's default, and why."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from fastllama.lab.measuring import statistics
from fastllama.lab.points import option
from fastllama.lab.points.option import OPTIONS

# What is asked, and of which model, is no choice that could be without effect.
_CHOICES = [
    *(name for name, found in OPTIONS.items() if found.place in ("switch", "sampler", "assistance")),
    "preallocate",
    "cache_length",
]
_DRAWS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True)
class Reason:
    """Why options of these names can be without effect, where `holds` of a point and of the default's point."""

    options: tuple[str, ...]
    words: str  # may name fields of the point
    holds: Callable[[dict, dict], bool]


def _of(name: str, kept: dict):
    return option.stored(kept, name)


REASONS = (
    Reason(
        _DRAWS,
        "without do_sample the likeliest token is taken",
        lambda kept, default: not _of("do_sample", kept),
    ),
    Reason(
        tuple(name for name in _DRAWS if name != "top_k"),
        "top_k=1 leaves one token to draw from",
        lambda kept, default: _of("do_sample", kept) and _of("top_k", kept) == 1,
    ),
    Reason(
        ("min_p",),
        "no token has less than no share of the likeliest one's probability",
        lambda kept, default: _of("min_p", kept) == 0,
    ),
    Reason(
        ("no_repeat_ngram_size",),
        "the text of {prompt_length} + {new_tokens} tokens is shorter than that",
        lambda kept, default: _of("no_repeat_ngram_size", kept) > kept["prompt_length"] + kept["new_tokens"],
    ),
    Reason(
        ("bucket",),
        "the native step reads what is in use, without buckets",
        lambda kept, default: all("native step" in each["path"] for each in (kept, default)),
    ),
    Reason(
        ("bucket",),
        "the whole cache of {cache_length} positions is one bucket",
        lambda kept, default: min(_of("bucket", kept), _of("bucket", default)) >= kept["cache_length"],
    ),
    Reason(
        ("prefill_chunk",),
        "the prompt of {prompt_length} tokens is one chunk",
        lambda kept, default: _of("prefill_chunk", kept) >= kept["prompt_length"],
    ),
    Reason(
        ("cache_length",),
        "a step reads what is in use, rounded up to a bucket, and not what is reserved",
        lambda kept, default: True,
    ),
    Reason(
        ("bucket", "compile"),
        "with one new token there is no decode step",
        lambda kept, default: kept["new_tokens"] == 1,
    ),
    Reason(
        ("cache_device",),
        "the model is on the CPU already",
        lambda kept, default: kept["device"] == "cpu",
    ),
    Reason(
        ("keep",),
        "without context_shift nothing is dropped",
        lambda kept, default: not _of("context_shift", kept),
    ),
    Reason(
        ("context_shift", "keep"),
        "the text of {prompt_length} + {new_tokens} tokens fits the cache",
        lambda kept, default: kept["prompt_length"] + kept["new_tokens"] <= kept["cache_length"],
    ),
    Reason(
        ("grp_attn_w",),
        "grp_attn_n=1 is no self-extend",
        lambda kept, default: _of("grp_attn_n", kept) == 1,
    ),
    Reason(
        ("grp_attn_n", "grp_attn_w"),
        "the text of {prompt_length} + {new_tokens} tokens fills no window",
        lambda kept, default: (
            kept["prompt_length"] + kept["new_tokens"] <= min(_of("grp_attn_w", each) for each in (kept, default))
        ),
    ),
    Reason(
        ("compile", "fuse", "products"),
        "both ran as {path}",
        lambda kept, default: kept["path"] == default["path"],
    ),
)


def reason(name: str, kept: dict, default: dict) -> str | None:
    """Why an option can have no effect on a point, beside the same point with the option's default; None if unknown."""
    for known in REASONS:
        if name in known.options and known.holds(kept, default):
            return known.words.format(**kept)
    return None


def same(kept: dict, default: dict) -> bool:
    """Whether two points gave the same tokens, and neither decoding nor the first token took another time.

    Raises `ValueError` where scipy is missing. One run can show nothing.
    """
    if kept["hash"] != default["hash"]:
        return False
    verdicts = [statistics.compare_points(kept, default, figure) for figure in (None, "ttft_ms")]
    return all(each.word == statistics.NO_DIFFERENCE and math.isfinite(each.high) for each in verdicts)


def marks(points: list[dict]) -> list[list[str]]:
    """For each measured point of a sweep, one text for each of its options that has no effect; derived, never stored.

    An option is judged beside the point of the same sweep that has its default and all else equal; without such a
    point nothing is said.
    """
    names = [name for name in option.varied(points) if name in _CHOICES]
    others = {name: {_key(kept, name): kept for kept in points if _is_default(kept, name)} for name in names}
    marked = []
    for kept in points:
        texts = []
        for name in names:
            default = None if _is_default(kept, name) else others[name].get(_key(kept, name))
            if default is not None and same(kept, default):
                why = reason(name, kept, default)
                texts.append(f"{name}={option.words(_of(name, kept))} has no effect" + (f": {why}" if why else ""))
        marked.append(texts)
    return marked


def _is_default(kept: dict, name: str) -> bool:
    return _of(name, kept) == OPTIONS[name].default


def _key(kept: dict, without: str) -> tuple:
    return tuple(_of(name, kept) for name in OPTIONS if name not in (without, "prompt_file"))
