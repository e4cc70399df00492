"""NativeStep: the decode step as one C++ call (kernels/native_code/step.h), over weights and cache as they lie."""

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastllama.cache.budget import CacheShape
from fastllama.cache.float_cache import FloatCache
from fastllama.kernels import native
from fastllama.kernels.attention import NATIVE_HEAD_DIMS
from fastllama.kernels.linear import NATIVE_ROWS
from fastllama.model.rotary import RotaryTable, is_stateful
from fastllama.model.sources import all_modules, is_plain
from fastllama.model.weights import Weights

FORMAT_OF = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def obstacle(model: nn.Module, shape: CacheShape) -> str | None:
    """Why this model's step, on a cache of this shape, cannot be one C++ call; None when it can."""
    if shape.device.type != "cpu":
        return "the model is not on a CPU"
    if shape.dtype not in FORMAT_OF:
        return f"the model is in {shape.dtype}"
    if shape.batch_size > NATIVE_ROWS:
        return f"{shape.batch_size} rows are more than the {NATIVE_ROWS} it is for"
    if is_stateful(model.model.rotary_emb):
        return f"rope_type {model.model.rotary_emb.rope_type!r} depends on the longest position"
    if shape.head_dim not in NATIVE_HEAD_DIMS:
        return f"head_dim is {shape.head_dim} and not one of {', '.join(map(str, NATIVE_HEAD_DIMS))}"
    body, layers = model.model, model.model.layers
    activations = {layer.mlp.act_fn for layer in layers}
    if not all(type(activation).__name__ in ("SiLU", "SiLUActivation") for activation in activations):
        return "the activation is not silu"
    norms = {body.norm, *(norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm))}
    kinds = {body.embed_tokens: nn.Embedding} | dict.fromkeys(norms, LlamaRMSNorm)
    for module in all_modules(model):
        if module not in activations and not is_plain(module, kinds.get(module, nn.Linear)):
            return f"a {type(module).__name__} of {type(module).__module__.split('.')[0]} takes part"
    reason = native.load()
    if reason is None and not shape.is_plain:
        unread = [name for name in shape.formats if name not in _formats()]
        reason = f"it does not read the cache format {unread[0]}" if unread else None
    return reason


def _formats() -> list[str]:
    """The cache formats that the library's step reads, beside the model's own dtype."""
    library = torch.ops.fastllama_native
    return library.step_formats() if hasattr(library, "step_formats") else []


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
            [[keys] for keys in cache.keys],
            [[values] for values in cache.values],
            [FORMAT_OF[cache.shape.dtype]] * 2,
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
