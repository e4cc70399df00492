"""The matrix rate: how fast this machine multiplies matrices that are large enough to keep its units busy."""

import time

import torch

from fastllama.lab.measuring.contestant import synchronize

_FIRST, _LARGEST = 128, 8192
_LONG_S = 0.05  # a product that takes this long is measured well enough
_PASSES = 3


def tflop_per_s(dtype: torch.dtype, device: torch.device, long_s: float = _LONG_S) -> float:
    """TFLOP/s (10^12 operations) of a square product in `dtype`, the best of a few.

    The size doubles until a product takes `long_s` seconds: a processor without units for a dtype may need a
    thousand times as long as one with them.
    """
    size = _FIRST
    while True:
        a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        torch.mm(a, b)
        seconds = min(_seconds(a, b, device) for _ in range(_PASSES))
        if seconds >= long_s or size >= _LARGEST:
            return 2 * size**3 / seconds / 1e12
        size *= 2


def _seconds(a: torch.Tensor, b: torch.Tensor, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    torch.mm(a, b)
    synchronize(device)
    return time.perf_counter() - start
