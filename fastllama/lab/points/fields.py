"""Kinds of values that a record's fields may hold, and the refusal of any other by the field's name."""

import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

_TIME = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", re.ASCII)
_LARGEST = 2**63  # what a database's integers hold


class Kind:
    """A kind of value: called with one, whether it is of the kind; `wanted` says in words what is."""

    def __init__(self, holds: Callable[[Any], object], wanted: str):
        self._holds, self.wanted = holds, wanted

    def __call__(self, value) -> bool:
        return bool(self._holds(value))


def wants(words: str) -> Callable[[Callable[[Any], object]], Kind]:
    """Makes a function a kind."""
    return lambda holds: Kind(holds, words)


@wants("a finite number that is not negative")
def number(value) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 <= value <= 1e300  # false for NaN and infinity; an int too large for a float compares safely


@wants("a whole number that is not negative")
def count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@wants("a whole number above zero")
def size(value) -> bool:
    return count(value) and value > 0


@wants("a whole number that is not negative, of at most 63 bits")
def small_count(value) -> bool:
    return count(value) and value < _LARGEST


@wants("a whole number above zero, of at most 63 bits")
def small_size(value) -> bool:
    return size(value) and value < _LARGEST


@wants("a string")
def text(value) -> bool:
    return isinstance(value, str)


@wants("a string that is not empty")
def name(value) -> bool:
    return isinstance(value, str) and value.strip() != ""


@wants("an object")
def object_(value) -> bool:
    return isinstance(value, dict)


@wants("true or false")
def flag(value) -> bool:
    return isinstance(value, bool)


@wants("a string, a finite number, true, false or null")
def scalar(value) -> bool:
    """A JSON value that holds no other; numbers are finite, and integers of 63 bits."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return abs(value) < _LARGEST
    return value is None or isinstance(value, str)


@wants("a UTC time such as 2026-01-31T12:00:00+00:00")
def time(value) -> bool:
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        return False
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return True


def word(*allowed: str) -> Kind:
    """One of these strings."""
    return Kind(lambda value: isinstance(value, str) and value in allowed, "one of " + ", ".join(allowed))


def matching(pattern: str, wanted: str) -> Kind:
    """A string of which all matches the regular expression."""
    compiled = re.compile(pattern, re.ASCII)
    return Kind(lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None, wanted)


def or_null(kind: Kind) -> Kind:
    """What `kind` takes, or null."""
    return Kind(lambda value: value is None or kind(value), f"{kind.wanted}, or null")


samples = Kind(lambda value: isinstance(value, list), "a list of samples")
hash8 = matching(r"[0-9a-f]{8}", "8 hexadecimal digits")
sha256 = matching(r"[0-9a-f]{64}", "64 hexadecimal digits")


def show(value) -> str:
    """A value as a message names it."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def check(value: dict, table: Mapping[str, Kind], prefix: str = "", closed: bool = False) -> None:
    """ValueError naming the first field that is missing or of a wrong kind; with `closed`, also one not in `table`."""
    for field, kind in table.items():
        if field not in value:
            raise ValueError(f"field {prefix}{field} is missing")
        if not kind(value[field]):
            raise ValueError(f"field {prefix}{field} is {show(value[field])} but must be {kind.wanted}")
    unknown = sorted(value.keys() - table.keys()) if closed else []
    if unknown:
        raise ValueError(f"field {prefix}{show(unknown[0])[1:-1]} is not one that the schema knows")


def agree(field: str, stored, derived, relative: float, absolute: float) -> None:
    """ValueError if a stored figure (or null) is not the one that the record's samples give."""
    same = derived is not None and stored is not None
    same = math.isclose(stored, derived, rel_tol=relative, abs_tol=absolute) if same else stored is derived
    if not same:
        raise ValueError(f"field {field} is {show(stored)} but the record's own samples give {show(derived)}")


def only_once(pairs: list[tuple]) -> dict:
    """For json.loads: an object, or ValueError where a key stands in it twice, of which a reader would see one."""
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {show(twice)} stands there twice")
    return made
