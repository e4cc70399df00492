"""Candidates: scores in descending order, so that a filter is a prefix.

Legend: B rows, V vocabulary, N candidates in descending order: those that are out have the score -inf, and come last.
"""

import torch

RULED_OUT = float("-inf")


def _keys(logits_BV: torch.Tensor) -> torch.Tensor:
    """int64 [B, V], all different, in the order of the scores; of equal scores the first token's is the largest."""
    bits_BV = (logits_BV.float() + 0.0).view(torch.int32)  # + 0.0: the zeros are one
    ordered_BV = bits_BV ^ ((bits_BV >> 31) & 0x7FFFFFFF)
    size = logits_BV.shape[-1]
    return (ordered_BV.to(torch.int64) << 32) + torch.arange(size - 1, -1, -1, device=logits_BV.device)


def candidates(logits_BV: torch.Tensor, most: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores [B, N], ids [B, N]) in descending order, the `most` largest or all; of equal scores the first first.

    So which candidates a row has depends neither on its neighbours nor on how many were asked for.
    """
    if most is None or most >= logits_BV.shape[-1]:
        return torch.sort(logits_BV, dim=-1, descending=True, stable=True)
    index_BN = (_best_on_host if logits_BV.device.type == "cpu" else _best_by_key)(logits_BV, most)
    return logits_BV.gather(-1, index_BN), index_BN


def _best_by_key(logits_BV: torch.Tensor, most: int) -> torch.Tensor:
    return torch.topk(_keys(logits_BV), most, dim=-1).indices


def _best_on_host(logits_BV: torch.Tensor, most: int) -> torch.Tensor:
    # How many tie with the last can be asked here without waiting, and is less work than making keys.
    best_BN, index_BN = torch.topk(logits_BV, most, dim=-1)
    tied = int((logits_BV >= best_BN[:, -1:]).sum(-1).max())
    if tied > most:
        index_BN = torch.topk(logits_BV, tied, dim=-1).indices
    index_BN = index_BN.sort(-1).values
    order_BN = torch.sort(logits_BV.gather(-1, index_BN), dim=-1, descending=True, stable=True).indices
    return index_BN.gather(-1, order_BN)[:, :most]


def compacted(logits_BN: torch.Tensor, index_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where a filter took some from the middle: those that are out come last again."""
    logits_BN, order_BN = torch.sort(logits_BN, dim=-1, descending=True, stable=True)
    return logits_BN, index_BN.gather(-1, order_BN)


def scattered(logits_BN: torch.Tensor, index_BN: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Scores [B, V] in the order of ids; -inf for what is no candidate."""
    return logits_BN.new_full((logits_BN.shape[0], vocabulary), RULED_OUT).scatter_(1, index_BN, logits_BN)


def first(logits_BN: torch.Tensor, kept_B1: torch.Tensor) -> torch.Tensor:
    """The first `kept_B1` (int64 [B, 1]) of the candidates; the others are out."""
    rank_N = torch.arange(logits_BN.shape[-1], device=logits_BN.device)
    return logits_BN.masked_fill(rank_N >= kept_B1, RULED_OUT)
