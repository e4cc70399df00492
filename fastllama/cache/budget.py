"""What a cache takes, and whether it fits."""

from dataclasses import dataclass

import psutil
import torch

from fastllama.kernels.blocks import FORMATS
from fastllama.kernels.stored import FLOATS, part_sizes

# Positions kept beyond cache_length: a view as long as the whole storage would be traced as a second graph.
SLACK = 8


@dataclass(frozen=True)
class CacheShape:
    """Sizes of a preallocated cache. `cache_length` is what a caller may use; the storage is a little longer.

    `cache_k` and `cache_v` name the formats of keys and values; None is `dtype` itself.
    """

    num_layers: int
    batch_size: int
    num_kv_heads: int
    cache_length: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    cache_k: str | None = None
    cache_v: str | None = None

    @property
    def formats(self) -> tuple[str, str]:
        """The formats of keys and values, by name."""
        own = next((name for name, dtype in FLOATS.items() if dtype == self.dtype), str(self.dtype))
        return self.cache_k or own, self.cache_v or own

    @property
    def is_plain(self) -> bool:
        """Whether keys and values are stored in the model's own dtype."""
        return all(name is None or FLOATS.get(name) == self.dtype for name in (self.cache_k, self.cache_v))

    def check_formats(self) -> None:
        """Raises `ValueError` where keys or values cannot be stored as asked for."""
        if self.is_plain:
            return
        if self.dtype not in FLOATS.values():
            field = "cache_k" if self.cache_k else "cache_v"
            raise ValueError(f"{field}={getattr(self, field)!r} needs a model in fp32, bf16 or fp16, not {self.dtype}")
        for name in self.formats:
            part_sizes(name, self.head_dim, self.dtype)

    @property
    def reserved_length(self) -> int:
        # A multiple of 8, so that every row of the mask is aligned.
        return -(-(self.cache_length + SLACK) // 8) * 8

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, mask and write positions. Only a plain cache has a mask: one entry a position."""
        position = self.num_layers * self.num_kv_heads * self.position_bytes
        mask = self.dtype.itemsize if self.is_plain else 0
        return self.batch_size * (self.reserved_length * (position + mask) + 8)

    @property
    def position_bytes(self) -> int:
        """Bytes of a key and a value of one head."""
        if self.is_plain:
            return 2 * self.head_dim * self.dtype.itemsize
        return sum(FORMATS[name].row_bytes(self.head_dim, self.dtype.itemsize) for name in self.formats)


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
