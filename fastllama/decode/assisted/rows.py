"""Rows: the text of each row on the host, while rows grow unevenly.

Legend: B rows, T columns of the padded text, K proposed tokens.
"""

import numpy as np
import torch
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from fastllama.decode.prompt import Prompt

_AHEAD = 256  # columns reserved at a time where no length is given


class Rows:
    """Prompts as they were padded, and behind them what was written; a finished row is padded on the right.

    `watching`: whether `add` finds the end of a row by itself.
    """

    def __init__(
        self, input_ids: torch.Tensor, prompt: Prompt, stopping_criteria, pad_id: torch.Tensor | None, watching: bool
    ):
        self.watching = watching
        batch, width = input_ids.shape
        self.criteria, self.limit = stopping_criteria, stopping_criteria.max_length
        self.width = width
        self.pad = 0 if pad_id is None else int(pad_id)
        self.ids = torch.full((batch, max(self.limit or width + _AHEAD, width + 1)), self.pad)
        self.ids[:, :width] = input_ids
        self._numbers = self.ids.numpy()  # the same memory: a write costs a tenth of torch's
        self.lengths = [width] * batch
        self.padding = [width - length for length in prompt.lengths.tolist()]
        self.unfinished = [True] * batch
        self.eos: set[int] = set()
        self.asked = False  # whether something beside a length and an end of text decides
        for criterion in stopping_criteria:
            if type(criterion) is EosTokenCriteria:
                self.eos.update(criterion.eos_token_id.reshape(-1).tolist())
            elif type(criterion) is not MaxLengthCriteria:
                self.asked = True
            elif (criterion.max_position_embeddings or criterion.max_length) < criterion.max_length:
                self.asked = True  # it warns once the text is longer than the model was made for

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def going(self) -> bool:
        """Whether any row is unfinished."""
        return any(self.unfinished)

    @property
    def new_tokens(self) -> int:
        """Tokens written to all rows."""
        return sum(self.lengths) - self.batch * self.width

    def real(self) -> list[int]:
        """Each row's tokens, padding left out."""
        return [length - padding for length, padding in zip(self.lengths, self.padding, strict=True)]

    def left(self) -> int | None:
        """Tokens that the unfinished row with the most to write may write; None where there is no limit."""
        if self.limit is None:
            return None
        return self.limit - min(length for length, going in zip(self.lengths, self.unfinished, strict=True) if going)

    def newest(self, count: int) -> torch.Tensor:
        """The last `count` tokens of each row [B, count]."""
        if self.batch == 1:
            return self.ids[:, self.lengths[0] - count : self.lengths[0]]
        columns_BT = np.add.outer(self.lengths, np.arange(-count, 0))
        return torch.from_numpy(np.take_along_axis(self._numbers, columns_BT, 1))

    def add(self, chosen: list[list[int]]) -> list[int]:
        """Appends to each unfinished row what was chosen, up to the end of the row; returns how many were appended."""
        before = list(self.lengths)
        for row, tokens in enumerate(chosen):
            if not self.unfinished[row]:
                continue
            start = self.lengths[row]
            if not self.watching:
                self._write(row, start, tokens)
                continue
            if self.limit is not None and start + len(tokens) >= self.limit:
                tokens = tokens[: max(self.limit - start, 1)]
                self.unfinished[row] = False
            for place, token in enumerate(tokens):
                if token in self.eos:
                    tokens = tokens[: place + 1]
                    self.unfinished[row] = False
                    break
            self._write(row, start, tokens)
        if self.asked and self.watching:
            self._ask(before)
        return [after - length for after, length in zip(self.lengths, before, strict=True)]

    def _write(self, row: int, start: int, tokens: list[int]) -> None:
        if start + len(tokens) > self.ids.shape[1]:
            more = self.ids.new_full((self.batch, self.ids.shape[1] + len(tokens)), self.pad)
            self.ids = torch.cat((self.ids, more), 1)
            self._numbers = self.ids.numpy()
        self._numbers[row, start : start + len(tokens)] = tokens
        self.lengths[row] = start + len(tokens)

    def _ask(self, before: list[int]) -> None:
        """Shows the criteria each new length once, in order, and cuts a row where they say that it is finished."""
        for length in range(min(before) + 1, max(self.lengths) + 1):
            here = [row for row in range(self.batch) if before[row] < length <= self.lengths[row]]
            if not here:
                continue
            done = self.criteria(self.ids[:, :length], None).tolist()
            for row in here:
                if done[row]:
                    self.ids[row, length : self.lengths[row]] = self.pad
                    self.lengths[row], self.unfinished[row] = length, False
