"""The formulations of a product with a small weight, by name, and what is timed to choose one of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from fastllama.kernels.small_packed import PackedSmall, pack_small
from fastllama.kernels.small_product import TILE, Expanded, Small, shapes
from fastllama.kernels.small_summed import Summed, summed

SmallProduct = Small | Expanded | PackedSmall | Summed
# Each takes (quants, scales, bias, format, rows, columns), the first two as `quantise` made them.
SMALL_KINDS: dict[str, Callable[..., SmallProduct]] = {
    "native": Small,
    "expanded": Expanded,
    "packed": pack_small,
    "summed": summed,
}
_SLICE = 2**26  # numbers of a weight that are timed


class Run:
    """How a step runs while its products are timed: as it is. Where steps are compiled, so is what is timed."""

    mode, compiles = "no", False

    def prepare(self, products: list[SmallProduct]) -> Callable[[torch.Tensor], list[torch.Tensor]]:
        """What calls each of the products with one x."""
        return lambda x: [product(x) for product in products]


class SmallWork(NamedTuple):
    """Products with (a part of) a weight [N, K]; copies of it are walked through in turn, so that no cache holds them.

    `rows` of x are multiplied, in `dtype`; the copies take `nbytes` or less.
    """

    format: str
    out_features: int
    in_features: int
    rows: int
    dtype: torch.dtype
    device: torch.device
    nbytes: int

    def x(self) -> torch.Tensor:
        return torch.randn(self.rows, 1, self.in_features, device=self.device).to(self.dtype)

    def products(self, kind: str) -> list[SmallProduct]:
        """The products of one formulation, each with a weight of its own."""
        return [SMALL_KINDS[kind](*self._weight(), None, *self._size()) for _ in range(self.copies)]

    @property
    def copies(self) -> int:
        one = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes(*self._size()))
        return max(1, self.nbytes // one)

    def _size(self) -> tuple[str, int, int]:
        most = max(1, _SLICE // self.in_features // TILE) * TILE
        return self.format, min(self.out_features, most), self.in_features

    def _weight(self) -> tuple[torch.Tensor, torch.Tensor]:
        # Any bytes are numbers of a format: a weight need not be quantised to be timed.
        (quants, kind), (scales, scale_dtype) = shapes(*self._size())
        made = torch.randint(0, 127, quants, dtype=torch.uint8, device=self.device).view(kind)
        return made, torch.rand(scales, device=self.device).to(scale_dtype)
