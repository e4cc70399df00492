"""NativeStep: the decode step as one C++ call (kernels/native_code/step.h), over weights and cache as they lie."""

import torch
from torch import nn

from fastllama.cache.float_cache import FloatCache
from fastllama.kernels import native
from fastllama.kernels.linear import NATIVE_ROWS, Native
from fastllama.kernels.norm import Norm
from fastllama.model.rotary import RotaryTable
from fastllama.model.weights import Fused, Table, Weights

_HEAD_DIMS = (16, 32, 64, 96, 128)


def obstacle(weights: Weights, cache: FloatCache, rotary: RotaryTable) -> str | None:
    """Why this model's step cannot be one C++ call; None when it can."""
    if cache.shape.device.type != "cpu":
        return "the model is not on a CPU"
    if cache.shape.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the model is in {cache.shape.dtype}"
    reason = native.load()
    if reason is not None:
        return reason
    if rotary.stateful:
        return f"rope_type {rotary.module.rope_type!r} depends on the longest position"
    if cache.shape.head_dim not in _HEAD_DIMS:
        return f"head_dim is {cache.shape.head_dim}"
    if not isinstance(weights.embed, Table) or not isinstance(weights.norm, Norm):
        return "a module was replaced"
    for block in weights.blocks:
        if not isinstance(block.activation, nn.SiLU) and type(block.activation).__name__ != "SiLUActivation":
            return "the activation is not silu"
        if not (isinstance(block.qkv, Fused) and isinstance(block.gate_up, Fused)):
            return "products are not fused"
        if not (isinstance(block.input_norm, Norm) and isinstance(block.post_norm, Norm)):
            return "a norm was replaced"
    if not all(isinstance(product, Native) for product in _products(weights)):
        return "a product is a module of its own"
    return None


def _products(weights: Weights) -> list:
    blocks = [(block.qkv.joint, block.o, block.gate_up.joint, block.down) for block in weights.blocks]
    return [*(product for block in blocks for product in block), weights.lm_head]


class NativeStep:
    """Appends ids [B, Q] to the cache it was made with; returns logits [B, Q, V]."""

    def __init__(self, weights: Weights, cache: FloatCache, rotary: RotaryTable):
        products = _products(weights)
        norms = [norm for block in weights.blocks for norm in (block.input_norm, block.post_norm)] + [weights.norm]
        self._step = torch.classes.fastllama_native.Step(
            [product.weight for product in products],
            [product.bias for product in products],
            [norm.weight for norm in norms],
            weights.embed.weight,
            cache.keys,
            cache.values,
            cache.mask_B11S,
            cache.valid_past_index,
            rotary.cos_SD.contiguous(),
            rotary.sin_SD.contiguous(),
            [weights.num_heads, weights.num_kv_heads, weights.head_dim],
            [weights.scale, *(norm.eps for norm in norms)],
        )

    @staticmethod
    def takes(rows: int, tokens: int) -> bool:
        """Whether so many tokens are few enough for one call; for more, the many-row products are faster."""
        return rows * tokens <= NATIVE_ROWS

    def __call__(self, ids_BQ: torch.Tensor) -> torch.Tensor:
        return self._step.run(ids_BQ)
