"""Chooser: the next token of one text, and what ends it, as `generate` would have them.

Legend: T ids so far, V vocabulary.
"""

import time
from collections.abc import Callable

import torch
from transformers import StopStringCriteria

from fastllama.decode.sampling.options import Sampling
from fastllama.decode.sampling.processor import SamplingProcessor
from fastllama.lab.measuring.contestant import synchronize


def stops(tokenizer, strings: tuple[str, ...]) -> StopStringCriteria | None:
    """What ends a text behind one of the strings; None without any."""
    return StopStringCriteria(tokenizer=tokenizer, stop_strings=list(strings)) if strings else None


class Chooser:
    """Draws by `sampling` from torch's generator. `banned`: ids that are never taken. `on_choice(seconds)` is told how
    long each choice took."""

    def __init__(
        self,
        sampling: Sampling,
        banned: tuple[int, ...] = (),
        on_choice: Callable[[float], None] = lambda seconds: None,
    ):
        self.sampling, self.banned, self.on_choice = sampling, list(banned), on_choice
        acts = not sampling.is_greedy or sampling.penalises
        self.processor = SamplingProcessor(sampling) if acts else None

    def begin(self) -> None:
        """Another generation begins: mirostat starts anew."""
        if self.processor is not None:
            self.processor.reset()

    def take(self, ids_1T: torch.Tensor, logits_1V: torch.Tensor) -> int:
        """The token that follows ids [1, T], of logits [1, V]."""
        synchronize(logits_1V.device)  # else the forward pass would be counted
        start = time.perf_counter()
        token = self._taken(ids_1T, logits_1V)
        self.on_choice(time.perf_counter() - start)
        return token

    def _taken(self, ids_1T: torch.Tensor, logits_1V: torch.Tensor) -> int:
        scores_1V = logits_1V.to(copy=True, dtype=torch.float32)
        if self.banned:
            scores_1V[:, self.banned] = float("-inf")
        if self.processor is not None:
            scores_1V = self.processor(ids_1T, scores_1V)
        if self.sampling.is_greedy:
            return int(scores_1V.argmax(-1))
        return int(torch.multinomial(scores_1V.softmax(-1), num_samples=1))
