"""The two forward passes: over a prompt, and over the newest tokens.

Legend: B batch, Q query tokens, S cache positions, E hidden size, N query heads, K kv heads, D head dim, V vocabulary.
"""

import torch

from fastllama.cache.float_cache import FloatCache, mask_for, write_tokens
from fastllama.cache.small_cache import Parts, Side, SmallCache, attend
from fastllama.kernels.attention import attend_cache, attend_causal, attend_prompt
from fastllama.kernels.rope import rotate
from fastllama.model.tree import Masking
from fastllama.model.weights import Block, Fused, Heads, Weights

# Rows that a CPU takes through an MLP at a time: what lies between its products then stays in the cache, in memory
# that is used again. Larger, each temporary is new memory, whose first touch costs more than the arithmetic.
_MLP_ROWS = 256


def _query_key_value(cut: Heads, block: Block, hidden_BQE, cos_BQD, sin_BQD):
    heads, kv_heads, dim = cut[:3]
    hidden_BQE = block.input_norm(hidden_BQE)
    if isinstance(block.qkv, Fused):
        both_BQHD = block.qkv.joint(hidden_BQE).unflatten(-1, (-1, dim))
        rotated_BQHD = rotate(both_BQHD[:, :, : heads + kv_heads], cos_BQD, sin_BQD)
        return rotated_BQHD[:, :, :heads], rotated_BQHD[:, :, heads:], both_BQHD[:, :, heads + kv_heads :]
    query, key, value = (part.unflatten(-1, (-1, dim)) for part in block.qkv(hidden_BQE))
    return rotate(query, cos_BQD, sin_BQD), rotate(key, cos_BQD, sin_BQD), value


def _on(device: torch.device, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors on a cache's device, or back on the model's: mostly one."""
    return tensors if tensors[0].device == device else tuple(x.to(device) for x in tensors)


def _mlp(block: Block, hidden_BQE: torch.Tensor) -> torch.Tensor:
    gate, up = block.gate_up(block.post_norm(hidden_BQE))
    return block.down(block.activation(gate) * up)


def _finish_prompt_block(block: Block, hidden_BQE: torch.Tensor, attended_BQE: torch.Tensor) -> torch.Tensor:
    hidden_BQE = hidden_BQE + block.o(attended_BQE)
    tokens = max(_MLP_ROWS // hidden_BQE.shape[0], 1) if hidden_BQE.device.type == "cpu" else hidden_BQE.shape[1]
    for part_BQE in hidden_BQE.split(tokens, dim=1):
        part_BQE += _mlp(block, part_BQE)
    return hidden_BQE


def prefill_chunk(
    weights: Weights, cache: FloatCache | SmallCache, hidden_BQE: torch.Tensor, cos_BQD, sin_BQD, past: int
) -> torch.Tensor:
    """Runs Q prompt tokens that follow `past` cached ones, stores their keys and values; returns hidden [B, Q, E].

    Rows are padded on the right, so causality alone hides the padding: the first chunk needs no mask, and a later one
    only [Q, past + Q], which the C++ attention does without.
    """
    batch, tokens = hidden_BQE.shape[:2]
    kinds, mask = weights.prompt_attention, None
    native = (kinds.later if past else kinds.first) == "native"
    small = isinstance(cache, SmallCache)
    if past and not native and not small:
        seen = torch.ones(tokens, past + tokens, dtype=torch.bool, device=cache.shape.device).tril_(past)
        mask = torch.zeros(1, 1, tokens, past + tokens, dtype=hidden_BQE.dtype, device=cache.shape.device)
        mask.masked_fill_(~seen, float("-inf"))
    for index, block in enumerate(weights.blocks):
        query, key, value = _query_key_value(weights.heads, block, hidden_BQE, cos_BQD, sin_BQD)
        query, key, value = _on(cache.shape.device, query, key, value)
        cache.write_prompt(index, key, value, past)
        if small:
            attended = cache.attend_prompt(index, query, past, weights.heads.scale)
        elif native:
            keys, values = cache.keys[index], cache.values[index]
            attended = attend_prompt(query, keys, values, past, weights.heads.scale)
        elif past:
            end = past + tokens
            keys, values = cache.keys[index][:batch, :, :end], cache.values[index][:batch, :, :end]
            attended = attend_cache(query, keys, values, mask, weights.heads.scale)
        else:
            attended = attend_causal(query, key, value, weights.heads.scale)
        (attended,) = _on(hidden_BQE.device, attended)
        hidden_BQE = _finish_prompt_block(block, hidden_BQE, attended)
    return hidden_BQE


Storage = list[torch.Tensor] | Side  # of keys, or of values, of every layer


def layer_of(storage: Storage, layer: int) -> torch.Tensor | Parts:
    """A layer's keys, or its values."""
    return storage.layer(layer) if isinstance(storage, Side) else storage[layer]


def step_block(
    block: Block,
    heads: Heads,
    keys: torch.Tensor | Parts,
    values: torch.Tensor | Parts,
    rows_B1: torch.Tensor,
    positions_S: torch.Tensor,
    index_BQ: torch.Tensor,
    mask_B1QS: torch.Tensor | None,
    seen_BQ: torch.Tensor | None,
    cos_BQD: torch.Tensor,
    sin_BQD: torch.Tensor,
    hidden_BQE: torch.Tensor,
) -> torch.Tensor:
    """One layer of `step`, with the layer's own keys and values; returns hidden [B, Q, E].

    `mask_B1QS` is added to the scores; without it, the newest tokens see the first `seen_BQ` positions.
    """
    used, device = positions_S.shape[0], positions_S.device  # the cache's
    query, key, value = _query_key_value(heads, block, hidden_BQE, cos_BQD, sin_BQD)
    query, key, value = _on(device, query, key, value)
    if isinstance(keys, Parts):
        keys.write(key, index_BQ)
        values.write(value, index_BQ)
        if mask_B1QS is None:
            attended = attend(keys, values, query, seen_BQ, used, heads.scale)
        else:
            floats = [side.floats(len(index_BQ), used, query.dtype) for side in (keys, values)]
            attended = attend_cache(query, *floats, mask_B1QS, heads.scale)
    else:
        write_tokens(keys, rows_B1, index_BQ, key)
        write_tokens(values, rows_B1, index_BQ, value)
        attended = attend_cache(query, keys[:, :, :used], values[:, :, :used], mask_B1QS, heads.scale)
    (attended,) = _on(hidden_BQE.device, attended)
    hidden_BQE = hidden_BQE + block.o(attended)
    return hidden_BQE + _mlp(block, hidden_BQE)


def step(
    weights: Weights,
    keys: Storage,
    values: Storage,
    mask_B11S: torch.Tensor | None,
    valid_past_index: torch.Tensor,
    rows_B1: torch.Tensor,
    positions_S: torch.Tensor,
    ids_BQ: torch.Tensor,
    index_BQ: torch.Tensor,
    cos_BQD: torch.Tensor,
    sin_BQD: torch.Tensor,
    branching: Masking | None = None,
) -> torch.Tensor:
    """Runs the newest tokens against the cache and moves `valid_past_index` on; returns logits [B, Q, V].

    Only the first len(positions_S) positions of the cache are read: that length is the step's one dynamic size.
    `branching`: the tokens are of a tree. A cache of small formats is then read as floats, a layer at a time.
    """
    hidden_BQE = weights.embed(ids_BQ)
    mask_B1QS = seen_BQ = None
    if branching is not None:
        mask_B1QS = branching.mask(index_BQ, positions_S, hidden_BQE.dtype)
    elif mask_B11S is None:
        seen_BQ = index_BQ + 1
    else:
        mask_B1QS = mask_for(mask_B11S, rows_B1, index_BQ, positions_S)
    for layer, block in enumerate(weights.blocks):
        place = (layer_of(keys, layer), layer_of(values, layer), rows_B1, positions_S, index_BQ, mask_B1QS, seen_BQ)
        hidden_BQE = step_block(block, weights.heads, *place, cos_BQD, sin_BQD, hidden_BQE)
    valid_past_index.add_(ids_BQ.shape[1])
    return weights.lm_head(weights.norm(hidden_BQE))
