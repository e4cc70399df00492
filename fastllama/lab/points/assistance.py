"""Assistance: who drafts tokens for the target to verify, and how many at a time."""

from dataclasses import dataclass, field, fields

import torch

from fastllama.decode.assisted.support import DEFAULT_BRANCHES, DEFAULT_SPLIT
from fastllama.model.config import FastConfig

SCHEDULES = ("constant", "heuristic", "adaptive")
DRAFT_TOKENS = 6  # where nobody says, as the seed had it
MOST_TOKENS = 12  # where nobody says and their number adapts
# What prompt lookup has no use for. These came later than the other options: a record holds what was given of them.
LATER = ("p_split", "draft_branches", "draft_device", "draft_window")
_WEIGHTS = FastConfig.__dataclass_fields__["weights"].metadata["allowed"]


def _option(default, help: str, allowed: str):
    return field(default=default, metadata={"help": help, "allowed": allowed})


@dataclass(frozen=True)
class Assistance:
    """How generation is assisted; nothing given is no assistance. `ValueError` on a value that is not allowed.

    A draft model, or with draft_weights alone the target's own weights in fewer bits, or n-grams of the context.
    """

    draft: str | None = _option(
        None, "a smaller model drafts: demo-draft, a folder, a hub name", "None or a model's name"
    )
    prompt_lookup: int | None = _option(
        None, "up to so many tokens are drafted from where the context has the last ones", "None or an integer >= 1"
    )
    draft_tokens: int | None = _option(
        None,
        f"tokens that are drafted at a time ({DRAFT_TOKENS}; at most {MOST_TOKENS} if one branch adapts)",
        "None or an integer >= 1",
    )
    draft_schedule: str = _option(
        "adaptive", "how the number of drafted tokens follows what is accepted", ", ".join(SCHEDULES)
    )
    draft_weights: str | None = _option(None, "hold the draft's weights in fewer bits", _WEIGHTS)
    p_split: float | None = _option(
        None,
        f"a branch splits for candidates more probable than this ({DEFAULT_SPLIT})",
        "None or a number from 0 to 1",
    )
    draft_branches: int | None = _option(
        None, f"branches at most, where --p-split asks for them ({DEFAULT_BRANCHES})", "None or an integer >= 1"
    )
    draft_device: str | None = _option(None, "where the draft runs; None is the target's device", "None or a device")

    draft_window: int | None = _option(
        None,
        "of a longer prompt the draft reads the first token and the last, so many in all; None as it is made for",
        "None, 0 for all, or an integer >= 2",
    )

    def __post_init__(self):
        for name in ("prompt_lookup", "draft_tokens", "draft_branches"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                self._refuse(name)
        if self.draft is not None and not (isinstance(self.draft, str) and self.draft.strip()):
            self._refuse("draft")
        if self.draft_schedule not in SCHEDULES:
            self._refuse("draft_schedule")
        if self.p_split is not None and not (type(self.p_split) in (int, float) and 0 <= self.p_split <= 1):
            self._refuse("p_split")
        window = 0 if self.draft_window is None else self.draft_window
        if type(window) is not int or window < 0 or window == 1:
            self._refuse("draft_window")
        self._check_device()
        try:
            FastConfig(weights=self.draft_weights)
        except ValueError:
            self._refuse("draft_weights")

    def _check_device(self) -> None:
        if self.draft_device is None:
            return
        try:
            torch.device(self.draft_device)
        except (RuntimeError, TypeError):
            self._refuse("draft_device")

    def _refuse(self, name: str) -> None:
        allowed = self.__dataclass_fields__[name].metadata["allowed"]
        raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; allowed: {allowed}")

    @property
    def active(self) -> bool:
        """Whether anything drafts."""
        return self.drafts or self.prompt_lookup is not None

    @property
    def drafts(self) -> bool:
        """Whether a model drafts."""
        return self.draft is not None or self.draft_weights is not None

    @property
    def tokens(self) -> int:
        """How many tokens are drafted at a time, at most or at first where that follows what is accepted."""
        return self.prompt_lookup or self.draft_tokens or (MOST_TOKENS if self._adapts else DRAFT_TOKENS)

    @property
    def _adapts(self) -> bool:
        return self.draft_schedule == "adaptive" and not self.splits

    @property
    def splits(self) -> bool:
        """Whether a draft's branches are asked to split."""
        return self.branches > 1

    @property
    def branches(self) -> int:
        """How many branches a draft may have."""
        return self.draft_branches or (1 if self.p_split is None else DEFAULT_BRANCHES)

    @property
    def given(self) -> dict:
        """The options that are not at their default."""
        return {part.name: value for part in fields(self) if (value := getattr(self, part.name)) != part.default}

    def draft_model(self, target: str) -> str | None:
        """The model that drafts; the target's own where only its weights are others."""
        return (self.draft or target) if self.drafts else None

    def check(self, preallocates: bool, positions: int, prompt_length: int) -> None:
        """`ValueError` where options do not go together, or do not fit a row's cache positions behind its prompt."""
        if not self.active:
            for name in ("draft_tokens", "draft_schedule", *LATER):
                if name in self.given:
                    others = "or --draft-weights" if name in LATER else "--draft-weights or --prompt-lookup"
                    raise ValueError(f"{_flag(name)} needs --draft{'' if name in LATER else ','} {others}")
            return
        if self.drafts and self.prompt_lookup is not None:
            raise ValueError("--draft and --prompt-lookup are two ways to draft: leave one of them out")
        if self.prompt_lookup is not None and self.draft_tokens is not None:
            raise ValueError("--draft-tokens says how many a model drafts: --prompt-lookup N says it for the lookup")
        if self.prompt_lookup is not None and (named := [name for name in LATER if name in self.given]):
            raise ValueError(f"{_flag(named[0])} is for a model that drafts: leave it or --prompt-lookup out")
        if not preallocates:
            raise ValueError(f"{_flag(next(iter(self.given)))} needs --preallocate: ours is what is assisted here")
        if self.splits and self.tokens * self.branches >= positions:
            raise ValueError(
                f"{self.branches} branches of {self.tokens} tokens (--draft-branches, --draft-tokens) are more than "
                f"the target's cache of {positions} positions has room for"
            )
        name = "prompt_lookup" if self.prompt_lookup is not None else "draft_tokens"
        if name not in self.given:
            return  # the usual number shrinks to what fits
        if self.tokens >= positions:
            raise ValueError(
                f"{_flag(name)} {self.tokens} is a draft longer than the target's cache of {positions} positions"
            )
        if self.tokens >= positions - prompt_length:
            raise ValueError(
                f"{_flag(name)} {self.tokens} does not fit: a cache of {positions} positions with a prompt of "
                f"{prompt_length} has room to verify {positions - prompt_length - 1}"
            )

    def __str__(self) -> str:
        if not self.active:
            return "unassisted"
        if self.prompt_lookup is not None:
            head = f"prompt lookup {self.prompt_lookup}"
        else:
            head = f"draft {self.draft or 'of the same model'}"
            head += f" in {self.draft_weights}" if self.draft_weights is not None else ""
            head += f" on {self.draft_device}" if self.draft_device is not None else ""
            head += f" reading {self.draft_window or 'all'}" if self.draft_window is not None else ""
            # What adapts has had other limits where nobody gave one.
            head += " K" if self.draft_tokens is None and self._adapts else f" K {self.tokens}"
            if self.splits:
                head += f", {self.branches} branches above {DEFAULT_SPLIT if self.p_split is None else self.p_split:g},"
        return f"{head} {self.draft_schedule}"


NAMES = tuple(part.name for part in fields(Assistance))


def of_stored(kept: dict) -> Assistance:
    """The assistance of a stored point, or of a line of a task. `ValueError` or `TypeError` where it is none."""
    return Assistance(**{name: value for name, value in (kept.get("assisted") or {}).items() if name in NAMES})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
