"""How large a cache a call needs, and whether the one that is there will do."""

from dataclasses import replace

from torch import nn

from fastllama.cache.budget import CacheShape
from fastllama.cache.footprint import best_fitting
from fastllama.decode.cache_device import cache_device
from fastllama.decode.memory_size import parse_size
from fastllama.model.config import FastConfig
from fastllama.model.rotary import is_stateful
from fastllama.model.spread import local, local_heads

_ROUNDING = 256  # an implicit cache grows in steps, so that a slightly longer call reallocates nothing
_AHEAD = 1024  # new tokens that an implicit cache reserves at once: max_length may be a model's whole context


def shape_for(model: nn.Module, batch_size: int, cache_length: int, config: FastConfig) -> CacheShape:
    """The cache of a transformers Llama.

    Raises `ValueError` for a size that is not an integer of 1 or more, for a format that the model cannot have, and as
    `cache_device` does.
    """
    for name, value in (("batch_size", batch_size), ("cache_length", cache_length)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} is not allowed; allowed: an integer >= 1")
    weight = model.model.layers[0].input_layernorm.weight
    shape = CacheShape(
        num_layers=len(model.model.layers),
        batch_size=batch_size,
        num_kv_heads=local_heads(model)[1],
        cache_length=max(cache_length, 2),  # torch specialises sizes 0 and 1
        head_dim=model.model.layers[0].self_attn.head_dim,
        dtype=weight.dtype,
        device=cache_device(model, config),
        cache_k=config.cache_k,
        cache_v=config.cache_v,
    )
    shape.check_formats()
    return shape


def within(model: nn.Module, batch_size: int, cache_length: int, config: FastConfig, memory: int | str) -> FastConfig:
    """`config` with the most exact formats of the cache that leave model and cache within `memory` (24GB, or bytes).

    The weights count as they are held. Raises `ValueError` for what is no size, `MemoryError` with what the smallest
    cache needs where none fits.
    """
    here = [local(tensor) for tensor in (*model.parameters(), *model.buffers())]
    held = {tensor.data_ptr(): tensor.nbytes for tensor in here}
    budget = parse_size(memory) - sum(held.values())
    shape = shape_for(model, batch_size, cache_length, config)
    found = best_fitting(shape, budget, lambda one: bytes_for(model, one))
    return replace(config, cache_k=found.cache_k, cache_v=found.cache_v)


def bytes_for(model: nn.Module, shape: CacheShape) -> int:
    """What a reservation takes: the cache, and the rotary table where there is one."""
    table = 2 * shape.reserved_length * shape.head_dim * shape.dtype.itemsize
    return shape.nbytes + (0 if is_stateful(model.model.rotary_emb) else table)


def implicit_length(prompt_length: int, positions: int) -> int:
    """Positions of an implicit cache for a call that may use up to `positions`: the rest can grow later."""
    return -(-min(positions, prompt_length + _AHEAD) // _ROUNDING) * _ROUNDING


def same_but_longer(held: CacheShape, wanted: CacheShape) -> bool:
    """Whether two shapes differ in their length at most. Rows must match: more would be computed at every step."""
    return replace(held, cache_length=wanted.cache_length) == wanted


def require_fit(held: CacheShape, wanted: CacheShape, batch_size: int, positions: int) -> None:
    """Raises `ValueError` when an explicit cache cannot serve `batch_size` rows of `positions` tokens."""
    if (held.dtype, held.device) != (wanted.dtype, wanted.device):
        raise ValueError(
            f"the model is now {wanted.dtype} on {wanted.device} but its cache is {held.dtype} on {held.device}: "
            "call preallocate() again"
        )
    if replace(held, batch_size=batch_size, cache_length=wanted.cache_length) != wanted:
        raise ValueError("the model's shape has changed: call preallocate() again")
    if held.batch_size < batch_size or held.cache_length < positions:
        raise ValueError(
            f"this call needs {batch_size} x {positions} cache positions and preallocate() reserved "
            f"{held.batch_size} x {held.cache_length}: preallocate more, or free() first"
        )
