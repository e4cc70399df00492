"""Mirostat (Basu et al. 2020), as llama.cpp has it: cuts candidates so that what is drawn surprises by tau bits.

mu is how surprising, in bits, a candidate may be; it starts at 2 tau.

Legend: B rows, V vocabulary, N candidates in descending order, those that are out (-inf) last.
"""

import math

import torch

from fastllama.kernels.sampling.candidates import RULED_OUT, first
from fastllama.kernels.sampling.penalties import column, like

_ZIPF_CANDIDATES = 100  # as many as the exponent is estimated from


def cut_1(logits_BN: torch.Tensor, mu_B: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Version 1: keeps as many as a Zipf law, fitted to the best, has within `mu_B` (float64 [B])."""
    best_BN = logits_BN[:, :_ZIPF_CANDIDATES].to(torch.float64)
    pairs = best_BN.shape[-1] - 1
    i_N = torch.arange(pairs, device=logits_BN.device, dtype=torch.float64)
    t_N = ((i_N + 2) / (i_N + 1)).log()
    inside_BN = best_BN[:, 1:] > RULED_OUT
    b_BN = torch.where(inside_BN, best_BN[:, :-1] - best_BN[:, 1:], 0)
    squares_B = (t_N.square() * inside_BN).sum(-1)
    s_B = (t_N * b_BN).sum(-1) / squares_B.clamp_min(torch.finfo(torch.float64).tiny)
    e_B = s_B - 1
    within_B = torch.exp2(mu_B)
    # (e 2^mu) / (1 - N^-e), which for e = 0 is 2^mu / ln N
    log_size = math.log(max(vocabulary, 2))
    share_B = torch.where(e_B == 0, 1 / log_size, e_B / -torch.expm1(-e_B * log_size))
    k_B = (share_B * within_B) ** (1 / s_B)
    k_B = torch.nan_to_num(k_B, nan=1.0, posinf=float(vocabulary)).clamp(1, vocabulary)
    return first(logits_BN, k_B.to(torch.int64)[:, None])


def cut_2(logits_BV: torch.Tensor, mu_B: torch.Tensor) -> torch.Tensor:
    """Version 2: keeps those that surprise by `mu_B` bits or less, and the best in any case; scores in any order."""
    surprise_BV = logits_BV.log_softmax(-1) / -math.log(2)
    best_B1 = logits_BV.argmax(-1, keepdim=True)
    out_BV = (surprise_BV > like(mu_B, logits_BV)).scatter(1, best_B1, False)
    return logits_BV.masked_fill(out_BV, RULED_OUT)


def updated(mu_B: torch.Tensor, logp_BV: torch.Tensor, drawn_B: torch.Tensor, tau_B, eta_B) -> torch.Tensor:
    """mu after `drawn_B` was drawn from what was left: less by eta for each bit of surprise beyond tau.

    `logp_BV`: logarithms of the probabilities of what was left. mu is as it was where a token came that was ruled out:
    padding behind a finished row, or somebody else's choice.
    """
    logp_B = logp_BV.gather(1, drawn_B[:, None])[:, 0].to(torch.float64)
    surprise_B = torch.where(logp_B > RULED_OUT, logp_B / -math.log(2), 0)
    new_B = mu_B - column(eta_B)[:, 0].to(mu_B) * (surprise_B - column(tau_B)[:, 0].to(mu_B))
    return torch.where(logp_B > RULED_OUT, new_B, mu_B)
