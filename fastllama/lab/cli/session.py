"""Session: one text that is kept in the cache while turns are added to it.

Legend: T ids so far, V vocabulary.
"""

from collections.abc import Callable

import torch

from fastllama.decode.context.choose import shifts
from fastllama.lab.cli.chooser import Chooser
from fastllama.model.config import FastConfig

_PASS = 256  # tokens of a turn that one step takes: its logits are of all of them


class Session:
    """`ids` is what was said, of which the first `cached` tokens are in the model's cache; nothing is computed twice.

    The model is one that `preallocate` reserved `cache_length` positions for, with `config`. `stops`, a criterion of
    transformers, ends an answer behind the token that it was shown last.
    """

    def __init__(
        self, model, chooser: Chooser, eos: tuple[int, ...], cache_length: int, config: FastConfig, stops=None
    ):
        self.model, self.chooser, self.eos, self.stops = model, chooser, eos, stops
        self.cache_length, self.config = cache_length, config
        self.ids: list[int] = []
        self.cached = 0
        self._begun = 0  # tokens of the first turn
        self._held = torch.empty(1, 1024, dtype=torch.int64, device=model.device)

    @property
    def shifts(self) -> bool:
        """Whether a full cache goes on."""
        return shifts(self.config)

    def answer(
        self, turn: list[int], limit: int | None, on_token: Callable[[int], None], stopped: Callable[[], bool]
    ) -> str:
        """Adds a turn and then an answer of up to `limit` tokens, each told to `on_token`.

        Returns why it ended: "stop" (an end of text, which is not kept, or `stops`), "length", "full" (the cache), or
        "interrupted". Raises `ValueError`, and keeps what was said before, where the turn does not fit the cache.
        """
        self._require_room(len(turn))
        self._add(turn)
        self.chooser.begin()
        logits_1V = self._feed(stopped)
        if logits_1V is None:
            return "interrupted"
        made = 0
        while True:
            token = self.chooser.take(self._held[:, : len(self.ids)], logits_1V)
            if token in self.eos:
                return "stop"
            self._add([token])
            made += 1
            on_token(token)
            if self.stops is not None and bool(self.stops(self._held[:, : len(self.ids)], None)):
                return "stop"
            if made == limit:
                return "length"
            if stopped():
                return "interrupted"
            if self.cached == self.cache_length and not self.shifts:
                return "full"
            logits_1V = self._feed(stopped)

    def _require_room(self, tokens: int) -> None:
        waiting = len(self.ids) - self.cached + tokens
        if self.shifts and self.cached:
            return
        left = self.cache_length - self.cached - (1 if self.shifts else 0)
        if waiting > left:
            raise ValueError(
                f"the cache of {self.cache_length} positions is full: {self.cached} are in use and this turn needs "
                f"{waiting}; begin anew with a larger --cache-length, or with --context-shift"
            )

    def _add(self, ids: list[int]) -> None:
        end = len(self.ids) + len(ids)
        if end > self._held.shape[1]:
            held = self._held.new_empty(1, 2 * end)
            held[:, : len(self.ids)] = self._held[:, : len(self.ids)]
            self._held = held
        self._held[0, len(self.ids) : end] = torch.tensor(ids, dtype=torch.int64)
        self.ids += ids

    def _feed(self, stopped: Callable[[], bool]) -> torch.Tensor | None:
        """The logits [1, V] behind all that was said; None where it was interrupted, and can go on later."""
        if self.cached == 0:
            self._begun = len(self.ids)
            logits_1V = self.model.prefill(self._held[:, : len(self.ids)])
            self.cached = len(self.ids)
            return logits_1V
        logits_1V = None
        while self.cached < len(self.ids):
            if len(self.ids) - self.cached > 1 and stopped():
                return None
            end = min(self.cached + self._pass(), len(self.ids))
            logits_1V = self.model.step(self._held[:, self.cached : end])[:, -1]
            self.cached = end
        return logits_1V

    def _pass(self) -> int:
        """Tokens of the next step."""
        if self.config.grp_attn_n > 1:  # windows shrink between steps
            return min(_PASS, self.config.grp_attn_w - self.cached % self.config.grp_attn_w)
        if not self.shifts:
            return _PASS
        keep = self._begun if self.config.keep < 0 else min(self.config.keep + 1, self._begun)
        return max(min(_PASS, self.cache_length - keep), 1)
