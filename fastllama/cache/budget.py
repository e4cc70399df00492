"""What a cache takes, and whether it fits."""

from dataclasses import dataclass

import psutil
import torch

# Positions kept beyond cache_length: a view as long as the whole storage would be traced as a second graph.
SLACK = 8


@dataclass(frozen=True)
class CacheShape:
    """Sizes of a preallocated cache. `cache_length` is what a caller may use; the storage is a little longer."""

    num_layers: int
    batch_size: int
    num_kv_heads: int
    cache_length: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def reserved_length(self) -> int:
        # A multiple of 8, so that every row of the mask is aligned.
        return -(-(self.cache_length + SLACK) // 8) * 8

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, mask and write positions."""
        per_row = 2 * self.num_layers * self.num_kv_heads * self.head_dim + 1  # one mask entry a position
        return self.batch_size * (self.reserved_length * per_row * self.dtype.itemsize + 8)


def available_bytes(device: torch.device) -> int:
    """Free bytes that an allocation on `device` can count on."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def require(nbytes: int, device: torch.device, what: str) -> None:
    """Raises `MemoryError` when `nbytes` do not fit on `device` now."""
    free = available_bytes(device)
    if nbytes > free:
        raise MemoryError(
            f"{what} needs {nbytes / 1e9:.2f} GB on {device} and {free / 1e9:.2f} GB are free: "
            "lower cache_length or batch_size"
        )
