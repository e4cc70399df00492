"""What a cache of any format takes, by arithmetic alone: before there is a model, and for formats of either side.

Legend: K kv heads, D head dim.
"""

import torch

from fastllama.cache.budget import CacheShape
from fastllama.kernels.blocks import BLOCK, FORMATS

# From the most exact to the smallest. iq4_nl takes the bytes of q4_0: it is for those who ask for it.
BY_QUALITY = (None, "f16", "q8_0", "int8", "q5_1", "q5_0", "q4_1", "q4_0")
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def row_bytes(format: str | None, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one head and token; `format` None is the model's `dtype`. `ValueError` where blocks do not fit."""
    if format is None:
        return head_dim * dtype.itemsize
    found = FORMATS[format]
    if found.is_float:
        return head_dim * found.bits // 8
    if format == "int8":  # its scale is in the model's dtype
        return head_dim + dtype.itemsize
    if head_dim % BLOCK:
        raise ValueError(f"a cache of {format} needs a head_dim that is a multiple of {BLOCK}, not {head_dim}")
    return found.row_bytes(head_dim)


def position_bytes(shape: CacheShape, cache_k: str | None, cache_v: str | None) -> int:
    """Bytes of one row's keys and values at one position, all layers."""
    sides = row_bytes(cache_k, shape.head_dim, shape.dtype) + row_bytes(cache_v, shape.head_dim, shape.dtype)
    return shape.num_layers * shape.num_kv_heads * sides


def cache_bytes(shape: CacheShape, cache_k: str | None, cache_v: str | None) -> int:
    """Bytes of keys, values, mask and write positions; `shape` says all but the formats."""
    a_position = position_bytes(shape, cache_k, cache_v) + shape.dtype.itemsize  # one mask entry
    return shape.batch_size * (shape.reserved_length * a_position + 8)


def choices(cache_k: str | None, cache_v: str | None, head_dim: int, dtype: torch.dtype) -> list[tuple]:
    """(cache_k, cache_v) from the most exact to the smallest; a side that is given stays as it is.

    Formats whose blocks do not fit the head dim, or that take no less than the model's dtype, are no choice.
    """
    full, made = row_bytes(None, head_dim, dtype), []
    for format in BY_QUALITY:
        if format not in (None, "int8") and not FORMATS[format].is_float and head_dim % BLOCK:
            continue
        if format is not None and row_bytes(format, head_dim, dtype) >= full:
            continue
        pair = (format if cache_k is None else cache_k, format if cache_v is None else cache_v)
        if pair not in made:
            made.append(pair)
    return made


def best_fitting(shape: CacheShape, cache_k: str | None, cache_v: str | None, budget: int) -> tuple:
    """(cache_k, cache_v): the most exact formats whose cache of `shape` takes at most `budget` bytes.

    A side that is given is honoured. Raises `MemoryError` with what the smallest needs where none fits.
    """
    pairs = choices(cache_k, cache_v, shape.head_dim, shape.dtype)
    for pair in pairs:
        if cache_bytes(shape, *pair) <= budget:
            return pair
    smallest = min(pairs, key=lambda pair: cache_bytes(shape, *pair))
    raise MemoryError(
        f"a cache of {shape.batch_size} x {shape.cache_length} positions takes "
        f"{cache_bytes(shape, *smallest) / 1e9:.2f} GB at the least ({words(smallest, shape.dtype)}), and "
        f"{max(budget, 0) / 1e9:.2f} GB are left for it: lower cache_length or batch_size"
    )


def words(pair: tuple, dtype: torch.dtype) -> str:
    """Two formats for people."""
    own = str(dtype).removeprefix("torch.")
    key, value = (own if format is None else format for format in pair)
    return f"keys and values {key}" if key == value else f"keys {key}, values {value}"
