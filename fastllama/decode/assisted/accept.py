"""Which proposed tokens stand: pure functions of ids, probabilities and uniform numbers.

Leviathan, Kalman, Matias 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318): a token x that the draft
drew from q stands with probability min(1, p(x) / q(x)); at the first that does not, the next is drawn from the
residual max(p - q, 0). What is written is then distributed as p.

Legend: B rows, K proposed tokens, Q = K + 1 verified positions, V vocabulary.
"""

import torch


def matching(draft_BK: torch.Tensor, chosen_BQ: torch.Tensor) -> torch.Tensor:
    """How many proposed tokens [B] the target's own choices repeat, up to the first that differs."""
    return (draft_BK == chosen_BQ[:, : draft_BK.shape[1]]).to(torch.int64).cumprod(1).sum(1)


def draw(weights: torch.Tensor) -> torch.Tensor:
    """One id [...] from each distribution [..., V], which need not sum to 1. The host waits for nothing."""
    noise = torch.empty_like(weights).exponential_().clamp_min_(torch.finfo(weights.dtype).tiny)
    return (weights / noise).argmax(-1)


def residual(target_BV: torch.Tensor, draft_BV: torch.Tensor) -> torch.Tensor:
    """max(p - q, 0), not normalised; p itself where rounding leaves nothing of it."""
    left_BV = (target_BV - draft_BV).clamp_min(0.0)
    return torch.where(left_BV.sum(-1, keepdim=True) > 0, left_BV, target_BV)


def speculative(
    target_BQV: torch.Tensor, draft_BKV: torch.Tensor, draft_BK: torch.Tensor, uniform_BK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(how many proposed tokens stand [B], the token after them [B]).

    `target_BQV` and `draft_BKV` are probabilities, `uniform_BK` numbers in [0, 1); the last token is drawn from
    torch's own generator.
    """
    batch, tokens = draft_BK.shape
    rows = torch.arange(batch, device=draft_BK.device)
    p_BK = target_BQV[:, :tokens].gather(2, draft_BK[..., None])[..., 0]
    q_BK = draft_BKV.gather(2, draft_BK[..., None])[..., 0]
    counts_B = (uniform_BK * q_BK < p_BK).to(torch.int64).cumprod(1).sum(1)
    # After all K there is nothing to subtract.
    rejected_B11 = (counts_B < tokens).to(draft_BKV.dtype)[:, None]
    q_BV = draft_BKV[rows, counts_B.clamp_max(tokens - 1)] * rejected_B11
    return counts_B, draw(residual(target_BQV[rows, counts_B], q_BV))
