"""ContextShift: when a row is full, its older half goes (the rule of llama.cpp's main: n_keep, n_past, n_discard).

n_discard = (n_past - n_keep) // 2, and at least 1: positions n_keep .. n_keep + n_discard - 1 are dropped, later keys
move down and turn by -n_discard, values move as they are, and nothing is computed anew. Of what moved, the next shift
drops about all: hardly a key turns more than twice, so rounding does not pile up.
"""

from dataclasses import dataclass

from fastllama.cache.moving import move
from fastllama.decode.context.rows import Rows, runs
from fastllama.decode.prompt import Prompt
from fastllama.kernels.rope import turns


@dataclass(frozen=True)
class _Drop:
    """Positions keep .. keep + count - 1 of a row of `length` tokens, in `times` shifts."""

    keep: int
    count: int
    length: int
    times: int


class ContextShift:
    """`keep` as `FastConfig` has it; `begin_id` begins a text, and is kept too; an implicit cache grows to `longest`
    positions before it shifts."""

    offset_B = None  # a token's position is its place in the cache
    extends = False

    def __init__(self, keep: int, begin_id: int | None, longest: int):
        self.keep, self.begin_id, self.longest = keep, begin_id, longest
        self.reset()

    def reset(self) -> None:
        """Before a call."""
        self.rows = Rows()
        self.keeps: list[int] = []
        self.times: list[int] = []
        self.prompt_length = 0

    def start(self, prompt: Prompt) -> None:
        """Takes the prompt's lengths, and what each row keeps of it."""
        lengths = prompt.lengths.tolist()
        begins = [False] * len(lengths)
        if self.begin_id is not None and prompt.tokens.dim() == 2:
            begins = (prompt.tokens[:, 0] == self.begin_id).tolist()
        self.rows, self.times, self.prompt_length = Rows(lengths), [0] * len(lengths), prompt.longest
        self.keeps = [
            length if self.keep < 0 else min(self.keep + begin, length)
            for length, begin in zip(lengths, begins, strict=True)
        ]

    def capacity(self, cache_length: int, explicit: bool) -> int:
        """Positions that a row may fill."""
        return cache_length if explicit else min(cache_length, max(self.longest, self.prompt_length + 1))

    def shifts_at(self, cache_length: int, explicit: bool) -> bool:
        """Whether a full cache of that length shifts; an implicit one may grow first."""
        return explicit or cache_length >= max(self.longest, self.prompt_length + 1)

    def is_due(self, used: int, capacity: int) -> bool:
        """Whether one more token makes a row shift."""
        return used >= capacity

    def make_room(self, cache, rotary, used: int, capacity: int, tokens: int) -> int:
        """Shifts every row that `tokens` more do not fit into; returns the tokens of the row that is longest then.

        Raises `ValueError`, before anything moves, when they do not fit beside what a row keeps.
        """
        drops = [self._drop(row, length, capacity, tokens) for row, length in enumerate(self.rows.lengths(used))]
        valid_past_index = cache.valid_past_index.clone()
        valid_past_index[len(drops) :] = 0  # idle rows count on too
        for rows, drop in runs(drops):
            if drop.count == 0:
                continue
            source = drop.keep + drop.count
            turn = turns(rotary.module.inv_freq.to(cache.shape.device), -drop.count)
            move(cache, rows, source, drop.keep, drop.length - source, *turn)
            valid_past_index[rows] -= drop.count
        cache.set_valid_past(valid_past_index)
        lengths = [drop.length - drop.count for drop in drops]
        self.times = [times + drop.times for times, drop in zip(self.times, drops, strict=True)]
        self.rows = Rows(lengths)
        return max(lengths)

    def _drop(self, row: int, length: int, capacity: int, tokens: int) -> _Drop:
        keep, left, times = self.keeps[row], length, 0
        if keep + tokens > capacity:
            raise ValueError(
                f"{tokens} tokens at a time do not fit beside the {keep} that row {row} keeps in {capacity} positions: "
                "give fewer, or lower keep"
            )
        while left + tokens > capacity:
            left -= max((left - keep) // 2, 1)
            times += 1
        return _Drop(keep, length - left, length, times)

    def before_step(self, cache, rotary, used: int) -> None:
        """Nothing: room was made before."""

    before_pass = before_step

    @property
    def moved(self) -> bool:
        """Whether a row of this call has shifted."""
        return any(self.times)

    @property
    def words(self) -> str:
        """What happened, for people; rows shift as often as their length asks for."""
        if not self.moved:
            return "context not shifted"
        most, least = max(self.times), min(self.times)
        count = f"{most}" if most == least else f"{least} to {most}"
        return f"context shifted {count} {'time' if most == 1 else 'times'}"
