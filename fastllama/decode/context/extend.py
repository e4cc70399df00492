"""SelfExtend: tokens of all windows but the newest share positions (the rule of llama.cpp's main: ga_n, ga_w, ga_i).

With N tokens cached and g = N // w whole windows, token i is at position i // n where i < g w, and at
i - g (w - w / n) beyond: a window that is whole shrinks to w / n positions, and all that follows moves down. llama.cpp
looks before each batch of n_batch tokens; here a prompt runs in passes that end with windows, which is n_batch = w: so
no text sees a position that depends on how it was cut, and none is above what a text of this length must have.

Legend: B batch, S cache positions.
"""

import torch

from fastllama.cache.moving import move
from fastllama.decode.context.rows import Rows, runs
from fastllama.decode.prompt import Prompt
from fastllama.kernels.rope import turns


class SelfExtend:
    """`offset_B`, int64 [B] on the cache's device: how far below its place in the cache a row's next token stands."""

    extends = True

    def __init__(self, n: int, w: int, batch_size: int, device: torch.device):
        self.n, self.w, self.shrunk = n, w, w - w // n
        self.offset_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.reset()

    def reset(self) -> None:
        """Before a call."""
        self.rows = Rows()
        self.windows: list[int] = []
        self.offset_B.zero_()

    def start(self, prompt: Prompt) -> None:
        """Takes the prompt's lengths."""
        lengths = prompt.lengths.tolist()
        self.rows, self.windows = Rows(lengths), [0] * len(lengths)
        self.offset_B.zero_()
        self.prompt_length = prompt.longest

    def capacity(self, cache_length: int, explicit: bool) -> int:
        """Positions that a row may fill: a text must fit its cache."""
        return cache_length

    def shifts_at(self, cache_length: int, explicit: bool) -> bool:
        """False: nothing is dropped."""
        return False

    def is_due(self, used: int, capacity: int) -> bool:
        """Whether one more token first makes a window shrink."""
        lengths = self.rows.lengths(used)
        return any(length // self.w > windows for length, windows in zip(lengths, self.windows, strict=True))

    def prompt_positions(self, positions_S: torch.Tensor, total: int) -> torch.Tensor:
        """Where the prompt's tokens 0 .. total - 1 stand when they are computed."""
        index_S = positions_S[:total]
        return index_S - index_S // self.w * self.shrunk

    def before_pass(self, cache, rotary, past: int) -> None:
        """Before the prompt's tokens from `past` on: windows that are whole by then shrink."""
        self._shrink(cache, rotary, [min(length, past) for length in self.rows.lengths(self.prompt_length)])

    def before_step(self, cache, rotary, used: int) -> None:
        """Before the tokens that follow `used`: windows that are whole shrink."""
        if self.is_due(used, 0):
            self._shrink(cache, rotary, self.rows.lengths(used))

    def _shrink(self, cache, rotary, lengths: list[int]) -> None:
        found = [(old, length // self.w, length) for old, length in zip(self.windows, lengths, strict=True)]
        for rows, (old, new, length) in runs(found):
            if new <= old:
                continue
            index_S = cache.positions[old * self.w : length]
            target_S = torch.where(index_S < new * self.w, index_S // self.n, index_S - new * self.shrunk)
            turn = turns(rotary.module.inv_freq.to(index_S.device), target_S - (index_S - old * self.shrunk))
            move(cache, rows, old * self.w, old * self.w, len(index_S), *turn)
            self.offset_B[rows] = new * self.shrunk
        self.windows = [max(old, new) for old, new, _ in found]

    moved = False  # nothing is dropped

    @property
    def words(self) -> str:
        """What happened, for people."""
        most = max(self.windows, default=0)
        done = f"{most} {'window' if most == 1 else 'windows'} shrunk" if most else "no window filled"
        return f"self-extend {self.n} x {self.w}, {done}"
