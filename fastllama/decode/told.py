"""Told: what a generate call says that transformers does not hand on to the decoding method it calls."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

Result = TypeVar("Result")


class Told(NamedTuple):
    """Of the call in progress in this thread."""

    cache: bool = False  # whether it was handed one
    assistance: dict | None = None  # by name: transformers reads it from the draft's generation config only


_told: ContextVar[Told | None] = ContextVar("told", default=None)


def told() -> Told:
    """What the call in progress says."""
    return _told.get() or Told()


def telling(what: Told, work: Callable[[], Result]) -> Result:
    """What `work()` returns; meanwhile `told()` is `what`."""
    before = _told.get()
    try:
        try:
            _told.set(what)
            return work()
        finally:
            _told.set(before)
    finally:
        _told.set(before)  # where an interruption kept the first from it
