"""Sampling: the options of a draw, validated in one place."""

import math
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

SAMPLERS: tuple[str, ...] = ("penalties", "top_k", "tfs_z", "typical_p", "top_p", "min_p", "temperature")
ORDERS: dict[str, tuple[str, ...]] = {
    "transformers": ("penalties", "temperature", "top_k", "tfs_z", "top_p", "min_p", "typical_p"),
    "llama.cpp": SAMPLERS,
}
_MIROSTAT_IGNORES = ("top_k", "tfs_z", "typical_p", "top_p", "min_p")
_GREEDY_IGNORES = (*_MIROSTAT_IGNORES, "mirostat")
_LARGEST_SEED = 2**62
COLD = 1e-30  # a score divided by less is not a float32


def _option(default: Any, help: str, allowed: str, by_row: bool = True) -> Any:
    return field(default=default, metadata={"help": help, "allowed": allowed, "by_row": by_row})


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; without arguments, from the model's own distribution.

    Numbers may be given for each row, as a sequence. Names and meanings are llama.cpp's. A value that is not allowed
    raises `ValueError`; `ignored` says which options have no effect beside others.
    """

    temperature: float = _option(1.0, "scores are divided by this; 0 or less takes the best", "a finite number")
    top_k: int = _option(0, "a draw is among so many of the best; 0 or less: all", "an integer")
    top_p: float = _option(1.0, "among the fewest best with this probability together; from 1: all", "a number >= 0")
    min_p: float = _option(0.0, "among those with this share of the best one's probability", "a number from 0 to 1")
    tfs_z: float = _option(1.0, "tail-free sampling: the share of the curvature; from 1: all", "a number >= 0")
    typical_p: float = _option(
        1.0,
        "among the most typical with this probability together; from 1: all",
        "a number >= 0 (above 0 in transformers' order)",
    )
    repeat_penalty: float = _option(
        1.0, "scores of tokens that occur are divided by this (if negative, multiplied)", "a finite number above 0"
    )
    repeat_last_n: int = _option(
        -1, "so many of the last tokens are looked at for penalties; 0: none, -1: all", "an integer >= -1"
    )
    frequency_penalty: float = _option(0.0, "taken off a score for each time the token occurs", "a finite number")
    presence_penalty: float = _option(0.0, "taken off a score if the token occurs", "a finite number")
    mirostat: int = _option(0, "version of mirostat, which replaces the filters; 0: none", "0, 1, 2", by_row=False)
    mirostat_tau: float = _option(5.0, "the surprise, in bits, that mirostat aims at", "a finite number >= 0")
    mirostat_eta: float = _option(0.1, "how fast mirostat learns", "a finite number >= 0")
    min_keep: int = _option(1, "filters leave at least so many tokens", "an integer >= 1")
    sampler_order: str | tuple[str, ...] = _option(
        "transformers",
        "the order of the filters, and whose arithmetic they have: a tuple of names has llama.cpp's",
        f"transformers, llama.cpp, or different names of: {', '.join(SAMPLERS)}",
        by_row=False,
    )
    seed: int | tuple[int, ...] | None = _option(
        None,
        "None draws from torch's generator; a number gives each row draws of its own, from seed, seed + 1, ...",
        "None, an integer from 0 to 2**62, or one for each row",
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if not isinstance(value, str | tuple) and isinstance(value, Sequence):
                value = tuple(value)
                object.__setattr__(self, option.name, value)
            many = option.metadata["by_row"] and isinstance(value, tuple)
            if many and (not value or None in value):
                self._refuse(option)
            if not all(map(_IS_ALLOWED[option.name], value if many else (value,))):
                self._refuse(option)
        if self.sampler_order == "transformers" and 0 in self._each("typical_p"):
            self._refuse(type(self).__dataclass_fields__["typical_p"])
        lengths = {option.name: len(getattr(self, option.name)) for option in fields(self) if self._is_by_row(option)}
        if len(set(lengths.values())) > 1:
            words = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise ValueError(f"options by row must be for the same number of rows: {words}")

    def _refuse(self, option: Field) -> None:
        value = getattr(self, option.name)
        raise ValueError(f"{option.name}={value!r} is not allowed; allowed: {option.metadata['allowed']}")

    @classmethod
    def llama_cpp(cls, **changes: Any) -> "Sampling":
        """llama.cpp's defaults and order, with `changes`."""
        defaults = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_last_n": 64}
        return cls(**{**defaults, "sampler_order": "llama.cpp", **changes})

    @property
    def rows(self) -> int | None:
        """For how many rows there are options; None where they are for any number."""
        lengths = [len(getattr(self, option.name)) for option in fields(self) if self._is_by_row(option)]
        return lengths[0] if lengths else None

    def of_row(self, row: int) -> "Sampling":
        """What it says of one row, for a text alone: row 3's draws from seed 7 are those of seed 10.

        Raises `IndexError` where options by row are for fewer rows.
        """
        values = {option.name: getattr(self, option.name)[row] for option in fields(self) if self._is_by_row(option)}
        if isinstance(self.seed, int):
            values["seed"] = self.seed + row
        return replace(self, **values)

    @property
    def order(self) -> tuple[str, ...]:
        """The samplers in order."""
        order = self.sampler_order
        return ORDERS[order] if isinstance(order, str) else order

    @property
    def is_greedy(self) -> bool:
        """Whether every row takes its best token."""
        return all(value <= COLD for value in self._each("temperature"))

    @property
    def draws_itself(self) -> bool:
        """Whether rows draw from seeds of their own instead of torch's generator."""
        return self.seed is not None and not self.is_greedy

    @property
    def is_stateless(self) -> bool:
        """Whether a draw's distribution follows from the text alone, and the draw is not our own."""
        return self.is_greedy or (self.seed is None and self.mirostat == 0)

    @property
    def penalises(self) -> bool:
        """Whether any penalty has an effect."""
        return "penalties" in self.order and self.acts("repeat_last_n") and self._has_penalty()

    def _has_penalty(self) -> bool:
        return any(self.acts(name) for name in ("repeat_penalty", "frequency_penalty", "presence_penalty"))

    def acts(self, name: str) -> bool:
        """Whether the option, taken alone, changes anything in any row."""
        return any(_ACTS[name](value) for value in self._each(name))

    @property
    def ignored(self) -> list[str]:
        """Options that are set and have no effect beside others, in words; as llama.cpp has it."""
        words = []
        if self.is_greedy:
            words += [f"{name} has no effect at temperature 0" for name in _GREEDY_IGNORES if self.acts(name)]
        elif self.mirostat:
            words += [f"{name} has no effect beside mirostat" for name in _MIROSTAT_IGNORES if self.acts(name)]
        else:
            left_out = [name for name in _MIROSTAT_IGNORES if name not in self.order]
            words += [f"{name} has no effect outside sampler_order" for name in left_out if self.acts(name)]
        if "temperature" not in self.order and not self.mirostat and not self.is_greedy and self.acts("temperature"):
            words.append("temperature has no effect outside sampler_order")
        if self._has_penalty() and not self.penalises:
            why = "with repeat_last_n 0" if "penalties" in self.order else "outside sampler_order"
            words.append(f"penalties have no effect {why}")
        return words

    def _is_by_row(self, option: Field) -> bool:
        return option.metadata["by_row"] and isinstance(getattr(self, option.name), tuple)

    def _each(self, name: str) -> tuple:
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,)

    def largest(self, name: str) -> Any:
        """The largest of an option's values."""
        return max(self._each(name))

    def smallest(self, name: str) -> Any:
        """The smallest of an option's values."""
        return min(self._each(name))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_order(value: Any) -> bool:
    if isinstance(value, str):
        return value in ORDERS
    if not isinstance(value, tuple) or not all(isinstance(name, str) for name in value):
        return False
    return set(value) <= set(SAMPLERS) and len(set(value)) == len(value)


_IS_ALLOWED = {
    "temperature": _is_number,
    "top_k": _is_whole,
    "top_p": _is_share,
    "min_p": lambda value: _is_share(value) and value <= 1,
    "tfs_z": _is_share,
    "typical_p": _is_share,
    "repeat_penalty": lambda value: _is_number(value) and value > 0,
    "repeat_last_n": lambda value: _is_whole(value) and value >= -1,
    "frequency_penalty": _is_number,
    "presence_penalty": _is_number,
    "mirostat": lambda value: _is_whole(value) and value in (0, 1, 2),
    "mirostat_tau": _is_share,
    "mirostat_eta": _is_share,
    "min_keep": lambda value: _is_whole(value) and value >= 1,
    "sampler_order": _is_order,
    "seed": lambda value: value is None or (_is_whole(value) and 0 <= value <= _LARGEST_SEED),
}
_ACTS = {
    "temperature": lambda value: value > COLD and value != 1,
    "top_k": lambda value: value > 0,
    "top_p": lambda value: value < 1,
    "min_p": lambda value: value > 0,
    "tfs_z": lambda value: value < 1,
    "typical_p": lambda value: value < 1,
    "repeat_penalty": lambda value: value != 1,
    "repeat_last_n": lambda value: value != 0,
    "frequency_penalty": lambda value: value != 0,
    "presence_penalty": lambda value: value != 0,
    "mirostat": lambda value: value != 0,
}
