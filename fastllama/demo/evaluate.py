"""Scores of a language model on held-out tokens."""

import math

import numpy as np
import torch
import torch.nn.functional as F

_WINDOW = 1024


def _windows(tokens: np.ndarray):
    """Ids [1, T] of consecutive windows that share one token, so each token but the first is predicted once."""
    for start in range(0, len(tokens) - 1, _WINDOW):
        yield torch.from_numpy(tokens[start : start + _WINDOW + 1].astype(np.int64))[None]


@torch.no_grad()
def perplexity(model, tokens: np.ndarray) -> float:
    """exp of the mean next-token loss over `tokens` [T], in windows of 1,024."""
    total, count = 0.0, 0
    for ids in _windows(tokens):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0].float()
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


@torch.no_grad()
def agreement(target, draft, tokens: np.ndarray) -> float:
    """Share of positions of `tokens` [T] at which both models' most likely next token is the same."""
    same, count = 0, 0
    for ids in _windows(tokens):
        first = [model(input_ids=ids[:, :-1], use_cache=False).logits[0].argmax(-1) for model in (target, draft)]
        same += (first[0] == first[1]).sum().item()
        count += ids.shape[1] - 1
    return same / count
