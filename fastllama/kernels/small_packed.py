"""Products with small weights by torch's own kernels, which want the numbers in an order of theirs.

torchao's weight-only int4 is a call of the int4 operator here; its int8 leaves the product to torch.compile, as
kernels/small_summed.py does. Both are in torch itself, so torchao is not needed. They are looked up at run time, and
tried on a small weight: what does not compute what it should is not used.

Legend: x [..., K], W [N, K], b [N], G numbers along K that share a scale, P N in whole tiles of 16, I inner tiles.

int8    numbers int8 [N, K], scales float32 [N]: aten._weight_int8pack_mm
int4    words int32 [P / 8, K / (16 I), 32, I / 2] of eight numbers each, scales bfloat16 [K / G, P, 2] with a zero
        point of 0 beside each: aten._weight_int4pack_mm, for a bfloat16 x. These scales have 8 bits where the format
        has 11: those are kept in the host's memory for the day the weight is asked for.
"""

import functools
from typing import NamedTuple

import torch

from fastllama.kernels.linear import rows_of
from fastllama.kernels.small_product import TILE, by_blocks, dequantise, quantise
from fastllama.kernels.small_summed import rows_of_tiles, tiles_of_rows
from fastllama.kernels.small_weights import WEIGHTS

_INT8, _INT4, _INT4_ORDER = "_weight_int8pack_mm", "_weight_int4pack_mm", "_convert_weight_to_int4pack"
# The kernels read the weight again for each row (int8) or for each 16 (int4); to widen it moves some 40 bytes a number.
_MANY = {8: 16, 4: 256}
_WORST = 2**-6  # of the largest result, in bfloat16


class PackedSmall(NamedTuple):
    """A small weight in the order of torch's kernel; for many rows it is widened block by block. `exact`: int4's scales
    as the format has them, in the host's memory."""

    quants: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    format: str
    out_features: int
    in_features: int
    exact: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        bits = WEIGHTS[self.format].bits
        if rows_of(x) > _MANY[bits]:
            return by_blocks(x, self.bias, self.out_features, self.in_features, self._widen(x.dtype))
        x_RK = x.reshape(-1, self.in_features).contiguous()
        if bits == 8:
            # A CPU's kernel wants scales of x's dtype; a GPU's takes them in fp32.
            scales = self.scales.to(x.dtype) if x.device.type == "cpu" else self.scales
            y_RN = torch.ops.aten._weight_int8pack_mm(x_RK, self.quants, scales)
        else:
            group = WEIGHTS[self.format].group
            y_RN = torch.ops.aten._weight_int4pack_mm(x_RK, self.quants, group, self.scales)[:, : self.out_features]
        y_RN = y_RN if self.bias is None else y_RN + self.bias
        return y_RN.reshape(*x.shape[:-1], self.out_features)

    def unpacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(quants, scales) as `quantise` made them, bit for bit."""
        if self.exact is None:
            return tiles_of_rows(self.quants, self.scales, self.format, self.out_features, self.in_features)
        bytes_PC = _bytes(_numbers(self.quants))
        scales = self.exact.to(bytes_PC.device)
        return tiles_of_rows(bytes_PC, scales, self.format, self.out_features, self.in_features)

    def _widen(self, dtype: torch.dtype):
        def widen(start: int, count: int) -> torch.Tensor:
            last = -(-(start + count) // TILE) * TILE
            if self.exact is None:
                return (self.quants[start : start + count].float() * self.scales[start : start + count, None]).to(dtype)
            numbers_PK = _numbers(self.quants[start // 8 : last // 8])[:count].float() - 8
            scales_PG = self.scales[:, start : start + count, 0].T.float()
            return (numbers_PK.unflatten(1, (scales_PG.shape[1], -1)) * scales_PG[..., None]).flatten(1).to(dtype)

        return widen


def pack_small(
    quants: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, format: str, rows: int, columns: int
) -> PackedSmall:
    """The product of what `quantise` made. Needs `packed_obstacle` to be None."""
    made, scales = rows_of_tiles(quants, scales, format, rows, columns)
    if WEIGHTS[format].bits == 8:
        return PackedSmall(made, scales, bias, format, rows, columns, None)
    inner = next(inner for inner in (8, 4, 2) if columns % (16 * inner) == 0)
    halves_PC2B = made.view(len(made), -1, 1, 4)
    numbers = torch.cat((halves_PC2B & 15, halves_PC2B >> 4), dim=2).view(len(made), -1, 2)
    words = torch.ops.aten._convert_weight_to_int4pack(numbers[..., 0] << 4 | numbers[..., 1], inner)
    rounded = scales.T.bfloat16()
    zeroed = torch.stack((rounded, torch.zeros_like(rounded)), dim=-1)
    return PackedSmall(words, zeroed, bias, format, rows, columns, scales.cpu())


def packed_obstacle(format: str, device: torch.device, dtype: torch.dtype, columns: int) -> str | None:
    """Why torch's kernel does not take a weight of K `columns` in this format, for x in `dtype`; None when it does."""
    if format == "float8":
        return "torch has no kernel for float8 weights beside floats"
    if WEIGHTS[format].bits == 4 and dtype != torch.bfloat16:
        return f"torch's kernel for int4 multiplies {torch.bfloat16}, and the model is in {dtype}"
    for name in (_INT8,) if WEIGHTS[format].bits == 8 else (_INT4, _INT4_ORDER):
        if not _has_kernel(name, device.type):
            return f"this torch has no {name} for {device.type}"
    return _tried(format, device, dtype, columns)


def _has_kernel(name: str, device: str) -> bool:
    try:
        return hasattr(torch.ops.aten, name) and torch._C._dispatch_has_kernel_for_dispatch_key(
            f"aten::{name}", device.upper()
        )
    except RuntimeError:  # a device that torch does not call so
        return False


@functools.cache
def _tried(format: str, device: torch.device, dtype: torch.dtype, columns: int) -> str | None:
    """The same, found by a small weight with as many columns: that the kernel is there does not say that it runs, nor
    that its order is the one that is known here."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, columns, generator=generator).to(device) for rows in (24, 3))
    held = quantise(weight, format)
    try:
        product = pack_small(*held, None, format, 24, columns)
        y, wide = product(x.to(dtype)).float(), product._widen(torch.float32)(0, 24)
        back = product.unpacked()
    except RuntimeError as fault:
        return f"torch's kernel does not run on this device: {str(fault).strip().splitlines()[0]}"
    exact = dequantise(*held, format, 24, columns, torch.float32)
    expected = x.to(dtype).float() @ exact.T
    if not all(torch.equal(one, other) for one, other in zip(back, held, strict=True)):
        return "torch keeps the numbers in an order that is not known here"
    if max(_apart(y, expected), _apart(wide, exact)) > _WORST:
        return "torch's kernel computes something else on this device"
    return None


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _numbers(words: torch.Tensor) -> torch.Tensor:
    """uint8 [P, K], each a number + 8, of words: lane t of 32 has row t / 4, and of 32 columns those at 8 j + 2 (t % 4)
    and behind it, for j in 0 .. 3: the first of each pair in the lower half of the word."""
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    eight = (words[..., None] >> shifts & 15).to(torch.uint8)
    blocks = eight.unflatten(2, (8, 4)).unflatten(-1, (2, 4))  # [P / 8, K / 16 I, row, t, I / 2, of the pair, j]
    return blocks.permute(0, 2, 1, 4, 6, 3, 5).reshape(words.shape[0] * 8, -1)


def _bytes(numbers_PK: torch.Tensor) -> torch.Tensor:
    """uint8 [P, K / 2] as kernels/small_summed.py has them."""
    halves = numbers_PK.view(len(numbers_PK), -1, 2, 4)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)
