"""SmallCache: preallocated keys and values in formats of their own, with fewer bits than the model's numbers.

What is attended is what is stored: the newest tokens too are read back as they were stored.

Legend: B batch, Q query tokens, S cache positions, N query heads, K kv heads, D head dim.
"""

from typing import NamedTuple

import torch

from fastllama.cache.budget import CacheShape, require
from fastllama.cache.float_cache import FloatCache
from fastllama.kernels.stored import expand, part_sizes
from fastllama.kernels.stored_attention import attend_stored, native_obstacle, store


class Parts(NamedTuple):
    """A layer's keys, or its values: the parts [B, K, S, n] of `format` (`kernels.stored`)."""

    format: str
    parts: tuple[torch.Tensor, ...]
    native: bool  # whether C++ reads and writes it

    def write(self, new_BQKD: torch.Tensor, index_BQ: torch.Tensor) -> None:
        """Stores each row's new tokens at that row's own positions."""
        store(new_BQKD, self.parts, self.format, index_BQ, self.native)

    def floats(self, rows: int, used: int, dtype: torch.dtype) -> torch.Tensor:
        """What the first `used` positions of the first rows stand for [rows, K, used, D]."""
        return expand([part[:rows, :, :used] for part in self.parts], self.format, dtype)


class Side(NamedTuple):
    """Keys, or values, of every layer."""

    format: str
    layers: list[tuple[torch.Tensor, ...]]
    native: bool

    def layer(self, index: int) -> Parts:
        """Those of one layer."""
        return Parts(self.format, self.layers[index], self.native)


def attend(
    keys: Parts, values: Parts, query_BQND: torch.Tensor, seen_BQ: torch.Tensor, used: int, scale: float
) -> torch.Tensor:
    """Attention of new tokens, already stored, to the first `seen_BQ` of `used` positions. Returns [B, Q, N D]."""
    parts = (keys.parts, keys.format, values.parts, values.format)
    return attend_stored(query_BQND, *parts, seen_BQ, used, scale, keys.native)


class SmallCache:
    """Storage for `shape.cache_length` positions a row, with the row's write position beside it.

    The rows lie as in `FloatCache`. It has no mask: what a token sees follows from its position. `obstacle` says why
    C++ does not read and write it, None where it does. Raises `MemoryError` before allocating what does not fit.
    """

    mask_B11S = None

    def __init__(self, shape: CacheShape, obstacle: str | None):
        require(shape.nbytes, shape.device, f"a cache of {shape.batch_size} x {shape.cache_length} positions")
        self.shape, self.obstacle = shape, obstacle
        self.keys, self.values = (self._side(format) for format in shape.formats)
        self.valid_past_index = torch.zeros(shape.batch_size, dtype=torch.int64, device=shape.device)
        self.rows_B1 = torch.arange(shape.batch_size, device=shape.device)[:, None]
        self.positions = torch.arange(shape.reserved_length, device=shape.device)

    def _side(self, format: str) -> Side:
        shape = self.shape
        size = (shape.batch_size, shape.num_kv_heads, shape.reserved_length)
        sizes = part_sizes(format, shape.head_dim, shape.dtype)
        # Zeros, not empty: a hidden position has weight 0 in attention, and 0 x NaN would be NaN.
        layers = [
            tuple(torch.zeros(*size, last, dtype=dtype, device=shape.device) for last, dtype in sizes)
            for _ in range(shape.num_layers)
        ]
        return Side(format, layers, native=self.obstacle is None)

    @property
    def words(self) -> str:
        """What is stored and which attention reads it, for people."""
        how = "in C++" if self.obstacle is None else f"in torch ({self.obstacle})"
        return f"cache {'/'.join(self.shape.formats)}, attention block by block {how}"

    @property
    def storages(self) -> list[torch.Tensor]:
        """Every part of every layer."""
        return [part for side in (self.keys, self.values) for parts in side.layers for part in parts]

    def set_valid_past(self, valid_past_index: torch.Tensor) -> None:
        """Moves each row's write position to `valid_past_index` [B]: how a prefill ends, and how a step is undone."""
        self.valid_past_index.copy_(valid_past_index)

    def clear(self, used: int) -> None:
        """Zeroes the first `used` positions: what an overflow left there would reach later calls through 0 x NaN."""
        for storage in self.storages:
            storage[:, :, :used] = 0

    def write_prompt(self, layer: int, key_BQKD: torch.Tensor, value_BQKD: torch.Tensor, past: int) -> None:
        """Stores a prompt's (or chunk's) tokens at positions past .. past + Q - 1 of the first B rows."""
        batch, tokens = key_BQKD.shape[:2]
        index_BQ = self.positions[past : past + tokens].repeat(batch, 1)
        self.keys.layer(layer).write(key_BQKD, index_BQ)
        self.values.layer(layer).write(value_BQKD, index_BQ)

    def attend_prompt(self, layer: int, query_BQND: torch.Tensor, past: int, scale: float) -> torch.Tensor:
        """Causal attention of a prompt's (or chunk's) tokens that were written at `past`. Returns [B, Q, N D]."""
        batch, tokens = query_BQND.shape[:2]
        seen_BQ = self.positions[past : past + tokens].add(1).repeat(batch, 1)
        return attend(self.keys.layer(layer), self.values.layer(layer), query_BQND, seen_BQ, past + tokens, scale)

    def floats(self, layer: int, rows: int, used: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [rows, K, used, D] of a layer, in the model's dtype."""
        keys, values = (side.layer(layer).floats(rows, used, self.shape.dtype) for side in (self.keys, self.values))
        return keys, values

    def grown(self, shape: CacheShape) -> "SmallCache":
        """A larger cache that holds what this one holds."""
        larger = SmallCache(shape, self.obstacle)
        kept = self.shape.cache_length
        for new, old in zip(larger.storages, self.storages, strict=True):
            new[:, :, :kept] = old[:, :, :kept]
        larger.set_valid_past(self.valid_past_index)
        return larger


def cache_for(shape: CacheShape, stock: bool) -> FloatCache | SmallCache:
    """The cache of this shape. `stock` keeps C++ from a small one."""
    if shape.is_plain:
        return FloatCache(shape)
    return SmallCache(shape, "products are stock" if stock else native_obstacle(shape.device, shape.head_dim))
