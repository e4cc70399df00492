"""Small weights row after row, and the product that a compiler turns into one kernel, which reads the small bytes.

Legend: x [..., K], R its rows, W [N, K], b [N], G numbers along K that share a scale, P N in whole tiles of 16.

int8    numbers int8 [N, K], scales float32 [N]
int4    bytes uint8 [P, K / 2], scales float16 [P, K / G]: the bytes of kernels/small_product.py, a row at a time
float8  as there: its rows are rows
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastllama.kernels.linear import NATIVE_ROWS, rows_of
from fastllama.kernels.small_product import TILE, by_blocks, dequantise, shapes
from fastllama.kernels.small_weights import WEIGHTS

_SIGN = 128  # as bits of a byte: turns its number + 128 into its number


def rows_of_tiles(
    quants: torch.Tensor, scales: torch.Tensor, format: str, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `quantise` made, row after row."""
    if format == "float8":
        return quants, scales
    bytes_PC = quants.permute(0, 2, 1, 3).reshape(quants.shape[0] * TILE, -1)
    if WEIGHTS[format].group is None:
        return (bytes_PC[:rows, :columns] ^ _SIGN).view(torch.int8), scales.flatten()[:rows].clone()
    return bytes_PC, scales.transpose(1, 2).flatten(0, 1)


def tiles_of_rows(
    numbers: torch.Tensor, scales: torch.Tensor, format: str, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse, bit for bit."""
    if format == "float8":
        return numbers, scales
    ((tiles, chunks, *_), _), _ = shapes(format, rows, columns)
    if WEIGHTS[format].group is None:
        missing = tiles * TILE - rows
        numbers = F.pad(numbers.view(torch.uint8) ^ _SIGN, (0, 4 * chunks - columns, 0, missing), value=_SIGN)
        scales = F.pad(scales, (0, missing)).view(tiles, 1, TILE)
    else:
        scales = scales.view(tiles, TILE, -1).transpose(1, 2).contiguous()
    return numbers.view(tiles, TILE, chunks, 4).permute(0, 2, 1, 3).contiguous(), scales


class Summed(NamedTuple):
    """A small weight row after row. Within a compiled step, up to `NATIVE_ROWS` rows of x are multiplied and summed in
    fp32 as the numbers are read, so that no wide weight is ever written; all else is `expanded`."""

    quants: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    format: str
    out_features: int
    in_features: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() or rows_of(x) > NATIVE_ROWS:
            return by_blocks(x, self.bias, self.out_features, self.in_features, self._widen(x.dtype))
        x_RK = x.reshape(-1, self.in_features).float()
        y_RN = (self._by_groups(x_RK) if WEIGHTS[self.format].bits == 4 else self._by_rows(x_RK)).to(x.dtype)
        y_RN = y_RN if self.bias is None else y_RN + self.bias
        return y_RN.view(*x.shape[:-1], self.out_features)

    def unpacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(quants, scales) as `quantise` made them."""
        return tiles_of_rows(self.quants, self.scales, self.format, self.out_features, self.in_features)

    def _by_rows(self, x_RK: torch.Tensor) -> torch.Tensor:
        return (x_RK[:, None] * self.quants.float()).sum(-1) * self.scales

    def _by_groups(self, x_RK: torch.Tensor) -> torch.Tensor:
        # Byte j of chunk c has columns 8 c + j and 8 c + 4 + j, the chunks of a group share a scale.
        groups = self.scales.shape[1]
        bytes_PGCB = self.quants.view(self.quants.shape[0], groups, -1, 4)
        x_R1GCHB = x_RK.view(x_RK.shape[0], 1, groups, -1, 2, 4)
        low = ((bytes_PGCB & 15).float() - 8) * x_R1GCHB[..., 0, :]
        high = ((bytes_PGCB >> 4).float() - 8) * x_R1GCHB[..., 1, :]
        return ((low + high) * self.scales[..., None, None].float()).sum((-3, -2, -1))[:, : self.out_features]

    def _widen(self, dtype: torch.dtype):
        def widen(start: int, count: int) -> torch.Tensor:
            last = -(-(start + count) // TILE) * TILE
            part = self.quants[start:last], self.scales[start:last]
            tiles = tiles_of_rows(*part, self.format, len(part[0]), self.in_features)
            return dequantise(*tiles, self.format, count, self.in_features, dtype)

        return widen


def summed(
    quants: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, format: str, rows: int, columns: int
) -> Summed:
    """The product of what `quantise` made."""
    return Summed(*rows_of_tiles(quants, scales, format, rows, columns), bias, format, rows, columns)
