"""The sampler: how the next token is taken, in the words of transformers' GenerationConfig."""

import math
from dataclasses import asdict, dataclass, field, fields


def _option(default, help: str, allowed: str):
    return field(default=default, metadata={"help": help, "allowed": allowed})


@dataclass(frozen=True)
class Sampler:
    """Arguments of `generate`, with its names, meanings and defaults. `ValueError` on a value that is not allowed."""

    do_sample: bool = _option(False, "draw the next token instead of taking the likeliest", "true or false")
    temperature: float = _option(1.0, "logits are divided by this before a draw", "a number above 0")
    top_k: int = _option(50, "a draw is among this many of the likeliest tokens; 0: all", "an integer >= 0")
    top_p: float = _option(
        1.0, "a draw is among the fewest likeliest tokens with this probability together", "a number above 0, up to 1"
    )
    min_p: float | None = _option(
        None,
        "a draw is among tokens with this share of the likeliest one's probability",
        "None or a number from 0 to 1",
    )
    typical_p: float = _option(
        1.0, "a draw is among the most typical tokens with this probability together", "a number above 0, up to 1"
    )
    epsilon_cutoff: float = _option(
        0.0, "a draw is among tokens with at least this probability", "a number from 0 to below 1"
    )
    eta_cutoff: float = _option(0.0, "the same, with a bound that falls with the entropy", "a number from 0 to below 1")
    repetition_penalty: float = _option(
        1.0,
        "logits of tokens that the text already has are divided by this (if negative, multiplied)",
        "a number above 0",
    )
    no_repeat_ngram_size: int = _option(
        0, "so many tokens in a row occur only once in the text; 0: no such rule", "an integer >= 0"
    )

    def __post_init__(self):
        for option in fields(self):
            value = getattr(self, option.name)
            if option.type in (float, float | None) and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)  # transformers takes no int there
                object.__setattr__(self, option.name, value)
            if not _IS_ALLOWED[option.name](value):
                raise ValueError(f"{option.name}={value!r} is not allowed; allowed: {option.metadata['allowed']}")

    @property
    def arguments(self) -> dict:
        """Keyword arguments of `generate`: every option, so that no default is another version's."""
        return asdict(self)

    @property
    def given(self) -> dict:
        """The options that are not at their default."""
        return {option.name: getattr(self, option.name) for option in fields(self) if self._differs(option)}

    def _differs(self, option) -> bool:
        return getattr(self, option.name) != option.default

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.given.items()) or "greedy"


def _is_number(value) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_share(value) -> bool:
    return _is_number(value) and 0 < value <= 1


def _is_cutoff(value) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_positive(value) -> bool:
    return _is_number(value) and value > 0


_IS_ALLOWED = {
    "do_sample": lambda value: isinstance(value, bool),
    "temperature": _is_positive,
    "top_k": _is_count,
    "top_p": _is_share,
    "min_p": lambda value: value is None or (_is_number(value) and 0 <= value <= 1),
    "typical_p": _is_share,
    "epsilon_cutoff": _is_cutoff,
    "eta_cutoff": _is_cutoff,
    "repetition_penalty": _is_positive,
    "no_repeat_ngram_size": _is_count,
}
