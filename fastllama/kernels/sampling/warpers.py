"""transformers' filters, with a value for each row and its arithmetic to the bit.

They differ from llama.cpp's: of candidates that tie, all stay or go together where top-k draws its line; top-p sums
from the least likely up; typical keeps those that tie with the last one that it keeps. Ids are in their own order.

Legend: B rows, V vocabulary.
"""

import torch

from fastllama.kernels.sampling.candidates import RULED_OUT
from fastllama.kernels.sampling.penalties import column, like


def top_k(logits_BV: torch.Tensor, k_B, min_keep_B=1, most: int | None = None) -> torch.Tensor:
    """All not below the `k_B`th best; all where it is 0 or negative. `most`: the largest of them, where it is known."""
    size = logits_BV.shape[-1]
    k_B1 = torch.maximum(column(k_B), column(min_keep_B).to(column(k_B).device)).to(logits_BV.device, torch.int64)
    off_B1 = column(k_B).to(logits_BV.device) <= 0
    best_BK = torch.topk(logits_BV, min(most or size, size)).values
    place_B1 = (k_B1 - 1).clamp(max=best_BK.shape[-1] - 1).expand(logits_BV.shape[0], 1)
    out_BV = (logits_BV < best_BK.gather(-1, place_B1)) & ~off_B1
    return logits_BV.masked_fill(out_BV, RULED_OUT)


def top_p(logits_BV: torch.Tensor, p_B, min_keep_B=1) -> torch.Tensor:
    """Without the least likely whose probabilities are `1 - p_B` or less together; all where `p_B` is >= 1."""
    p_B1 = column(p_B).to(logits_BV.device)
    size = logits_BV.shape[-1]
    sorted_BV, order_BV = torch.sort(logits_BV, descending=False)
    # 1 - p in float64 first, as Python has it.
    out_BV = sorted_BV.softmax(-1).cumsum(-1) <= (1 - p_B1.to(torch.float64)).to(logits_BV.dtype)
    rank_V = torch.arange(size - 1, -1, -1, device=logits_BV.device)
    out_BV = out_BV & (rank_V >= column(min_keep_B).to(logits_BV.device)) & (p_B1 < 1)
    out_BV = torch.zeros_like(out_BV).scatter_(1, order_BV, out_BV)
    return logits_BV.masked_fill(out_BV, RULED_OUT)


def min_p(logits_BV: torch.Tensor, p_B, min_keep_B=1, most_kept: int = 1) -> torch.Tensor:
    """Those with at least the share `p_B` of the best one's probability. `most_kept`: the largest `min_keep_B`."""
    probability_BV = logits_BV.softmax(-1)
    least_B1 = like(p_B, logits_BV) * probability_BV.amax(-1, keepdim=True)
    out_BV = probability_BV < least_B1
    most_kept = min(most_kept, logits_BV.shape[-1])
    best_BK = torch.topk(probability_BV, most_kept).indices
    rank_K = torch.arange(most_kept, device=logits_BV.device)
    spared_BK = rank_K < column(min_keep_B).to(logits_BV.device)
    out_BV = out_BV.scatter(1, best_BK, out_BV.gather(1, best_BK) & ~spared_BK)
    return logits_BV.masked_fill(out_BV, RULED_OUT)


def typical(logits_BV: torch.Tensor, p_B, min_keep_B=1) -> torch.Tensor:
    """Those whose information is closest to the entropy, until `p_B` is reached; all where it is >= 1. `p_B` > 0."""
    p_B1 = like(p_B, logits_BV)
    logp_BV = torch.nn.functional.log_softmax(logits_BV, dim=-1)
    entropy_B1 = -(logp_BV * logp_BV.exp()).nansum(-1, keepdim=True)
    far_BV, order_BV = torch.sort(torch.abs((-logp_BV) - entropy_B1), descending=False)
    reached_BV = logits_BV.gather(-1, order_BV).softmax(-1).cumsum(-1)
    last_B1 = (reached_BV < p_B1).sum(-1, keepdim=True).clamp(max=logits_BV.shape[-1] - 1)
    rank_V = torch.arange(logits_BV.shape[-1], device=logits_BV.device)
    out_BV = (far_BV > far_BV.gather(1, last_B1)) & (rank_V >= column(min_keep_B).to(logits_BV.device)) & (p_B1 < 1)
    out_BV = torch.zeros_like(out_BV).scatter_(1, order_BV, out_BV)
    return logits_BV.masked_fill(out_BV, RULED_OUT)
