"""llama.cpp's filters: which candidates stay.

All take scores in descending order, those that are out (-inf) last, give the same with fewer left, and leave as many
as `min_keep_B` (default 1) says where there are as many. Values are numbers or tensors [B].

Legend: B rows, N candidates in descending order.
"""

import torch

from fastllama.kernels.sampling.candidates import RULED_OUT, first
from fastllama.kernels.sampling.penalties import column, like


def _whole(value_B, logits_BN: torch.Tensor) -> torch.Tensor:
    return column(value_B).to(logits_BN.device, torch.int64)


def _first_place(reached_BN: torch.Tensor) -> torch.Tensor:
    """int64 [B, 1]: the first place that holds, N where none does."""
    return (reached_BN.to(torch.int64).cumsum(-1) == 0).sum(-1, keepdim=True)


def _ranks(logits_BN: torch.Tensor) -> torch.Tensor:
    return torch.arange(logits_BN.shape[-1], device=logits_BN.device)


def _unless(off_B1: torch.Tensor, filtered_BN: torch.Tensor, logits_BN: torch.Tensor) -> torch.Tensor:
    return torch.where(off_B1, logits_BN, filtered_BN)


def top_k(logits_BN: torch.Tensor, k_B, min_keep_B=1) -> torch.Tensor:
    """The `k_B` best; all where it is 0 or negative."""
    k_B1 = _whole(k_B, logits_BN)
    kept_B1 = torch.maximum(k_B1, _whole(min_keep_B, logits_BN))
    return _unless(k_B1 <= 0, first(logits_BN, kept_B1), logits_BN)


def top_p(logits_BN: torch.Tensor, p_B, min_keep_B=1) -> torch.Tensor:
    """The fewest best with a probability of `p_B` or more together (Holtzman et al. 2019); all where it is >= 1."""
    p_B1 = like(p_B, logits_BN)
    reached_BN = logits_BN.softmax(-1).cumsum(-1) >= p_B1
    enough_BN = _ranks(logits_BN) + 1 >= _whole(min_keep_B, logits_BN)
    return _unless(p_B1 >= 1, first(logits_BN, _first_place(reached_BN & enough_BN) + 1), logits_BN)


def min_p(logits_BN: torch.Tensor, p_B, min_keep_B=1) -> torch.Tensor:
    """Those with at least the share `p_B` of the best one's probability; all where it is 0 or negative."""
    p_B1 = like(p_B, logits_BN)
    least_B1 = logits_BN[:, :1] + p_B1.clamp_min(0).log()
    out_BN = (logits_BN < least_B1) & (_ranks(logits_BN) >= _whole(min_keep_B, logits_BN))
    return _unless(p_B1 <= 0, logits_BN.masked_fill(out_BN, RULED_OUT), logits_BN)


def tfs(logits_BN: torch.Tensor, z_B, min_keep_B=1) -> torch.Tensor:
    """Tail-free sampling (Phenix): cuts where the curvature of the sorted probabilities has spent the share `z_B`.

    All stay where it is >= 1, and where there are two candidates or fewer.
    """
    z_B1 = like(z_B, logits_BN)
    size = logits_BN.shape[-1]
    if size <= 2:
        return logits_BN
    left_B1 = (logits_BN > RULED_OUT).sum(-1, keepdim=True)
    slope_BN = -logits_BN.softmax(-1).diff(dim=-1)
    bend_BN = slope_BN.diff(dim=-1).abs()
    # What is out has no slope of its own: the last two candidates have no bend.
    inside_BN = _ranks(bend_BN) < left_B1 - 2
    bend_BN = bend_BN * inside_BN
    sum_B1 = bend_BN.sum(-1, keepdim=True)
    even_BN = inside_BN / (left_B1 - 2).clamp_min(1)
    share_BN = torch.where(sum_B1 > 1e-6, bend_BN / sum_B1, even_BN.to(bend_BN.dtype))
    spent_BN = (share_BN.cumsum(-1) > z_B1) & inside_BN & (_ranks(bend_BN) >= _whole(min_keep_B, logits_BN))
    place_B1 = _first_place(spent_BN)
    kept_B1 = torch.where(spent_BN.any(-1, keepdim=True), place_B1, size)
    return _unless((z_B1 >= 1) | (left_B1 <= 2), first(logits_BN, kept_B1), logits_BN)


def typical(logits_BN: torch.Tensor, p_B, min_keep_B=1) -> torch.Tensor:
    """Those whose information is closest to the entropy, through the first sum of probabilities beyond `p_B`.

    (Meister et al. 2022.) All stay where it is >= 1; at 0 one does. May take some from the middle: `compacted` moves
    the others up.
    """
    p_B1 = like(p_B, logits_BN)
    logp_BN = logits_BN.log_softmax(-1)
    probability_BN = logp_BN.exp()
    entropy_B1 = -torch.where(probability_BN > 0, probability_BN * logp_BN, 0).sum(-1, keepdim=True)
    order_BN = torch.sort((-logp_BN - entropy_B1).abs(), dim=-1, stable=True).indices
    beyond_BN = probability_BN.gather(-1, order_BN).cumsum(-1) > p_B1
    enough_BN = _ranks(logits_BN) + 1 >= _whole(min_keep_B, logits_BN)
    out_BN = _ranks(logits_BN) > _first_place(beyond_BN & enough_BN)
    out_BN = torch.zeros_like(out_BN).scatter_(1, order_BN, out_BN)
    return _unless(p_B1 >= 1, logits_BN.masked_fill(out_BN, RULED_OUT), logits_BN)


def temperature(logits_BN: torch.Tensor, temperature_B) -> torch.Tensor:
    """Scores divided by the temperature; as they are where it is 0 or negative, where the best is taken."""
    temperature_B1 = like(temperature_B, logits_BN)
    return logits_BN / torch.where(temperature_B1 > 0, temperature_B1, 1)
