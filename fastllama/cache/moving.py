"""What a cache holds, moved in place: positions are dropped, later ones move down, keys turn to their new positions.

Legend: B batch, S cache positions, K kv heads, D head dim.
"""

import torch

from fastllama.cache.float_cache import FloatCache
from fastllama.cache.small_cache import SmallCache
from fastllama.kernels.rope import turn
from fastllama.kernels.stored import expand, quantise

_POSITIONS = 512  # of a layer, moved at a time: what is held beside the cache


def move(
    cache: FloatCache | SmallCache,
    rows: slice,
    source: int,
    target: int,
    count: int,
    cos_SD: torch.Tensor,
    sin_SD: torch.Tensor,
) -> None:
    """Moves positions source .. source + count - 1 of `rows` to `target`, which is not above `source`.

    Keys turn by `cos_SD` and signed `sin_SD` (S = count, or 1 for all alike), in fp32, and are stored as before; values
    move as the bytes that they are. Where each row's tokens end is for the caller to say: `set_valid_past`.
    """
    for layer in range(cache.shape.num_layers):
        for start in range(0, count, _POSITIONS):
            stop = min(start + _POSITIONS, count)
            here, there = slice(source + start, source + stop), slice(target + start, target + stop)
            how = (x if len(x) == 1 else x[start:stop] for x in (cos_SD, sin_SD))
            _turn_keys(cache, layer, rows, here, there, *how)
            if source != target:
                for part in _parts(cache.values, layer):
                    part[rows, :, there] = part[rows, :, here].clone()  # the two may overlap


def _parts(side, layer: int) -> tuple[torch.Tensor, ...]:
    return (side[layer],) if isinstance(side, list) else side.layers[layer]


def _turn_keys(cache, layer: int, rows: slice, here: slice, there: slice, cos_SD, sin_SD) -> None:
    dtype = cache.shape.dtype
    parts = [part[rows, :, here] for part in _parts(cache.keys, layer)]
    wide = torch.promote_types(dtype, torch.float32)
    if isinstance(cache, FloatCache):
        cache.keys[layer][rows, :, there] = turn(parts[0].to(wide), cos_SD, sin_SD).to(dtype)
        return
    format = cache.keys.format
    turned = turn(expand(parts, format, wide), cos_SD, sin_SD).to(dtype)
    for part, numbers in zip(cache.keys.layers[layer], quantise(turned, format), strict=True):
        part[rows, :, there] = numbers
