"""Rotary position embedding, applied.

Legend: B batch, Q query tokens, H heads, D head dim.
"""

import torch


def signed_sin(sin: torch.Tensor) -> torch.Tensor:
    """Sine [..., D] with its first half negated: what `rotate` wants, so that no step negates or concatenates."""
    half = sin.shape[-1] // 2
    return torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)


def rotate(x_BQHD: torch.Tensor, cos_BQD: torch.Tensor, signed_sin_BQD: torch.Tensor) -> torch.Tensor:
    """Rotates each head by its position (RoFormer, in GPT-NeoX's half-split form), without concatenation.

    rotate_half(x) sin equals roll(x, D / 2) signed_sin, product by product, so the result is the same bit for bit.
    """
    half_BQHD = x_BQHD.roll(x_BQHD.shape[-1] // 2, -1)
    return x_BQHD * cos_BQD[:, :, None] + half_BQHD * signed_sin_BQD[:, :, None]
