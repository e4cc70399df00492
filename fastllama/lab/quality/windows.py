"""Windows: a text cut so that each of its tokens is predicted once, with at least half a window before it.

W window length, T tokens of a window
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from fastllama.demo.text import held_out_text
from fastllama.lab.points.workload import begin_ids, encoded, read_text

HELD_OUT = "the held-out text"


class Window(NamedTuple):
    """`ids` int64 [T], at most W + 1; those from `first` on are predicted, all but the last are read."""

    ids: torch.Tensor
    first: int

    @property
    def targets(self) -> torch.Tensor:
        """The ids that are predicted."""
        return self.ids[self.first :]


def cut(tokens: list[int], begin: list[int], length: int) -> list[Window]:
    """Windows of up to `length` tokens to read, each begun with `begin` ([] or one id).

    The first predicts all that it can; each later one moves on by half a window. `ValueError` where nothing is left
    to predict, or no window can move.
    """
    if length < 2:
        raise ValueError(f"a window of {length} tokens is too short: it needs 2")
    room = length + 1 - len(begin)
    windows = [Window(torch.tensor(begin + tokens[:room]), 1)]
    if len(windows[0].ids) < 2:
        raise ValueError(f"a text of {len(tokens)} tokens has none to predict")
    end = room
    while end < len(tokens):
        new = min(length // 2, len(tokens) - end)
        end += new
        ids = torch.tensor(begin + tokens[end - room : end])
        windows.append(Window(ids, len(ids) - new))
    return windows


@dataclass(frozen=True)
class Text:
    """What is scored: `sha256` (hex) is over the ids as little-endian int64."""

    name: str
    sha256: str
    tokens: int
    window: int
    windows: list[Window]

    @property
    def positions(self) -> int:
        """How many tokens are predicted."""
        return sum(len(window.targets) for window in self.windows)


def text(tokenizer, tokens: int | None = None, length: int = 1024, file: str | None = None) -> Text:
    """The first `tokens` tokens (None: all) of the held-out text, or of a UTF-8 file.

    `ValueError` or `FileNotFoundError`, one sentence, where there are not as many, or fewer than two.
    """
    name = HELD_OUT if file is None else f"the file {file}"
    found = encoded(tokenizer, held_out_text() if file is None else read_text(file, "file"))
    wanted = len(found) if tokens is None else tokens
    if len(found) < 2:
        raise ValueError(f"{name} has {len(found)} tokens, and a score needs at least 2")
    if not 2 <= wanted <= len(found):
        raise ValueError(f"{name} has {len(found)} tokens: a score takes 2 to as many, not {wanted}")
    taken = found[:wanted]
    sha256 = hashlib.sha256(torch.tensor(taken).numpy().astype("<i8").tobytes()).hexdigest()
    shown = HELD_OUT if file is None else Path(file).name
    return Text(shown, sha256, wanted, length, cut(taken, begin_ids(tokenizer), length))
