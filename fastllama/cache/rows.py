"""Single rows of a cache: filled, copied and cleared while the other rows are in use."""

import copy
from dataclasses import replace

import torch

from fastllama.cache.float_cache import FloatCache
from fastllama.cache.small_cache import SmallCache


def part_of(cache: FloatCache | SmallCache, first: int, count: int) -> FloatCache | SmallCache:
    """A cache of rows first .. first + count - 1, in the same memory: what is written to one is in the other."""
    rows = slice(first, first + count)
    part = copy.copy(cache)
    part.shape = replace(cache.shape, batch_size=count)
    part.valid_past_index, part.rows_B1 = cache.valid_past_index[rows], cache.rows_B1[:count]
    if isinstance(cache, SmallCache):
        part.keys, part.values = (
            side._replace(layers=[tuple(numbers[rows] for numbers in parts) for parts in side.layers])
            for side in (cache.keys, cache.values)
        )
    else:
        part.keys, part.values = ([storage[rows] for storage in side] for side in (cache.keys, cache.values))
        part.mask_B11S = cache.mask_B11S[rows]
    return part


def copy_row(cache: FloatCache | SmallCache, source: int, target: int, positions: int) -> None:
    """Copies keys and values of the first `positions` of one row to another; write positions stay as they are."""
    for storage in cache.storages:
        storage[target, :, :positions] = storage[source, :, :positions]


def gather_positions(cache: FloatCache | SmallCache, row: int, sources: list[int], start: int) -> None:
    """Copies a row's positions `sources` to start, start + 1, ...; they may overlap."""
    index = torch.tensor(sources, device=cache.shape.device)
    for storage in cache.storages:
        storage[row, :, start : start + len(sources)] = storage[row].index_select(1, index)


def clear_row(cache: FloatCache | SmallCache, row: int, first: int, end: int) -> None:
    """Zeroes positions first .. end - 1 of a row: an overflow left there would reach later prompts through 0 x NaN."""
    for storage in cache.storages:
        storage[row, :, first:end] = 0
