"""Option: one thing that can be asked for, under llama.cpp's names and transformers'."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What stands behind an option's name. `read` turns words into a value, or raises `ValueError` (why, unnamed)."""

    metavar: str
    read: Callable[[str], object]


@dataclass(frozen=True)
class Option:
    """`target` and `field` say where its value goes: a field of Run, Sampling, FastConfig or Assistance, or "order",
    "window" and so on for what `sampling` settles among several. A flag has no kind; `off` are the names that turn it
    off.
    """

    name: str
    target: str
    field: str
    kind: Kind | None
    llama_cpp: tuple[str, ...]
    transformers: tuple[str, ...]
    help: str
    own: tuple[str, ...] = ()
    off: tuple[str, ...] = ()
    default: str = ""  # in words
    repeats: bool = False  # may be given several times: its field is a tuple

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that turns it on, once, shorter ones first."""
        every = (*self.llama_cpp, *self.transformers, *self.own)
        return tuple(sorted(dict.fromkeys(every), key=lambda name: name.startswith("--")))

    @property
    def canonical(self) -> str:
        """The name that messages and translations use: ours, or transformers' where it has one."""
        every = (*self.own, *self.transformers, *self.llama_cpp, *self.off)
        return next(name for name in every if name.startswith("--"))


def read_whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("is not a whole number") from None


def read_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("is not a number") from None


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not UTF-8 text") from None
    return text


def _string(text: str) -> str:
    if not text:
        raise ValueError("is empty")
    return _text(text)


def _name(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return _text(text)


def within(least: int, most: int, *others: int, words: str = "") -> Kind:
    """A whole number from `least` to `most`, or one of the others."""

    def read(text: str) -> int:
        value = read_whole(text)
        if least <= value <= most or value in others:
            return value
        raise ValueError(f"is not allowed; allowed: {words or f'a whole number from {least} to {most}'}")

    return Kind("N", read)


def choice(*words: str) -> Kind:
    """One of these words."""

    def read(text: str) -> str:
        if text not in words:
            raise ValueError(f"is not allowed; allowed: {', '.join(words)}")
        return text

    return Kind("WORD", read)


WHOLE = Kind("N", read_whole)
NUMBER = Kind("X", read_number)
TEXT = Kind("TEXT", _text)
STRING = Kind("TEXT", _string)
NAME = Kind("NAME", _name)
FILE = Kind("FILE", _name)
