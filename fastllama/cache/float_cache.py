"""FloatCache: preallocated keys, values and attention mask in the model's own dtype.

Legend: B batch, Q query tokens, S cache positions, K kv heads, D head dim.
"""

from typing import Any

import torch

from fastllama.cache.budget import CacheShape, require


class FloatCache:
    """Storage for `shape.cache_length` positions a row, with the row's write position beside it.

    Rows are stored unpadded: row b's tokens are at 0 .. valid_past_index[b] - 1. Positions at and beyond that hold
    leftovers that the mask hides. Raises `MemoryError` before allocating what does not fit.
    """

    def __init__(self, shape: CacheShape):
        require(shape.nbytes, shape.device, f"a cache of {shape.batch_size} x {shape.cache_length} positions")
        self.shape = shape
        place: dict[str, Any] = {"dtype": shape.dtype, "device": shape.device}
        size = (shape.batch_size, shape.num_kv_heads, shape.reserved_length, shape.head_dim)
        # Zeros, not empty: a hidden position has weight 0 in attention, and 0 x NaN would be NaN.
        self.keys = [torch.zeros(size, **place) for _ in range(shape.num_layers)]
        self.values = [torch.zeros(size, **place) for _ in range(shape.num_layers)]
        self.mask_B11S = torch.full((shape.batch_size, 1, 1, shape.reserved_length), float("-inf"), **place)
        self.valid_past_index = torch.zeros(shape.batch_size, dtype=torch.int64, device=shape.device)
        self.rows_B1 = torch.arange(shape.batch_size, device=shape.device)[:, None]
        self.positions = torch.arange(shape.reserved_length, device=shape.device)

    @property
    def storages(self) -> list[torch.Tensor]:
        """Keys and values of every layer."""
        return [*self.keys, *self.values]

    def set_valid_past(self, valid_past_index: torch.Tensor) -> None:
        """Moves each row's write position to `valid_past_index` [B]: how a prefill ends, and how a step is undone."""
        self.valid_past_index.copy_(valid_past_index)
        hidden = self.positions >= self.valid_past_index[:, None]
        self.mask_B11S.zero_()
        self.mask_B11S[:, 0, 0].masked_fill_(hidden, float("-inf"))

    def clear(self, used: int) -> None:
        """Zeroes the first `used` positions: what an overflow left there would reach later calls through 0 x NaN."""
        for storage in self.storages:
            storage[:, :, :used] = 0.0

    def write_prompt(self, layer: int, key_BQKD: torch.Tensor, value_BQKD: torch.Tensor, past: int) -> None:
        """Stores a prompt's (or chunk's) tokens at positions past .. past + Q - 1 of the first B rows."""
        batch, tokens = key_BQKD.shape[:2]
        self.keys[layer][:batch, :, past : past + tokens] = key_BQKD.transpose(1, 2)
        self.values[layer][:batch, :, past : past + tokens] = value_BQKD.transpose(1, 2)

    def floats(self, layer: int, rows: int, used: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [rows, K, used, D] of a layer."""
        return self.keys[layer][:rows, :, :used], self.values[layer][:rows, :, :used]

    def grown(self, shape: CacheShape) -> "FloatCache":
        """A larger cache that holds what this one holds."""
        larger = FloatCache(shape)
        kept = self.shape.cache_length
        for layer in range(shape.num_layers):
            larger.keys[layer][:, :, :kept] = self.keys[layer][:, :, :kept]
            larger.values[layer][:, :, :kept] = self.values[layer][:, :, :kept]
        larger.set_valid_past(self.valid_past_index)
        return larger


def write_tokens(storage_BKSD: torch.Tensor, rows_B1: torch.Tensor, index_BQ: torch.Tensor, new_BQKD: torch.Tensor):
    """Writes each row's new tokens at that row's own positions, in place."""
    storage_BKSD[rows_B1, :, index_BQ] = new_BQKD


def mask_for(
    mask_B11S: torch.Tensor, rows_B1: torch.Tensor, index_BQ: torch.Tensor, positions_S: torch.Tensor
) -> torch.Tensor:
    """Opens the positions `index_BQ` in the preallocated mask and returns what Q new tokens may see: [B, 1, Q, S]."""
    mask_B11S[rows_B1, 0, 0, index_BQ] = 0.0
    seen_B11S = mask_B11S[..., : positions_S.shape[0]]
    if index_BQ.shape[1] == 1:
        return seen_B11S
    later_B1QS = positions_S > index_BQ[:, None, :, None]
    return seen_B11S.masked_fill(later_B1QS, float("-inf"))
