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


def turns(inv_freq_F: torch.Tensor, distance_S: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed sin [S, D] in fp32 that move rotated keys on by `distance_S` positions, F = D / 2 frequencies.

    Angles are taken in fp64: fp32 would lose those of a long distance. A number is a distance that all share (S = 1).
    """
    if isinstance(distance_S, int):
        angle_SF = inv_freq_F.double()[None] * distance_S
    else:
        angle_SF = distance_S.double()[:, None] * inv_freq_F.double()
    cos_SF, sin_SF = angle_SF.cos().float(), angle_SF.sin().float()
    return torch.cat((cos_SF, cos_SF), -1), torch.cat((-sin_SF, sin_SF), -1)


def turn(key_BKSD: torch.Tensor, cos_SD: torch.Tensor, signed_sin_SD: torch.Tensor) -> torch.Tensor:
    """Rotates keys that are rotated already. What a rope type multiplies them by stays, as it must, in the keys."""
    return key_BKSD * cos_SD + key_BKSD.roll(key_BKSD.shape[-1] // 2, -1) * signed_sin_SD
