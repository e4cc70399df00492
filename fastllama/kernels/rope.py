"""Rotary position embedding, applied.

Legend: B batch, Q query tokens, H heads, D head dim.
"""

import torch


def rotate(x_BQHD: torch.Tensor, cos_BQD: torch.Tensor, sin_BQD: torch.Tensor) -> torch.Tensor:
    """Rotates each head by its position: x cos + rotate_half(x) sin (RoFormer, in GPT-NeoX's half-split form)."""
    first, second = x_BQHD.chunk(2, dim=-1)
    half_BQHD = torch.cat((-second, first), dim=-1)
    return x_BQHD * cos_BQD[:, :, None] + half_BQHD * sin_BQD[:, :, None]
