"""Weights in huge pages: a step reads each of them once, and finds 512 times as many bytes by one entry of the TLB.

Most systems give huge pages to those who ask (transparent_hugepage/enabled is "madvise"), and none to mapped files.
"""

import contextlib
import functools
import math
import mmap
import weakref
from pathlib import Path

import psutil
import torch

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGE = 2 * 2**20  # bytes of a huge page of x86-64
_LEAST = 2 * _HUGE  # bytes of a tensor that is worth it
_SPARE = 2**30  # bytes of memory that must stay free where a weight is copied to memory of its own
_placed: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()


@functools.cache
def given() -> bool:
    """Whether the system gives huge pages to those who ask."""
    with contextlib.suppress(OSError):
        return hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in _SETTING.read_text()
    return False


def empty(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """torch.empty in the dtype and on the device of `like`. A large one on a CPU lies in huge pages where it can."""
    numbers = math.prod(shape)
    nbytes = numbers * like.itemsize
    if like.device.type != "cpu" or nbytes < _LEAST or not given():
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    # Of its own, since what the heap gives may have been touched; the pages before and behind are never touched.
    memory = mmap.mmap(-1, nbytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE
    with contextlib.suppress(OSError):  # a kernel without them: the pages stay small
        memory.madvise(mmap.MADV_HUGEPAGE, first, nbytes // _HUGE * _HUGE)
    tensor = torch.frombuffer(memory, dtype=like.dtype, count=numbers, offset=first).view(shape)
    _placed.add(tensor.untyped_storage())
    return tensor


def holds(tensor: torch.Tensor) -> bool:
    """Whether `tensor` lies in memory that asked for huge pages."""
    return tensor.untyped_storage() in _placed


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in huge pages: a copy, unless it lies in such already, is small, or memory is short."""
    if tensor.device.type != "cpu" or tensor.nbytes < _LEAST or not tensor.is_contiguous() or not given():
        return tensor
    if holds(tensor) or psutil.virtual_memory().available < tensor.nbytes + _SPARE:
        return tensor
    return empty(tensor.shape, tensor).copy_(tensor)


def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """torch.cat along dim 0, in huge pages where they are given."""
    first = tensors[0]
    rows = sum(tensor.shape[0] for tensor in tensors)
    return torch.cat(tensors, out=empty((rows, *first.shape[1:]), first))
