"""Engine: prefill and steps on what is reserved, and how many positions are in use.

Legend: B batch, Q query tokens, P prompt tokens, E hidden size, V vocabulary.
"""

import itertools

import torch
from torch import nn

from fastllama.cache.budget import require
from fastllama.cache.rows import gather_positions
from fastllama.decode.binding import chooser, require_weights
from fastllama.decode.chunks import automatic_chunk
from fastllama.decode.context.choose import positions_needed, require_context
from fastllama.decode.prompt import Prompt, at_ends
from fastllama.decode.reservation import bytes_for, implicit_length, require_fit, same_but_longer, shape_for
from fastllama.decode.reserved import Reserved
from fastllama.decode.texts import Texts
from fastllama.model.capture import CapturedStep
from fastllama.model.config import FastConfig
from fastllama.model.forward import prefill_chunk, step
from fastllama.model.native_step import obstacle
from fastllama.model.tree import Branching


class Engine(Reserved):
    """The forward passes of the fast path, and where each row stands. Neither copied nor pickled with its model."""

    def __init__(self, default: FastConfig | None = None):
        super().__init__(default)
        self._rows = 0  # rows of the call in progress; the cache may have more
        self._used = 0  # positions in use by the longest row, known without asking the device
        self._written = 0  # positions that hold anything, taken back or not
        self._mask_is_stale = False  # open at positions that were taken back
        self.texts = Texts()

    def __deepcopy__(self, memo) -> "Engine":
        return Engine(self.default)

    def __reduce__(self):
        return Engine, (self.default,)

    # reservation

    def preallocate(self, model: nn.Module, batch_size: int, cache_length: int, config: FastConfig) -> int:
        """Reserves, compiles and warms up; returns the bytes reserved. Raises `ValueError` or `MemoryError` before."""
        shape = shape_for(model, batch_size, cache_length, config)
        nbytes = bytes_for(model, shape)
        held = self.cache.shape.nbytes if self.cache is not None else 0
        require(nbytes - held, shape.device, f"a cache of {batch_size} x {cache_length} positions")
        reason = obstacle(model, shape) if config.compile == "native" else None
        if reason is not None:
            raise ValueError(f"compile='native' cannot be honoured: {reason}")
        require_weights(model, config.weights)
        require_context(model, config)
        chooser(model, config, batch_size)  # may refuse
        try:
            self.free()
            self._reserve(model, shape, config)
            self.explicit = True
            if config.compile not in ("no", "native"):
                self._warm_up(model)
        except BaseException:
            self.free()
            raise
        return nbytes

    def _warm_up(self, model: nn.Module) -> None:
        """Runs a step at every bucket that would be captured, or where one graph serves all, at the first two and the
        last, so that no later call compiles or captures anything."""
        ids = torch.zeros(self.cache.shape.batch_size, 1, dtype=torch.int64, device=self.cache.shape.device)
        self._watch_addresses(model)
        with self.rotary.undisturbed():
            lengths = self._buckets.lengths()
            for length in lengths if isinstance(self._step, CapturedStep) else {*lengths[:2], lengths[-1]}:
                self.begin(self.cache.shape.batch_size)
                self.cache.set_valid_past(torch.full_like(self.cache.valid_past_index, length - 1))
                self._used = length - 1
                self.step(ids)
        self.begin(self.cache.shape.batch_size)

    def fit(self, model: nn.Module, batch_size: int, prompt_length: int, positions: int) -> None:
        """Makes sure that a call with `batch_size` rows of up to `positions` cached tokens fits.

        An explicit cache raises `ValueError` when it does not. An implicit one is made anew, with room for the prompt
        and the first of the new tokens: it can grow later.
        """
        held = self.cache.shape if self.cache is not None else None
        longest, fixed = model.config.max_position_embeddings, held.cache_length if self.explicit else None
        positions = positions_needed(self.config, fixed, longest, prompt_length, positions)
        if self.explicit:
            require_fit(held, shape_for(model, batch_size, positions, self.config), batch_size, positions)
            return
        wanted = shape_for(model, batch_size, implicit_length(prompt_length, positions), self.config)
        if held is None or held.cache_length < wanted.cache_length or not same_but_longer(held, wanted):
            try:
                self.cache = self.rotary = None
                self._reserve(model, wanted, self.config)
            except BaseException:  # half a reservation serves nobody
                self.free()
                raise

    # forward passes

    def begin(self, rows: int) -> None:
        """Forgets what the cache holds; the next call has `rows` rows."""
        self.texts.begin()
        self.cache.clear(max(self._used, self._written))
        self._rows, self._used, self._written = rows, 0, 0
        if self.context is not None:
            self.context.reset()
        self._set_valid_past(torch.zeros_like(self.cache.valid_past_index))

    def prefill(self, prompt: Prompt, chunk: int | None = None) -> torch.Tensor:
        """Logits [B, V] of each row's last prompt token; the cache then holds the prompt.

        `chunk` is the caller's own chunk length, in columns of the padded prompt.
        """
        device = self.rotary.device
        tokens_BP, lengths = prompt.tokens.to(device), prompt.lengths.to(device)
        batch, total = tokens_BP.shape[:2]
        size = chunk or self.config.prefill_chunk or automatic_chunk(batch, total, device.type)
        # Rows that idle cost what the others do.
        busy = 2 * batch >= self.cache.shape.batch_size and tokens_BP.dim() == 2
        natively = self.few(total) if busy and total <= size and self.context is None else None
        if natively is not None:
            return self._prefill_few(tokens_BP, lengths, natively)
        cos_BPD, sin_BPD = self.rotary.for_prompt(total, prompt.columns, prompt.width, chunk)
        last_BE, edges = None, [*range(0, total, size), total]
        self._written = max(prompt.longest, self._written)  # however far it comes
        if self.context is not None:
            self.context.start(prompt)
            if self.context.extends:
                edges = sorted({*edges, *range(0, total, self.context.w)})
                cos_BPD, sin_BPD = self.rotary.at(self.context.prompt_positions(self.cache.positions, total)[None])
        for past, end in itertools.pairwise(edges):
            part = slice(past, end)
            if self.context is not None:
                self.context.before_pass(self.cache, self.rotary, past)
            tokens = tokens_BP[:, part]
            hidden = self.weights.embed(tokens) if tokens.dim() == 2 else tokens.to(self.cache.shape.dtype)
            hidden = prefill_chunk(self.weights, self.cache, hidden, cos_BPD[:, part], sin_BPD[:, part], past)
            last_BE = at_ends(last_BE, hidden, lengths, past)
        self._hold_prompt(lengths, prompt.longest)
        return self.weights.lm_head(self.weights.norm(last_BE[:, None]))[:, 0]

    def _prefill_few(self, tokens_BP: torch.Tensor, lengths: torch.Tensor, size: int) -> torch.Tensor:
        """The same by native steps of `size` tokens a row: they read what is behind a row's end, which nothing uses."""
        batch, total = tokens_BP.shape
        tokens_RP, last_BV = self._with_idle(tokens_BP.to(torch.int64)), None
        self._written = max(total, self._written)  # however far it comes
        for past in range(0, total, size):
            logits_BQV = self._native(tokens_RP[:, past : past + size].contiguous())[:batch]
            last_BV = at_ends(last_BV, logits_BQV, lengths, past)
        self._hold_prompt(lengths, total)
        return last_BV

    def _hold_prompt(self, lengths: torch.Tensor, longest: int) -> None:
        valid = torch.zeros_like(self.cache.valid_past_index)
        valid[: len(lengths)] = lengths
        self._set_valid_past(valid)
        self._rows, self._used = len(lengths), longest

    def step(self, ids_BQ: torch.Tensor, branching: Branching | None = None) -> torch.Tensor:
        """Logits [B, Q, V] of the newest tokens, after storing them. `branching`: they are of a tree."""
        cache = self.cache
        ids_BQ = ids_BQ.to(self.rotary.device)
        rows, tokens = ids_BQ.shape
        used = self._used + tokens
        self._written = max(used, self._written)  # also where an interruption cuts it short
        ids_BQ = self._with_idle(ids_BQ)
        if branching is not None and len(ids_BQ) > rows:
            branching = branching.padded(len(ids_BQ) - rows)
        if self.context is not None:
            self.context.before_step(cache, self.rotary, self._used)
        if branching is None and self._native is not None and self._native.takes(*ids_BQ.shape):
            logits = self._native(ids_BQ.contiguous())
            self._used = used
            return logits[:rows]
        if self._mask_is_stale:  # C++ reads no mask
            self._set_valid_past(cache.valid_past_index)
        index_BQ = cache.valid_past_index[:, None] + self._offsets(tokens)
        # A tree is refused where the context is extended, as all assistance is.
        extended = self.context is not None and self.context.extends
        positions_BQ = index_BQ - self.context.offset_B[:, None] if extended else index_BQ
        cos_BQD, sin_BQD = self.rotary.at(positions_BQ if branching is None else branching.positions(positions_BQ))
        # Only single tokens were compiled: another count would be another graph.
        run, tree = (self._step, ()) if tokens == 1 and branching is None else (step, (branching,))
        logits = run(
            self.weights,
            cache.keys,
            cache.values,
            cache.mask_B11S,
            cache.valid_past_index,
            cache.rows_B1,
            self._buckets.covering(used),
            ids_BQ.contiguous(),
            index_BQ,
            cos_BQD,
            sin_BQD,
            *tree,
        )
        self._used = used
        return logits[:rows]

    def _with_idle(self, ids_BQ: torch.Tensor) -> torch.Tensor:
        """With a token 0 for the cache's rows that the call has not got: they write where nothing looks."""
        idle = self.cache.shape.batch_size - len(ids_BQ)
        return torch.cat((ids_BQ, ids_BQ.new_zeros(idle, ids_BQ.shape[1]))) if idle else ids_BQ

    def _offsets(self, tokens: int) -> torch.Tensor | int:
        return 0 if tokens == 1 else self.cache.positions[:tokens]

    def forget_text(self) -> None:
        """After a call that was cut short: there is nothing that a step could continue."""
        self._used = 0

    def require_rows(self, rows: int) -> None:
        """Raises `ValueError` unless a prefill with this many rows came before."""
        if self.cache is None or self._used == 0:
            raise ValueError("step() continues a prefill: call prefill() first")
        if rows != self._rows:
            raise ValueError(f"step() was given {rows} rows and the prefill had {self._rows}")

    def room(self) -> int:
        """Positions left for the longest row."""
        return self._capacity() - self._used

    def _capacity(self) -> int:
        length = self.cache.shape.cache_length
        return length if self.context is None else self.context.capacity(length, self.explicit)

    def moves_next(self) -> bool:
        """Whether the next token first moves what the cache holds, which cannot be undone."""
        return self.context is not None and self.context.is_due(self._used, self._capacity())

    def grow(self, model: nn.Module, tokens: int = 1) -> None:
        """Makes room for `tokens` more: by shifting the context, or by doubling an implicit cache."""
        shape, capacity = self.cache.shape, self._capacity()
        if self.context is not None and self.context.shifts_at(shape.cache_length, self.explicit):
            self._used = self.context.make_room(self.cache, self.rotary, self._used, capacity, tokens)
            self._mask_is_stale = False
            return
        if self.explicit:
            raise ValueError(
                f"the preallocated cache of {shape.cache_length} positions is full: preallocate more, or free() first"
            )
        grown = self.cache.grown(shape_for(model, shape.batch_size, 2 * shape.cache_length, self.config))
        try:
            self.cache = grown
            self._attach(model)
        except BaseException:  # half a reservation serves nobody
            self.free()
            raise

    def undo(self, tokens: int) -> None:
        """Takes the last `tokens` of every row back."""
        self._set_valid_past(self.cache.valid_past_index - tokens)
        self._used -= tokens

    def place(self, lengths: list[int]) -> None:
        """Moves the write position of each row of the call to `lengths`: how drafts accepted unevenly are undone.

        What lies beyond is written over. The cache must hold that many tokens of the row.
        """
        idle = [0] * (self.cache.shape.batch_size - len(lengths))
        if self.cache.shape.device.type == "cpu":  # a tensor made for it takes five times as long
            self.cache.valid_past_index.numpy()[:] = lengths + idle
        else:
            self.cache.valid_past_index.copy_(torch.tensor(lengths + idle))
        self._used, self._mask_is_stale = max(lengths), True

    def hold(self, rows: int, used: int, written: int) -> None:
        """Says what the cache holds where a caller fills its rows one by one: up to `used` positions are in use, and up
        to `written` hold anything."""
        self._rows, self._used, self._written = rows, used, max(written, self._written)

    def keep_branch(self, row: int, start: int, places: list[int]) -> None:
        """Moves a branch of a tree that began at `start` of the row to its beginning: what lies at start + places."""
        if places != list(range(len(places))):
            gather_positions(self.cache, row, [start + place for place in places], start)

    def _set_valid_past(self, valid_past_index: torch.Tensor) -> None:
        self.cache.set_valid_past(valid_past_index)
        self._mask_is_stale = False
