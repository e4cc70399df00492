"""llama.cpp's flags, as a line of the option table has them, and what they set here."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from fastllama.decode.sampling.options import Sampling
from fastllama.model.config import FastConfig

SAMPLING = frozenset(option.name for option in fields(Sampling)) - {"seed", "sampler_order", "min_keep"}
CACHE = ("cache_k", "cache_v")
GROUPS = ("grp_attn_n", "grp_attn_w")
SWITCHES = (*CACHE, *GROUPS, "keep")
SPLIT = ("parallel", "sequences", "p_split")


def _count(word: str) -> float:
    """A number of sequences. llama.cpp reads the whole number that a word begins with, so that 0.1 is 0: kept as it is
    written here, and read by `whole`."""
    value = float(word)
    if not 0 <= value < 1e6:
        raise ValueError
    return int(value) if value == int(value) else value


def whole(count: float) -> int:
    """The sequences that `-np` or `-ns` ask for: at least one."""
    return max(int(count), 1)


def _at_least(least: int) -> Callable[[str], int]:
    def read(word: str) -> int:
        if int(word) < least:
            raise ValueError
        return int(word)

    return read


def _share(word: str) -> float:
    if not 0 <= float(word) <= 1:
        raise ValueError
    return float(word)


@dataclass(frozen=True)
class Flag:
    """`read` makes a value of a word, and raises `ValueError` for any other; None where the flag takes no word."""

    name: str  # of the value
    spellings: tuple[str, ...]
    read: Callable[[str], object] | None
    allowed: str


FLAGS = (
    Flag("temperature", ("--temp",), float, "a number"),
    Flag("top_k", ("--top-k",), int, "an integer"),
    Flag("top_p", ("--top-p",), float, "a number"),
    Flag("min_p", ("--min-p",), float, "a number"),
    Flag("tfs_z", ("--tfs",), float, "a number"),
    Flag("typical_p", ("--typical",), float, "a number"),
    Flag("repeat_last_n", ("--repeat-last-n",), int, "an integer"),
    Flag("repeat_penalty", ("--repeat-penalty",), float, "a number"),
    Flag("presence_penalty", ("--presence-penalty",), float, "a number"),
    Flag("frequency_penalty", ("--frequency-penalty",), float, "a number"),
    Flag("mirostat", ("--mirostat",), int, "an integer"),
    Flag("mirostat_eta", ("--mirostat-lr",), float, "a number"),
    Flag("mirostat_tau", ("--mirostat-ent",), float, "a number"),
    Flag("cache_k", ("-ctk", "--cache-type-k"), str, "a type"),
    Flag("cache_v", ("-ctv", "--cache-type-v"), str, "a type"),
    Flag("grp_attn_n", ("-gan", "--grp-attn-n"), int, "an integer"),
    Flag("grp_attn_w", ("-gaw", "--grp-attn-w"), int, "an integer"),
    Flag("keep", ("--keep",), int, "an integer"),
    Flag("context", ("-c", "--ctx-size"), _at_least(0), "an integer >= 0; 0 is the model's own"),
    Flag("threads", ("-t", "--threads"), _at_least(1), "an integer >= 1"),
    Flag("no_kv_offload", ("-nkvo", "--no-kv-offload"), None, "no value"),
    Flag("parallel", ("-np", "--parallel"), _count, "a number from 0 to 1e6"),
    Flag("sequences", ("-ns", "--sequences"), _count, "a number from 0 to 1e6"),
    Flag("p_split", ("-ps", "--p-split"), _share, "a number from 0 to 1"),
)
_BY_SPELLING = {spelling: flag for flag in FLAGS for spelling in flag.spellings}
SPELLING = {flag.name: flag.spellings[0] for flag in FLAGS}
# What llama.cpp does where nobody says.
DEFAULTS = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "tfs_z": 1.0,
    "typical_p": 1.0,
    "repeat_last_n": 64,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "mirostat": 0,
    "mirostat_eta": 0.1,
    "mirostat_tau": 5.0,
    "cache_k": "f16",
    "cache_v": "f16",
    "grp_attn_n": 1,
    "grp_attn_w": 512,
    "keep": 0,
    "context": 512,
    "threads": 4,
    "no_kv_offload": False,
    "parallel": 1,
    "sequences": 1,
    "p_split": 0.1,
}


def parse(words: str) -> dict:
    """Values by name, in the order of the flags. Raises `ValueError` for a flag or a value that is not allowed."""
    try:
        left = shlex.split(words)
    except ValueError as fault:
        raise ValueError(f"{words!r} cannot be read: {fault}") from None
    found: dict[str, Any] = {}
    while left:
        spelling = left.pop(0)
        flag = _BY_SPELLING.get(spelling)
        if flag is None:
            known = ", ".join(each.spellings[-1] for each in FLAGS)
            raise ValueError(f"unknown flag {spelling!r}; known: {known}")
        if flag.name in found:
            raise ValueError(f"{spelling} is given twice")
        if flag.read is None:
            found[flag.name] = True
            continue
        if not left or (left[0].startswith("-") and not re.match(r"-[\d.]", left[0])):
            raise ValueError(f"{spelling} lacks its value: {flag.allowed}")
        word = left.pop(0)
        try:
            found[flag.name] = flag.read(word)
        except (ValueError, OverflowError):
            raise ValueError(f"{spelling} {word!r} is not allowed; allowed: {flag.allowed}") from None
    check({**DEFAULTS, **found})
    return found


def check(values: dict) -> None:
    """Raises `ValueError` where values are out of range, or not together."""
    sampling(values, 0)
    FastConfig(**{name: values[name] for name in SWITCHES})


def sampling(values: dict, seed: int | None) -> Sampling:
    """How tokens are drawn, in llama.cpp's order; `seed` is that of row 0, and None leaves the draw to the caller."""
    seeds = {} if seed is None else {"seed": (seed,)}
    return Sampling.llama_cpp(**{name: values[name] for name in SAMPLING}, **seeds)
