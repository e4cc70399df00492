"""The ceiling: how fast this machine reads memory, and how much of that a decode step used."""

import time
from collections.abc import Callable

import torch

from fastllama.lab.checkpoint import position_bytes
from fastllama.lab.contestant import synchronize

_BYTES = 512 * 2**20
_PASSES = 5


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
    """The best bandwidth seen in any pass so far, GB/s (10^9 bytes).

    CPU: a reading reduction over 512 MiB with the threads in use. Accelerator: a copy of 512 MiB, bytes read
    plus bytes written, since there one kernel cannot read faster than it can copy.
    """

    def __init__(self, device: torch.device, nbytes: int = _BYTES):
        self._device = device
        self._nbytes = nbytes
        self.gb_per_s = 0.0

    def measure(self) -> float:
        """Run a pass; returns the best so far."""
        values = torch.ones(self._nbytes // 4, dtype=torch.float32, device=self._device)
        if self._device.type == "cpu":
            # Which reduction reads fastest differs between processors and builds of torch.
            works = {values.sum: 1, values.max: 1, values.view(torch.int64).sum: 1}
        else:
            target = torch.empty_like(values)
            works = {lambda: target.copy_(values): 2}
        for work, times_moved in works.items():
            moved = times_moved * values.nbytes
            self.gb_per_s = max(self.gb_per_s, moved / _best_seconds(work, self._device) / 1e9)
        return self.gb_per_s


def step_bytes(model: torch.nn.Module, lengths: list[int], new_tokens: int) -> int:
    """Bytes that one decode step in mid-generation must read.

    Every parameter once, but the input embedding only where the output uses the same matrix; and each row's
    keys and values: its prompt (`lengths`, real tokens) and half of the new tokens.
    """
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.parameters()}
    embedding = model.get_input_embeddings().weight
    if embedding.data_ptr() != model.get_output_embeddings().weight.data_ptr():
        del tensors[embedding.data_ptr()]
    positions = sum(lengths) + len(lengths) * new_tokens // 2
    return sum(tensors.values()) + position_bytes(model.config, embedding.dtype.itemsize) * positions
