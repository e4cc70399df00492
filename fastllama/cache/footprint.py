"""Which formats a cache may have, from the most exact to the smallest, and the first of them that fits."""

from collections.abc import Callable
from dataclasses import replace

from fastllama.cache.budget import CacheShape
from fastllama.kernels.blocks import BLOCK, FORMATS

# None is the model's own dtype. iq4_nl takes the bytes of q4_0: it is for those who ask for it.
BY_QUALITY = (None, "f16", "q8_0", "int8", "q5_1", "q5_0", "q4_1", "q4_0")


def choices(shape: CacheShape) -> list[CacheShape]:
    """`shape` in every choice of formats; a side that has one keeps it.

    Formats whose blocks do not fit the head dim, or that take no less than the model's dtype, are no choice.
    """
    made, own = [], shape.dtype.itemsize
    for format in BY_QUALITY:
        found = None if format is None else FORMATS.get(format)
        in_blocks = found is not None and not found.is_float and format != "int8"
        if in_blocks and shape.head_dim % BLOCK:
            continue
        if found is not None and found.row_bytes(shape.head_dim, own) >= shape.head_dim * own:
            continue
        one = replace(shape, cache_k=shape.cache_k or format, cache_v=shape.cache_v or format)
        if one not in made:
            made.append(one)
    return made


def best_fitting(shape: CacheShape, budget: int, nbytes: Callable[[CacheShape], int]) -> CacheShape:
    """`shape` in the most exact formats of which `nbytes`, all that a reservation takes, is at most `budget`.

    A side that has a format keeps it. Raises `MemoryError` with what the smallest needs where none fits.
    """
    shapes = choices(shape)
    for one in shapes:
        if nbytes(one) <= budget:
            return one
    smallest = min(shapes, key=nbytes)
    raise MemoryError(
        f"a cache of {shape.batch_size} x {shape.cache_length} positions takes {nbytes(smallest) / 1e9:.3g} GB at the "
        f"least ({words(smallest)}), and {max(budget, 0) / 1e9:.3g} GB are left for it: lower cache_length or "
        "batch_size"
    )


def words(shape: CacheShape) -> str:
    """The formats for people."""
    key, value = shape.formats
    return f"keys and values {key}" if key == value else f"keys {key}, values {value}"
