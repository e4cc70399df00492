"""Orders of samplers in llama.cpp's words: names with semicolons, or a letter for each."""

from fastllama.decode.sampling.options import ORDERS, SAMPLERS
from fastllama.lab.cli.option import Kind

_NAMES = {
    **{name: name for name in SAMPLERS},
    "typical": "typical_p",
    "typ_p": "typical_p",
    "typ": "typical_p",
    "tfs": "tfs_z",
    "temp": "temperature",
    "repeat_penalty": "penalties",
    "repetition_penalty": "penalties",
}
_LETTERS = {
    "e": "penalties",
    "k": "top_k",
    "f": "tfs_z",
    "y": "typical_p",
    "p": "top_p",
    "m": "min_p",
    "t": "temperature",
}
# Off by default in llama.cpp too, so its default list means the same without them.
NOT_BUILT = {"dry": "d", "xtc": "x", "top_n_sigma": "s", "infill": "i", "adaptive_p": "a"}


def _name(text: str) -> str | tuple[str, ...]:
    if text in ORDERS:
        return text
    names = [part.strip().replace("-", "_").lower() for part in text.replace(",", ";").split(";")]
    return _different([_NAMES[name] for name in names if name and name not in NOT_BUILT and _known(name, _NAMES)])


def _letters(text: str) -> tuple[str, ...]:
    built = [letter for letter in text if letter not in NOT_BUILT.values()]
    return _different([_LETTERS[letter] for letter in built if _known(letter, _LETTERS)])


def _known(word: str, table: dict[str, str]) -> bool:
    if word not in table:
        known = ", ".join((*ORDERS, *SAMPLERS) if table is _NAMES else table)
        raise ValueError(f"names {word!r}, which is none of {known}")
    return True


def _different(order: list[str]) -> tuple[str, ...]:
    if not order:
        raise ValueError("names no sampler")
    twice = next((name for name in order if order.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"names {twice} twice")
    return tuple(order)


def left_out(text: str, letters: bool) -> list[str]:
    """The samplers in such a list that are not built."""
    if letters:
        return [name for name, letter in NOT_BUILT.items() if letter in text]
    return [name for name in NOT_BUILT if name in text.replace("-", "_").lower().replace(",", ";").split(";")]


ORDER = Kind("NAMES", _name)
LETTERS = Kind("LETTERS", _letters)
