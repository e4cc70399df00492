"""Attention over a prompt and over a cache.

Legend: B batch, Q query tokens, S cache positions, N query heads, K kv heads, G = N / K, D head dim.
"""

import torch
import torch.nn.functional as F


def attend_causal(
    query_BQND: torch.Tensor, key_BQKD: torch.Tensor, value_BQKD: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention among the tokens of one prompt, with no mask tensor at all. Returns [B, Q, N D]."""
    query, key, value = (x.transpose(1, 2) for x in (query_BQND, key_BQKD, value_BQKD))
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=query.shape[2] > 1, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).flatten(2)


def attend_cache(
    query_BQND: torch.Tensor,
    key_BKSD: torch.Tensor,
    value_BKSD: torch.Tensor,
    mask_B1QS: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of new tokens to a cache that already holds them; `mask_B1QS` is added to the scores.

    Returns [B, Q, N D].
    """
    query = query_BQND.transpose(1, 2)
    out = F.scaled_dot_product_attention(
        query,
        key_BKSD,
        value_BKSD,
        attn_mask=mask_B1QS,
        scale=scale,
        enable_gqa=query.shape[1] != key_BKSD.shape[1],
    )
    return out.transpose(1, 2).flatten(2)
