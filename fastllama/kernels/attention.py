"""Attention over a prompt and over a cache.

Legend: B batch, Q query tokens, S cache positions, N query heads, K kv heads, G = N / K, D head dim.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastllama.kernels.linear import NATIVE_DTYPES

NATIVE_HEAD_DIMS = (16, 32, 64, 96, 128)  # that native_code is built for


class PromptAttention(NamedTuple):
    """Which attention a prompt takes in its first pass, and in those that have a past: "native" or "stock"."""

    first: str
    later: str


def head_obstacle(dim: int) -> str | None:
    """Why the C++ cannot attend with heads of `dim` numbers; None when it can."""
    if dim in NATIVE_HEAD_DIMS:
        return None
    return f"head_dim is {dim} and not one of {', '.join(map(str, NATIVE_HEAD_DIMS))}"


def has_native_attention(dim: int, dtype: torch.dtype) -> bool:
    """Whether the C++, once it is built, attends for a model of such heads and numbers."""
    return head_obstacle(dim) is None and dtype in NATIVE_DTYPES


def attend_causal(
    query_BQND: torch.Tensor, key_BQKD: torch.Tensor, value_BQKD: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention among the tokens of one prompt, with no mask tensor at all. Returns [B, Q, N D]."""
    query, key, value = (x.transpose(1, 2) for x in (query_BQND, key_BQKD, value_BQKD))
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=query.shape[2] > 1, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).flatten(2)


def attend_prompt(
    query_BQND: torch.Tensor, key_BKSD: torch.Tensor, value_BKSD: torch.Tensor, past: int, scale: float
) -> torch.Tensor:
    """Causal attention of Q prompt tokens, in C++, to a cache that holds `past` tokens before them and then the prompt.

    Needs `native.load()` and a head dim of `NATIVE_HEAD_DIMS`. Returns [B, Q, N D].
    """
    return torch.ops.fastllama_native.attend_prompt(query_BQND, key_BKSD, value_BKSD, past, scale)


def attend_cache(
    query_BQND: torch.Tensor,
    key_BKSD: torch.Tensor,
    value_BKSD: torch.Tensor,
    mask_B1QS: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of new tokens to a cache that already holds them; `mask_B1QS` is added to the scores.

    The query heads of one kv head become rows of one product, so keys and values are never repeated.
    Returns [B, Q, N D].
    """
    batch, tokens, heads, dim = query_BQND.shape
    kv_heads = key_BKSD.shape[1]
    group = heads // kv_heads
    query_BKrD = query_BQND.view(batch, tokens, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
    query_BKrD = query_BKrD.reshape(batch, kv_heads, group * tokens, dim)
    mask_B1rS = mask_B1QS if tokens == 1 else mask_B1QS.repeat(1, 1, group, 1)
    out = F.scaled_dot_product_attention(query_BKrD, key_BKSD, value_BKSD, attn_mask=mask_B1rS, scale=scale)
    out = out.view(batch, kv_heads, group, tokens, dim).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, tokens, heads * dim)
