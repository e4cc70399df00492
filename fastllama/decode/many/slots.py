"""Slots: rows of the engine's cache that are filled, stepped and emptied one by one.

Between two calls every row of the cache holds the tokens below its write position; what lies beyond is nobody's. A step
writes one token to each row that it runs, idle ones too: theirs is beyond their write position, which is put back.

Legend: R rows, Q tokens of one pass, E hidden size, V vocabulary.
"""

import torch
from torch import nn

from fastllama.cache.float_cache import FloatCache
from fastllama.cache.rows import clear_row, copy_row, part_of
from fastllama.cache.small_cache import SmallCache
from fastllama.decode.engine import Engine
from fastllama.model.compiled import Buckets
from fastllama.model.forward import prefill_chunk, step
from fastllama.model.native_step import NativeStep


class Slots:
    """The first `count` rows of a cache that `engine.fit` has made, `shared` of whose positions all rows keep."""

    def __init__(self, model: nn.Module, engine: Engine, count: int):
        self.model, self.engine, self.count = model, engine, count
        self.shared = 0
        self.written = [0] * count  # positions of each row that hold anything
        # A graph is of one size. What is not compiled runs as few rows as there are.
        self.narrow = engine.config.compile in ("no", "native")
        engine.begin(count)
        self._attach()

    def _attach(self) -> None:
        shape = self.engine.cache.shape
        self.cache, self.device = self.engine.cache, shape.device
        self._buckets = Buckets(self.cache.positions, shape.cache_length, self.engine.config.bucket, marked=False)
        self._parts: dict[tuple[int, int], FloatCache | SmallCache] = {}
        self._native: dict[int, NativeStep] = {}
        self._idle: dict[tuple[int, tuple[int, ...]], tuple[torch.Tensor, torch.Tensor]] = {}

    def _part(self, first: int, count: int) -> FloatCache | SmallCache:
        key = (first, count)
        if key not in self._parts:
            self._parts[key] = part_of(self.cache, *key)
        return self._parts[key]

    def reserve(self, positions: int) -> None:
        """Makes an implicit cache longer where a row is about to need more."""
        while positions > self.cache.shape.cache_length:
            self.engine.grow(self.model)
            self._attach()

    # rows

    def share(self, ids: list[int], chunk: int) -> None:
        """Fills all rows with what every prompt begins with, computed once."""
        for past in range(0, len(ids), chunk):
            self._pass(0, [ids[past : past + chunk]], past)
        for slot in range(1, self.count):
            copy_row(self.cache, 0, slot, len(ids))
        self.shared = len(ids)
        self._part(0, self.count).set_valid_past(torch.full((self.count,), self.shared, device=self.device))
        self.written = [self.shared] * self.count

    def release(self, slot: int) -> None:
        """Empties a row, but for what is shared."""
        clear_row(self.cache, slot, self.shared, self.written[slot] + 1)
        self.written[slot] = self.shared
        self._place(slot, [self.shared])

    def move(self, source: int, target: int, filled: int) -> None:
        """Takes what a row holds to another one, which is empty, and empties it."""
        copy_row(self.cache, source, target, filled)
        self._wrote(target, filled)
        self._place(target, [filled])
        self.release(source)

    def _place(self, first: int, filled: list[int]) -> None:
        self._part(first, len(filled)).set_valid_past(torch.tensor(filled, device=self.device))

    def _wrote(self, slot: int, positions: int) -> None:
        self.written[slot] = max(self.written[slot], positions)

    # forward passes

    def prefill(self, first: int, tokens: list[list[int]], past: int, logits: bool) -> torch.Tensor | None:
        """Appends prompt tokens to rows first .. first + R - 1, each of which holds `past`.

        Returns logits [R, V] after each row's last token where `logits` says so.
        """
        hidden_RQE = self._pass(first, tokens, past)
        self._place(first, [past + len(row) for row in tokens])
        if not logits:
            return None
        ends = torch.tensor([len(row) - 1 for row in tokens], device=self.device)
        last_R1E = hidden_RQE[torch.arange(len(tokens), device=self.device), ends][:, None]
        weights = self.engine.weights
        return weights.lm_head(weights.norm(last_R1E))[:, 0]

    def _pass(self, first: int, tokens: list[list[int]], past: int) -> torch.Tensor:
        width = max(map(len, tokens))
        end = past + width
        self.reserve(end)
        for slot in range(first, first + len(tokens)):
            self._wrote(slot, end)
        self._note(end)
        ids_RQ = torch.tensor([row + [0] * (width - len(row)) for row in tokens], device=self.device)
        cos_1PD, sin_1PD = self.engine.rotary.for_prompt(end, None, end, None)
        weights = self.engine.weights
        hidden_RQE = weights.embed(ids_RQ)
        part = self._part(first, len(tokens))
        return prefill_chunk(weights, part, hidden_RQE, cos_1PD[:, past:], sin_1PD[:, past:], past)

    def step(self, newest: dict[int, int], filled: dict[int, int]) -> torch.Tensor:
        """Appends one token to each row of `newest`, which holds `filled` tokens; logits [R, V] in that order.

        Rows that are not named stay as they are.
        """
        longest = max(filled.values())
        self.reserve(longest + 1)
        rows = max(newest) + 1 if self.narrow else self.cache.shape.batch_size
        for slot, positions in filled.items():
            self._wrote(slot, positions + 1)
        self._note(longest)
        ids_R1 = torch.tensor([[newest.get(slot, 0)] for slot in range(rows)], device=self.device)
        logits_RV = (self._narrow_step(ids_R1, longest + 1) if self.narrow else self.engine.step(ids_R1))[:, -1]
        if len(newest) == rows:
            return logits_RV
        running = tuple(newest)
        if (rows, running) not in self._idle:
            self._idle = {(rows, running): self._idle_rows(rows, running)}
        idle_R, running_R = self._idle[rows, running]
        self.cache.valid_past_index[:rows].sub_(idle_R)
        return logits_RV[running_R]

    def _idle_rows(self, rows: int, running: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        idle = [int(slot not in running) for slot in range(rows)]
        return torch.tensor(idle, device=self.device), torch.tensor(running, device=self.device)

    def _narrow_step(self, ids_R1: torch.Tensor, used: int) -> torch.Tensor:
        rows, engine = len(ids_R1), self.engine
        part = self._part(0, rows)
        if engine.widest() is not None:
            if rows not in self._native:
                self._native[rows] = NativeStep(engine.weights, part, engine.rotary)
            return self._native[rows](ids_R1)
        index_R1 = part.valid_past_index[:, None].clone()
        cache = (part.keys, part.values, part.mask_B11S, part.valid_past_index, part.rows_B1)
        return step(engine.weights, *cache, self._buckets.covering(used), ids_R1, index_R1, *engine.rotary.at(index_R1))

    def _note(self, longest: int) -> None:
        """Tells the engine how far rows reach, and how far it has to clear."""
        self.engine.hold(self.count, longest, max(self.written) + 1)
