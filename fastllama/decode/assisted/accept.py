"""Which proposed tokens stand: pure functions of ids, probabilities and uniform numbers.

Leviathan, Kalman, Matias 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318): a token x that the draft
drew from q stands with probability min(1, p(x) / q(x)); at the first that does not, the next is drawn from the
residual max(p - q, 0). What is written is then distributed as p.

Legend: B rows, K proposed tokens, Q = K + 1 verified positions, V vocabulary.
"""

from collections.abc import Sequence

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


def stands(chances: Sequence[float], uniforms: Sequence[float]) -> int | None:
    """Which of several siblings stands, None for none of them. `chances`: of each sibling the target's probability.

    They were not drawn: the draft's distribution of each is all at that token. So the first, x, stands with probability
    p(x) / 1; where it does not, the residual max(p - q, 0) is p without x, divided by 1 - p(x), and the next sibling is
    held to that (SpecInfer's multi-step speculative sampling, arXiv 2305.09781, for distributions of one point). Where
    none stands, `without` says what to draw from. A sibling y after x is thus written with probability
    (1 - p(x)) p(y) / (1 - p(x)) = p(y), and any other token with what is left of p: p, whatever the siblings are.
    """
    left = 1.0
    for place, (chance, uniform) in enumerate(zip(chances, uniforms, strict=True)):
        if uniform * left < chance:
            return place
        left -= chance
    return None


def without(target_BV: torch.Tensor, tokens: list[list[int]]) -> torch.Tensor:
    """p without these tokens of each row, not normalised; p itself where rounding leaves nothing of it."""
    rows = [row for row, some in enumerate(tokens) for _ in some]
    places_2N = torch.tensor([rows, [token for some in tokens for token in some]], dtype=torch.int64)
    left_BV = target_BV.index_put(tuple(places_2N.to(target_BV.device)), target_BV.new_zeros(()))
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
