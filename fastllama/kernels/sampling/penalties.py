"""Penalties for what the text already has.

Legend: B rows, T ids so far, V vocabulary.
"""

import torch


def column(value_B) -> torch.Tensor:
    """A value for each row, or one for all, as [B, 1] or [1, 1]; float64 where it is no tensor."""
    value_B = value_B if isinstance(value_B, torch.Tensor) else torch.tensor(value_B, dtype=torch.float64)
    return value_B.reshape(-1, 1)


def like(value_B, logits_BV: torch.Tensor) -> torch.Tensor:
    """`column`, as the scores are; a number that their type does not hold is the nearest that it does."""
    range = torch.finfo(logits_BV.dtype)
    return column(value_B).to(torch.float64).clamp(range.min, range.max).to(logits_BV)


def window(real_BT: torch.Tensor, last_n_B) -> torch.Tensor:
    """bool [B, T]: the last `last_n_B` of each row's real tokens; all of them where it is negative, none where 0."""
    last_n_B1 = column(last_n_B).to(real_BT.device)
    behind_BT = real_BT.flip(1).cumsum(1).flip(1)  # real tokens from here on
    return real_BT & ((behind_BT <= last_n_B1) | (last_n_B1 < 0))


def counts(ids_BT: torch.Tensor, counted_BT: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """int64 [B, V]: how often each token is among the ids that are counted. Ids beyond the vocabulary are not."""
    ids_BT = torch.where(counted_BT, ids_BT, vocabulary).clamp(max=vocabulary)
    found_BV = torch.zeros(ids_BT.shape[0], vocabulary + 1, dtype=torch.int64, device=ids_BT.device)
    return found_BV.scatter_add_(1, ids_BT, counted_BT.to(torch.int64))[:, :vocabulary]


def repeat_penalty(logits_BV: torch.Tensor, counts_BV: torch.Tensor, penalty_B, zero_divides: bool) -> torch.Tensor:
    """Scores of tokens that occur, divided by the penalty, or multiplied where negative (Keskar et al. 2019).

    A score of zero, which stays zero, llama.cpp multiplies (`zero_divides` False) and transformers divides.
    """
    penalty_B1 = like(penalty_B, logits_BV)
    multiplied_BV = logits_BV < 0 if zero_divides else logits_BV <= 0
    penalised_BV = torch.where(multiplied_BV, logits_BV * penalty_B1, logits_BV / penalty_B1)
    return torch.where(counts_BV > 0, penalised_BV, logits_BV)


def occurrence_penalty(logits_BV: torch.Tensor, counts_BV: torch.Tensor, frequency_B, presence_B) -> torch.Tensor:
    """Scores less `frequency_B` for each time that a token occurs, and less `presence_B` if it does at all."""
    counts_BV = counts_BV.to(logits_BV.dtype)
    frequency_B1, presence_B1 = like(frequency_B, logits_BV), like(presence_B, logits_BV)
    return logits_BV - (counts_BV * frequency_B1 + (counts_BV > 0).to(logits_BV.dtype) * presence_B1)
