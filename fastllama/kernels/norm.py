"""Root-mean-square norm (Zhang and Sennrich 2019), in the parent's order of operations."""

from typing import NamedTuple

import torch


class Norm(NamedTuple):
    """x / rms(x), computed in fp32, times `weight` [E] in x's dtype."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)
