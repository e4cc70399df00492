"""Chooser: the next token of one text, and what ends it, as `generate` would have them.

Legend: T ids so far, V vocabulary.
"""

import torch
from transformers import StopStringCriteria

from fastllama.decode.sampling.options import Sampling
from fastllama.decode.sampling.processor import SamplingProcessor


def stops(tokenizer, strings: tuple[str, ...]) -> StopStringCriteria | None:
    """What ends a text behind one of the strings; None without any."""
    return StopStringCriteria(tokenizer=tokenizer, stop_strings=list(strings)) if strings else None


class Chooser:
    """Draws by `sampling` from torch's generator. `banned`: ids that are never taken."""

    def __init__(self, sampling: Sampling, banned: tuple[int, ...] = ()):
        self.sampling, self.banned = sampling, list(banned)
        acts = not sampling.is_greedy or sampling.penalises
        self.processor = SamplingProcessor(sampling) if acts else None

    def begin(self) -> None:
        """Another generation begins: mirostat starts anew."""
        if self.processor is not None:
            self.processor.reset()

    def take(self, ids_1T: torch.Tensor, logits_1V: torch.Tensor) -> int:
        """The token that follows ids [1, T], of logits [1, V]."""
        scores_1V = logits_1V.to(copy=True, dtype=torch.float32)
        if self.banned:
            scores_1V[:, self.banned] = float("-inf")
        if self.processor is not None:
            scores_1V = self.processor(ids_1T, scores_1V)
        if self.sampling.is_greedy:
            return int(scores_1V.argmax(-1))
        return int(torch.multinomial(scores_1V.softmax(-1), num_samples=1))
