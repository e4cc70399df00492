"""The loop behind generate_many: newcomers are prefilled a chunk at a time between the steps of those that run."""

from collections import deque
from collections.abc import Callable

from fastllama.decode.many.chooser import Chooser
from fastllama.decode.many.row import Row
from fastllama.decode.many.slots import Slots

_FULL = 0.75  # of a pass over several newcomers, at least, is no padding


class Loop:
    """`done(row)` is told of each row as soon as it is finished. `chunk`: prompt tokens of one pass, over its rows."""

    def __init__(self, slots: Slots, rows: list[Row], chooser: Chooser, chunk: int, done: Callable[[Row], None]):
        self.slots, self.chooser, self.chunk, self.done = slots, chooser, chunk, done
        self.queue = deque(rows)
        self.free = set(range(slots.count))
        self.waiting: list[Row] = []  # to be prefilled, the first that came first
        self.running: list[Row] = []

    def run(self) -> None:
        """Until every row is finished."""
        while self.queue or self.waiting or self.running:
            self._admit()
            # A newcomer may keep the others waiting for a pass; many newcomers and few others, for more of them.
            for _ in range(max(len(self.waiting) // max(len(self.running), 1), 1)):
                if self.waiting:
                    self._prefill()
            if self.running:
                self._step()

    def _admit(self) -> None:
        while self.queue and self.free:
            row = self.queue.popleft()
            row.slot, row.filled = min(self.free), self.slots.shared
            self.free.remove(row.slot)
            self.waiting.append(row)
        if self.free and self.slots.narrow:
            self._close_up()

    def _close_up(self) -> None:
        """Nobody takes the free rows any more: the last ones move there, and steps become narrower."""
        rows = sorted((*self.running, *self.waiting), key=lambda row: -row.slot)
        for row in rows:
            target = min(self.free)
            if row.slot < target:
                break
            self.slots.move(row.slot, target, row.filled)
            self.free.remove(target)
            self.free.add(row.slot)
            row.slot = target
        self.running.sort(key=lambda row: row.slot)

    def _together(self) -> list[Row]:
        """The first newcomer, and those in the rows behind it with which one pass finishes them all."""
        first = self.waiting[0]
        rows, tokens = [first], first.missing
        by_slot = {row.slot: row for row in self.waiting}
        while (other := by_slot.get(rows[-1].slot + 1)) is not None and other.filled == first.filled:
            widest = max(other.missing, *(row.missing for row in rows))
            pass_tokens = widest * (len(rows) + 1)
            if pass_tokens > self.chunk or tokens + other.missing < _FULL * pass_tokens:
                break
            rows.append(other)
            tokens += other.missing
        return rows

    def _prefill(self) -> None:
        rows = self._together()
        past = rows[0].filled
        tokens = [row.ids[past : min(past + self.chunk, row.prompt_tokens)] for row in rows]
        whole = past + len(tokens[0]) == rows[0].prompt_tokens
        logits_RV = self.slots.prefill(rows[0].slot, tokens, past, whole)
        for row, part in zip(rows, tokens, strict=True):
            row.filled += len(part)
        if whole:
            self.waiting = [row for row in self.waiting if row not in rows]
            self.running = sorted((*self.running, *rows), key=lambda row: row.slot)
            self._take(rows, logits_RV)

    def _step(self) -> None:
        rows = list(self.running)
        newest = {row.slot: row.ids[-1] for row in rows}
        logits_RV = self.slots.step(newest, {row.slot: row.filled for row in rows})
        for row in rows:
            row.filled += 1
        self._take(rows, logits_RV)

    def _take(self, rows: list[Row], logits_RV) -> None:
        for row, token in zip(rows, self.chooser(rows, logits_RV), strict=True):
            row.add(token, self.chooser.home)
        for row in rows:
            if row.finish is not None:
                self.running.remove(row)
                self.slots.release(row.slot)
                self.free.add(row.slot)
                self.done(row)
