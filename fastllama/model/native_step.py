"""NativeStep: the decode step as one C++ call (kernels/native_code/step.h), over weights and cache as they lie."""

from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastllama.cache.budget import CacheShape
from fastllama.cache.float_cache import FloatCache
from fastllama.cache.small_cache import SmallCache
from fastllama.kernels import native
from fastllama.kernels.attention import head_obstacle
from fastllama.kernels.linear import native_rows
from fastllama.kernels.small_product import TILE, Small, native_obstacle
from fastllama.kernels.stored import FLOATS
from fastllama.model.rotary import RotaryTable, is_stateful
from fastllama.model.small_linear import SmallEmbedding, SmallHead, SmallLinear, held_format
from fastllama.model.sources import all_modules, is_plain
from fastllama.model.spread import processes
from fastllama.model.table import SmallTable
from fastllama.model.weights import Weights


def obstacle(model: nn.Module, shape: CacheShape) -> str | None:
    """Why this model's step, on a cache of this shape, cannot be one C++ call; None when it can."""
    if shape.device.type != "cpu" or model.model.norm.weight.device.type != "cpu":
        return "the model is not on a CPU"
    if shape.dtype not in FLOATS.values():
        return f"the model is in {shape.dtype}"
    if is_stateful(model.model.rotary_emb):
        return f"rope_type {model.model.rotary_emb.rope_type!r} depends on the longest position"
    if head_obstacle(shape.head_dim) is not None:
        return head_obstacle(shape.head_dim)
    if processes(model) > 1:
        return f"the model is spread over {processes(model)} processes, and a C++ step is one process's"
    body, layers = model.model, model.model.layers
    held = held_format(model)
    if held is not None and native_obstacle(held, shape.device) is not None:
        return f"weights are held in {held}: {native_obstacle(held, shape.device)}"
    activations = {layer.mlp.act_fn for layer in layers}
    if not all(type(activation).__name__ in ("SiLU", "SiLUActivation") for activation in activations):
        return "the activation is not silu"
    norms = {body.norm, *(norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm))}
    kinds = {body.embed_tokens: (nn.Embedding, SmallEmbedding)} | dict.fromkeys(norms, (LlamaRMSNorm,))
    for module in all_modules(model):
        expected = kinds.get(module, (nn.Linear, SmallLinear, SmallHead))
        if module not in activations and not any(is_plain(module, kind) for kind in expected):
            return f"a {type(module).__name__} of {type(module).__module__.split('.')[0]} takes part"
        if isinstance(module, SmallLinear) and module.out_features % TILE:
            return f"{module.out_features} rows of small weights are no whole tiles of {TILE}"
    if native.load() is None and shape.batch_size > (most := native_rows(shape.dtype)):
        return f"{shape.batch_size} rows are more than the {most} it is for"
    return native.load()


def _products(weights: Weights) -> list:
    every: tuple[Any, ...] = weights.blocks  # fused: products that are not, the native step does not take
    blocks = [(block.qkv.joint, block.o, block.gate_up.joint, block.down) for block in every]
    return [*(product for block in blocks for product in block), weights.lm_head, weights.embed]


def _matrix(product) -> torch.Tensor:
    return product.quants if isinstance(product, (Small, SmallTable)) else product.weight


def _shape(product) -> tuple[int, int]:
    if isinstance(product, (Small, SmallTable)):
        return product.out_features, product.in_features
    return tuple(product.weight.shape)


def _layers(cache: FloatCache | SmallCache) -> tuple[list, list]:
    """The parts of each layer's keys, and of its values."""
    if isinstance(cache, SmallCache):
        return [list(parts) for parts in cache.keys.layers], [list(parts) for parts in cache.values.layers]
    return [[keys] for keys in cache.keys], [[values] for values in cache.values]


class NativeStep:
    """Appends ids [B, Q] to the cache it was made with; returns logits [B, Q, V].

    `offset_B`, int64 [B], is read at each step: how far a row's positions are below its tokens' places in the cache.
    """

    def __init__(
        self,
        weights: Weights,
        cache: FloatCache | SmallCache,
        rotary: RotaryTable,
        offset_B: torch.Tensor | None = None,
    ):
        products = _products(weights)
        self.most_rows = native_rows(cache.shape.dtype)
        norms = [norm for block in weights.blocks for norm in (block.input_norm, block.post_norm)] + [weights.norm]
        self._step = torch.classes.fastllama_native.Step(
            [_matrix(product) for product in products],
            [getattr(product, "scales", None) for product in products],
            [getattr(product, "bias", None) for product in products],
            [_shape(product)[0] for product in products],
            [_shape(product)[1] for product in products],
            [norm.weight for norm in norms],
            *_layers(cache),
            list(cache.shape.formats),
            cache.mask_B11S,
            cache.valid_past_index,
            rotary.cos_SD.contiguous(),
            rotary.sin_SD.contiguous(),
            offset_B,
            list(weights.heads[:3]),
            [weights.heads.scale, *(norm.eps for norm in norms)],
        )

    def takes(self, rows: int, tokens: int) -> bool:
        """Whether so many tokens are few enough for one call; for more, the many-row products are faster."""
        return rows * tokens <= self.most_rows

    def __call__(self, ids_BQ: torch.Tensor) -> torch.Tensor:
        return self._step.run(ids_BQ)
