"""Products with a weight that is held in few bits: y = x W^T + b.

Legend: x [..., K], W [N, K], b [N], G numbers along K that share a scale, T = ceil(N / 16) tiles.

Sixteen rows lie side by side in a tile, on every device and in a checkpoint, as the C++ product reads them:

int8    quants uint8 [T, Kp / 4, 16, 4], scales float32 [T, 1, 16]. Lane r of tile t is row 16 t + r, byte j of chunk c
        is column 4 c + j, and a byte is its number + 128. Kp is K rounded up to 32.
int4    quants uint8 [T, K / 8, 16, 4], scales float16 [T, K / G, 16]. Byte j of chunk c holds column 8 c + j in its low
        nibble and column 8 c + 4 + j in its high one, each as its number + 8.
float8  quants float8_e4m3fn [N, K], scales float32 [N]. For GPUs; no tiles.

Padding stands for zeros, and rows of padding have the scale 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastllama.kernels import native
from fastllama.kernels.linear import NATIVE_DTYPES, NATIVE_ROWS, many_rows, rows_of, widens
from fastllama.kernels.small_weights import WEIGHTS, WeightFormat

TILE = 16  # rows of a tile
_COLUMNS = 32  # int8 rounds K up to this
EXPANDED_NUMBERS = 2**22  # of a weight, that are widened at a time
# Rows of x in bf16, for which torch has a product that overtakes sums of bytes; in fp32 and fp16 none does. Measured on
# 5632 x 2048 and 2048 x 11264, int8 and int4, the widening included: level at 96 to 128 rows, in fp32 ahead at 2048.
_BF16_ROWS = 96
# Likewise where there is a matrix unit, which multiplies small weights too: 0.62 to 0.77 of the time of torch's product
# at 128 rows, 0.81 to 1.09 at 256, 1.18 to 1.48 at 512.
_UNIT_ROWS = 256
# Likewise of x in any dtype and a weight in 4 bits, where sums are of 16-bit integers, beside fp32: 30 ms for 29 at 96
# rows, 40 for 35 at 128, 79 for 56 at 256. In 8 bits sums stay ahead up to 512 rows, 99 for 106 (5632 x 2048, AVX2).
_SHORTS_ROWS = 96
_NOT_FINITE = "it holds NaN or infinities"
_FLOAT8 = torch.float8_e4m3fn
_FLOAT8_MOST = torch.finfo(_FLOAT8).max


def check(format: str, columns: int, name: str) -> None:
    """Raises `ValueError` where `columns` (K) of the matrix `name` do not divide into the format's groups."""
    group = WEIGHTS[format].group
    if group is not None and columns % group:
        raise ValueError(f"weights={format!r} cannot be honoured: {name} has {columns} columns, no multiple of {group}")


def shapes(format: str, rows: int, columns: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """((shape, dtype) of the quants, (shape, dtype) of the scales) of a weight [N, K]."""
    kind, tiles = WEIGHTS[format], -(-rows // TILE)
    if format == "float8":
        return ((rows, columns), _FLOAT8), ((rows,), torch.float32)
    if kind.group is None:
        return ((tiles, _padded(columns) // 4, TILE, 4), torch.uint8), ((tiles, 1, TILE), torch.float32)
    return ((tiles, columns // 8, TILE, 4), torch.uint8), ((tiles, columns // kind.group, TILE), torch.float16)


def quantise(weight: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(quants, scales) of a float weight [N, K], on its device.

    int8 and float8: one symmetric scale a row. int4: a scale for G numbers, that of the group's number furthest from
    zero being -8, as gguf's q4_0. Raises `ValueError` for NaN, infinities, and what float16 scales cannot hold.
    """
    rows, columns = weight.shape
    check(format, columns, f"a matrix of {rows} rows")
    quants, scales = made = [
        torch.empty(shape, dtype=dtype, device=weight.device) for shape, dtype in shapes(format, rows, columns)
    ]
    if weight.dtype in NATIVE_DTYPES and native_obstacle(format, weight.device) is None:
        if not torch.ops.fastllama_native.quantise_small(weight.contiguous(), WEIGHTS[format].bits, *made):
            raise ValueError(_NOT_FINITE)
        _require_finite(made[1], weight)
        return quants, scales
    return _quantised_by_torch(weight, format, made)


def _quantised_by_torch(
    weight: torch.Tensor, format: str, made: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    step = _rows_at_once(columns)
    # Block by block: what is widened is never a second model.
    for start in range(0, rows, step):
        part = weight[start : start + step].float()
        if not torch.isfinite(part).all():
            raise ValueError(_NOT_FINITE)
        for whole, block in zip(made, _quantised(part, WEIGHTS[format]), strict=True):
            first = start if format == "float8" else start // TILE
            whole[first : first + block.shape[0]] = block
    quants, scales = made
    return quants, scales


def dequantise(
    quants: torch.Tensor, scales: torch.Tensor, format: str, rows: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weight [N, K] that is meant: number times scale in fp32, rounded to `dtype` once."""
    if format == "float8":
        return (quants.float() * scales[:, None]).to(dtype)
    tiles = quants.shape[0]
    if WEIGHTS[format].group is None:
        number = quants.permute(0, 2, 1, 3).reshape(tiles, TILE, -1).float() - 128
        wide = number * scales.transpose(1, 2)
    else:
        bytes_TRCB = quants.permute(0, 2, 1, 3)
        number = torch.stack((bytes_TRCB & 15, bytes_TRCB >> 4), dim=-2).reshape(tiles, TILE, scales.shape[1], -1)
        wide = (number.float() - 8) * scales.transpose(1, 2)[..., None].float()
    return wide.reshape(tiles * TILE, -1)[:rows, :columns].to(dtype)


def dequantise_rows(
    quants: torch.Tensor, scales: torch.Tensor, format: str, columns: int, ids: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Rows `ids` [...] of an int8 or float8 weight, as [..., K]: an embedding's lookup."""
    if format == "float8":
        return (F.embedding(ids, quants.view(torch.uint8)).view(_FLOAT8).float() * scales[ids][..., None]).to(dtype)
    tile, lane = ids // TILE, ids % TILE
    number = quants[tile, :, lane].flatten(-2)[..., :columns].float() - 128
    return (number * scales[tile, 0, lane][..., None]).to(dtype)


def native_obstacle(format: str, device: torch.device) -> str | None:
    """Why the C++ product does not take weights of this format on this device; None when it does."""
    if format == "float8":
        return "C++ has no product for float8"
    return native.load() if device.type == "cpu" else f"it is for CPUs, and the weights are on {device.type}"


class Expanded(NamedTuple):
    """A weight [N, K] in few bits, as `quantise` makes it, and torch's product with it in x's dtype."""

    quants: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    format: str
    out_features: int
    in_features: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return expanded(x, *self)


class Small(NamedTuple):
    """The same, int8 or int4 on a CPU, in C++. Needs `native_obstacle` to be None.

    x is taken in fixed point: of 16 bits with a scale for 32 columns, or, beside int8 in a matrix unit, of 24 with a
    scale a row. For more rows than that is faster for, the weight is expanded: in the unit, or for torch's product.
    """

    quants: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    format: str
    out_features: int
    in_features: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if expands(rows_of(x), x.dtype, self.format):
            # In a compiled step torch's own expansion is one block, which the compiler fuses.
            return expanded(x, *self) if torch.compiler.is_compiling() else _natively_expanded(x, *self)
        bits = WEIGHTS[self.format].bits
        return torch.ops.fastllama_native.linear_small(x, self.quants, self.scales, self.bias, bits, self.out_features)


def expands(rows: int, dtype: torch.dtype, format: str) -> bool:
    """Whether `Small` widens a block of a weight in `format` at a time, for so many rows of x in `dtype`."""
    if native.sums_products_of == "bytes":
        return dtype == torch.bfloat16 and rows > (_UNIT_ROWS if native.has_matrix_unit else _BF16_ROWS)
    if native.sums_products_of == "shorts":
        return WEIGHTS[format].bits == 4 and rows > _SHORTS_ROWS
    return rows > NATIVE_ROWS


def _natively_expanded(x, quants, scales, bias, format, rows, columns):
    bits = WEIGHTS[format].bits
    dtype = torch.float32 if widens(x.dtype) else x.dtype  # expanded to what the processor does multiply
    wide = x.to(dtype)
    out = x.new_empty((*x.shape[:-1], rows))
    step = _rows_at_once(columns)
    # In the same memory again and again: what is new would cost more to touch than to fill.
    block = torch.empty(min(step, rows), columns, dtype=dtype)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        weight = block[: part.stop - start]
        torch.ops.fastllama_native.expand_small(quants, scales, bits, start, weight)
        out[..., part] = many_rows(wide, weight, None if bias is None else bias[part].to(dtype))
    return out


def expanded(
    x: torch.Tensor,
    quants: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    rows: int,
    columns: int,
) -> torch.Tensor:
    """torch's product with the weight expanded to x's dtype, block by block but where the step is compiled."""

    def widen(start: int, count: int) -> torch.Tensor:
        first, last = (start, start + count) if format == "float8" else (start // TILE, -(-(start + count) // TILE))
        return dequantise(quants[first:last], scales[first:last], format, count, columns, x.dtype)

    return by_blocks(x, bias, rows, columns, widen)


def by_blocks(
    x: torch.Tensor, bias: torch.Tensor | None, rows: int, columns: int, widen: Callable[[int, int], torch.Tensor]
) -> torch.Tensor:
    """x W^T + b, where `widen(start, count)` makes rows of W [count, K] in x's dtype; `start` is a multiple of 16.

    Compiled it is one block: a compiler that fuses has no need of blocks.
    """
    if torch.compiler.is_compiling():
        return F.linear(x, widen(0, rows), bias)
    out = x.new_empty((*x.shape[:-1], rows))
    step = _rows_at_once(columns)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        out[..., part] = F.linear(x, widen(part.start, part.stop - part.start), None if bias is None else bias[part])
    return out


def _padded(columns: int) -> int:
    return -(-columns // _COLUMNS) * _COLUMNS


def _rows_at_once(columns: int) -> int:
    return max(1, EXPANDED_NUMBERS // columns // TILE) * TILE


def _quantised(part: torch.Tensor, format: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """(quants, scales) of fp32 rows [R, K]."""
    rows, columns = part.shape
    if format.name == "float8":
        scale = _row_scale(part, _FLOAT8_MOST)
        return _over(part, scale).clamp_(-_FLOAT8_MOST, _FLOAT8_MOST).to(_FLOAT8), scale[:, 0]
    if rows % TILE:
        part = F.pad(part, (0, 0, 0, TILE - rows % TILE))
    tiles = part.shape[0] // TILE
    if format.group is None:
        scale = _row_scale(part, 127)
        number = _over(part, scale).round_().clamp_(-127, 127).add_(128).to(torch.uint8)
        number = F.pad(number, (0, _padded(columns) - columns), value=128)
        return number.view(tiles, TILE, -1, 4).permute(0, 2, 1, 3), scale.view(tiles, 1, TILE)
    grouped = part.view(tiles, TILE, -1, format.group)
    furthest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    scale = (furthest / -8).half()
    _require_finite(scale, part)
    number = _over(grouped, scale.float()).add_(8.5).floor_().clamp_(0, 15).to(torch.uint8)
    number = number.view(tiles, TILE, -1, 2, 4)
    packed = number[..., 0, :] | number[..., 1, :] << 4
    return packed.permute(0, 2, 1, 3), scale.view(tiles, TILE, -1).transpose(1, 2)


def _require_finite(scales: torch.Tensor, weight: torch.Tensor) -> None:
    if not torch.isfinite(scales).all():
        raise ValueError(f"its largest number, {weight.abs().max():g}, is too large for int4's float16 scales")


def _row_scale(part: torch.Tensor, most: float) -> torch.Tensor:
    return part.abs().amax(-1, keepdim=True) / most


def _over(part: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """part / scale, and 0 where the scale is 0."""
    return torch.where(scale == 0, 0, part / scale)
