"""Options: whatever a point may be given by name, where it belongs, and how a word becomes its value."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, get_args

import fastllama
from fastllama.lab.points.assistance import Assistance
from fastllama.lab.points.point import DTYPES, Point
from fastllama.lab.points.sampler import Sampler
from fastllama.lab.points.workload import Workload
from fastllama.model.config import require_allowed

_TRUTHS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}


@dataclass(frozen=True)
class Option:
    """place: "point", "workload", "sampler", "switch" or "assistance". kinds: the types that a value may have."""

    name: str
    place: str
    kinds: tuple[type, ...]
    default: object
    allowed: str
    refuse: Callable[[object], None]  # raises ValueError on a value of the right type that is not allowed

    def value(self, given) -> object:
        """The value that a word of the command line, or a value of a TOML file, stands for.

        None is written "none". `ValueError` names the option, what was given and what is allowed.
        """
        try:
            value = self._typed(given)
            self.refuse(value)
        except (ValueError, OverflowError):
            raise ValueError(f"{self.name}={given!r} is not allowed; allowed: {self.allowed}") from None
        return value

    def _typed(self, given):
        if isinstance(given, str):
            return self._read(given.strip())
        kind = type(given)
        if kind is int and float in self.kinds and int not in self.kinds:
            return float(given)
        if kind not in self.kinds:
            raise ValueError
        return given

    def _read(self, word: str):
        if NoneType in self.kinds and word.lower() == "none":
            return None
        for kind in (int, float):
            if kind in self.kinds:
                return kind(word)
        if bool in self.kinds:
            if word.lower() not in _TRUTHS:
                raise ValueError
            return _TRUTHS[word.lower()]
        return word


def _kinds(hint) -> tuple[type, ...]:
    return get_args(hint) or (hint,)


def _require(holds: Callable[[Any], bool]) -> Callable[[Any], None]:
    def refuse(value) -> None:
        if not holds(value):
            raise ValueError

    return refuse


_NAME = ("a name that is not empty", _require(lambda value: value is None or value != ""))
_SIZE = ("an integer >= 1", _require(lambda value: value >= 1))
_SIZE_OR_NONE = ("None or an integer >= 1", _require(lambda value: value is None or value >= 1))
# torch takes seeds of 64 bits.
_SEED = ("an integer from 0 to 2**63 - 1", _require(lambda value: 0 <= value < 2**63))
_TRUTH = ("true or false", _require(lambda value: True))
_DTYPE = (f"auto, {', '.join(DTYPES)}", _require(lambda value: value in ("auto", *DTYPES)))
_OF_POINT = {
    "model": _NAME,
    "dtype": _DTYPE,
    "device": _NAME,
    "preallocate": _TRUTH,
    "cache_length": _SIZE_OR_NONE,
    "static_cache": _TRUTH,
}
_OF_WORKLOAD = {
    "batch_size": _SIZE,
    "prompt_length": _SIZE,
    "new_tokens": _SIZE,
    "seed": _SEED,
    "prompt_file": _NAME,
}


def _of_table(cls, place: str, table: dict) -> list[Option]:
    known = {part.name: part for part in fields(cls)}
    return [
        Option(name, place, _kinds(known[name].type), known[name].default, allowed, refuse)
        for name, (allowed, refuse) in table.items()
    ]


def _refusing(refuse: Callable[[str, Any], object], name: str) -> Callable[[Any], None]:
    def check(value) -> None:
        refuse(name, value)

    return check


def _of_values(cls, place: str, refuse=None) -> list[Option]:
    """A validated dataclass refuses by itself, or `refuse(name, value)` what no other value could make allowed."""
    refuse = refuse or (lambda name, value: cls(**{name: value}))
    return [
        Option(
            part.name,
            place,
            _kinds(part.type),
            part.default,
            part.metadata["allowed"],
            _refusing(refuse, part.name),
        )
        for part in fields(cls)
    ]


OPTIONS = {
    option.name: option
    for option in (
        *_of_table(Point, "point", _OF_POINT),
        *_of_values(fastllama.FastConfig, "switch", require_allowed),
        *_of_table(Workload, "workload", _OF_WORKLOAD),
        *_of_values(Sampler, "sampler"),
        *_of_values(Assistance, "assistance"),
    )
}


def option(name: str) -> Option:
    """The option of that name, "-" as good as "_". `ValueError` lists what there is."""
    found = OPTIONS.get(name.strip().removeprefix("--").replace("-", "_"))
    if found is None:
        raise ValueError(f"{name.strip()!r} is no option of a point; there are {', '.join(OPTIONS)}")
    return found


def words(value) -> str:
    """A value as `Option.value` reads it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def point(values: dict, runs: int, warmup: int) -> Point:
    """The point with these values by option name, all else at its default. `ValueError` where they do not go together.

    Of the switches only those that are given are part of it, as on the command line.
    """
    placed: dict[str, dict] = {place: {} for place in ("point", "workload", "sampler", "switch", "assistance")}
    for name, value in values.items():
        placed[OPTIONS[name].place][name] = value
    work = Workload(**placed["workload"], sampler=Sampler(**placed["sampler"]))
    placed["point"] |= {"assistance": Assistance(**placed["assistance"])}
    return Point(workload=work, switches=placed["switch"], runs=runs, warmup=warmup, **placed["point"])


def stored(kept: dict, name: str):
    """The value of an option in a stored point (or a failed or skipped one); its default where it had no such option.

    A cache_length that is what prompt and new tokens need is the default, None.
    """
    found = OPTIONS[name]
    if name in ("preallocate", "static_cache") or found.place == "switch":
        return kept["switches"].get(name, found.default)
    if found.place == "sampler":
        return kept.get("sampler", {}).get(name, found.default)
    if found.place == "assistance":
        return kept.get("assisted", {}).get(name, found.default)
    if name == "cache_length" and kept[name] in (None, kept["prompt_length"] + kept["new_tokens"]):
        return None
    return kept.get(name, found.default)


def varied(entries: list[dict]) -> list[str]:
    """The options in which stored points differ."""
    return [name for name in OPTIONS if name != "prompt_file" and len({stored(kept, name) for kept in entries}) > 1]
