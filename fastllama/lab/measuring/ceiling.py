"""The ceiling: how fast this machine reads memory, and how much of that a decode step used."""

import time
from collections.abc import Callable
from statistics import median

import torch

from fastllama.kernels import native, pages
from fastllama.lab.measuring.checkpoint import position_bytes
from fastllama.lab.measuring.contestant import synchronize
from fastllama.model.released import is_released
from fastllama.model.small_linear import small_tensors
from fastllama.model.spread import local

_BYTES = 512 * 2**20
_COLUMNS = 4096
_PASSES = 3


def _best_seconds(work: Callable, device: torch.device) -> float:
    best = float("inf")
    for _ in range(_PASSES):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


class Ceiling:
    """The bandwidth of memory, GB/s (10^9 bytes): the median over the times it was measured, since it drifts.

    CPU: 512 MiB read with the threads in use by torch's reductions and, where it is built, by our one-row product,
    which asks memory in advance; the fastest counts. Accelerator: a copy of 512 MiB, bytes read plus bytes written,
    since there one kernel cannot read faster than it can copy.
    """

    def __init__(self, device: torch.device, nbytes: int = _BYTES):
        self._device = device
        self._nbytes = nbytes
        self.samples: list[float] = []

    @property
    def gb_per_s(self) -> float:
        """The median of what was measured so far."""
        return median(self.samples)

    def measure(self) -> float:
        """Measure once more; returns that sample."""
        like = torch.ones(1, dtype=torch.float32, device=self._device)
        values = pages.empty((self._nbytes // 4,), like).fill_(1)  # in the pages that weights have
        if self._device.type == "cpu":
            # Which formulation reads fastest differs between processors and builds of torch.
            works: dict[Callable[[], object], int] = {values.sum: 1, values.max: 1, values.view(torch.int64).sum: 1}
            if native.load() is None:
                row, weight = torch.ones(1, _COLUMNS), values.view(-1, _COLUMNS)
                works[lambda: torch.ops.fastllama_native.linear_rows(row, weight, None)] = 1
        else:
            target = torch.empty_like(values)
            works = {lambda: target.copy_(values): 2}
        best = 0.0
        for work, times_moved in works.items():
            best = max(best, times_moved * values.nbytes / _best_seconds(work, self._device) / 1e9)
        self.samples.append(best)
        return best


def step_bytes(
    model: torch.nn.Module,
    lengths: list[int],
    new_tokens: int,
    cache_k: str | None = None,
    cache_v: str | None = None,
    world_size: int = 1,
) -> int:
    """Bytes that one decode step in mid-generation must read; of one of `world_size` processes that hold the model.

    Every weight once, as it is held, but the input embedding only where the output uses the same matrix; and each row's
    keys and values: its prompt (`lengths`, real tokens) and half of the new tokens, as `cache_k` and `cache_v` store
    them (None: in the model's dtype).
    """
    here = map(local, (*model.parameters(), *small_tensors(model)))
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in here}
    embedding, head = local(model.get_input_embeddings().weight), model.get_output_embeddings()
    # One that is packed is nobody else's, and to ask for it would unpack them all.
    if is_released(head) or embedding.data_ptr() != local(head.weight).data_ptr():
        del tensors[embedding.data_ptr()]
    positions = sum(lengths) + len(lengths) * new_tokens // 2
    position = position_bytes(model.config, model.dtype.itemsize, cache_k, cache_v) // world_size
    return sum(tensors.values()) + position * positions
