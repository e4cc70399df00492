"""The parent's weights as the fast path reads them: fused where they may be, never copied twice.

Fused weights are one storage of which q_proj, k_proj, v_proj (and gate_proj, up_proj) are views. The module tree and
the checkpoint names stay the parent's, so saving, training and adapters see nothing new.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Fused(NamedTuple):
    """Products with the same input as one: y = x W^T + b, cut into parts of `sizes` rows."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    sizes: tuple[int, ...]

    def joint(self, x: torch.Tensor) -> torch.Tensor:
        """All parts side by side."""
        return F.linear(x, self.weight, self.bias)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.joint(x).split(self.sizes, dim=-1)


class Parallel(NamedTuple):
    """The same, module by module, for what cannot be fused (adapters, quantised modules) or shall not be."""

    parts: tuple[nn.Module, ...]

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(part(x) for part in self.parts)


class Block(NamedTuple):
    """One decoder layer."""

    input_norm: nn.Module
    qkv: Fused | Parallel
    o: nn.Module
    post_norm: nn.Module
    gate_up: Fused | Parallel
    down: nn.Module
    activation: nn.Module


class Weights(NamedTuple):
    """Everything a forward pass reads, and the sizes it needs. `fused` names what is fused, for reports."""

    embed: nn.Module
    blocks: tuple[Block, ...]
    norm: nn.Module
    lm_head: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    fused: str
    plain: bool  # whether every product is an nn.Linear's: then the weights' addresses say all about a step


def _is_plain(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in vars(module)
        and module.weight.device.type != "meta"
    )


def _adjacent(tensors: list[torch.Tensor]) -> bool:
    """Whether the tensors lie one after the other in one storage."""
    storage = tensors[0].untyped_storage().data_ptr()
    expected = tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.untyped_storage().data_ptr() != storage or tensor.data_ptr() != expected:
            return False
        if not tensor.is_contiguous():
            return False
        expected += tensor.nbytes
    return True


def _one_storage(parameters: list[nn.Parameter]) -> torch.Tensor:
    """One tensor of which all `parameters` are views along dim 0, made at the cost of one copy of them at most."""
    data = [parameter.data for parameter in parameters]
    if not _adjacent(data):
        joined = torch.cat(data)
        rows = 0
        for parameter in parameters:
            count = parameter.shape[0]
            parameter.data = joined[rows : rows + count]
            rows += count
        return joined
    first = data[0]
    shape = (sum(tensor.shape[0] for tensor in data), *first.shape[1:])
    return first.as_strided(shape, first.stride(), first.storage_offset())


def fuse(modules: tuple[nn.Module, ...]) -> Fused | Parallel:
    """The modules' products as one, or side by side when one of them is not a plain `nn.Linear`."""
    alike = {(m.weight.dtype, m.weight.device, m.bias is None) for m in modules if _is_plain(m)}
    if not all(_is_plain(module) for module in modules) or len(alike) != 1:
        return Parallel(modules)
    weight = _one_storage([module.weight for module in modules])
    bias = None if modules[0].bias is None else _one_storage([module.bias for module in modules])
    return Fused(weight, bias, tuple(module.weight.shape[0] for module in modules))


def is_current(weights: Weights, model: nn.Module) -> bool:
    """Whether `weights` still are the model's: adapters, moves and assigned state dicts rebind parameters."""
    body = model.model
    if len(weights.blocks) != len(body.layers):
        return False
    pairs = [(weights.embed, body.embed_tokens), (weights.norm, body.norm), (weights.lm_head, model.lm_head)]
    for block, layer in zip(weights.blocks, body.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        pairs += [(block.input_norm, layer.input_layernorm), (block.post_norm, layer.post_attention_layernorm)]
        pairs += [(block.o, attention.o_proj), (block.down, mlp.down_proj), (block.activation, mlp.act_fn)]
        if not _same(block.qkv, (attention.q_proj, attention.k_proj, attention.v_proj)):
            return False
        if not _same(block.gate_up, (mlp.gate_proj, mlp.up_proj)):
            return False
    return all(ours is theirs for ours, theirs in pairs)


def _same(product: Fused | Parallel, modules: tuple[nn.Module, ...]) -> bool:
    if isinstance(product, Parallel):
        return all(a is b for a, b in zip(product.parts, modules, strict=True))
    pairs = [(product.weight, [m.weight for m in modules if _is_plain(m)])]
    if product.bias is not None:
        pairs.append((product.bias, [m.bias for m in modules if _is_plain(m)]))
    for joined, parts in pairs:
        if len(parts) != len(modules) or any(part is None for part in parts):
            return False
        address = joined.data_ptr()
        for part in parts:
            if part.data_ptr() != address or part.dtype != joined.dtype:
                return False
            address += part.nbytes
    return True


def gather(model: nn.Module, fuse_what: str) -> Weights:
    """Collects and fuses the weights of a transformers Llama. `fuse_what`: "all", "qkv" or "no"."""
    blocks = []
    # Views made under inference mode could never be trained again.
    with torch.inference_mode(False), torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
            gate_up = (mlp.gate_proj, mlp.up_proj)
            blocks.append(
                Block(
                    input_norm=layer.input_layernorm,
                    qkv=fuse(qkv) if fuse_what != "no" else Parallel(qkv),
                    o=attention.o_proj,
                    post_norm=layer.post_attention_layernorm,
                    gate_up=fuse(gate_up) if fuse_what == "all" else Parallel(gate_up),
                    down=mlp.down_proj,
                    activation=mlp.act_fn,
                )
            )
    attention = model.model.layers[0].self_attn
    return Weights(
        embed=model.model.embed_tokens,
        blocks=tuple(blocks),
        norm=model.model.norm,
        lm_head=model.lm_head,
        num_heads=model.config.num_attention_heads,
        num_kv_heads=model.config.num_key_value_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        fused=_fused_words(blocks),
        plain=all(_is_plain(module) for block in blocks for module in _products(block)) and _is_plain(model.lm_head),
    )


def _products(block: Block) -> list[nn.Module]:
    parallel = [
        part for product in (block.qkv, block.gate_up) if isinstance(product, Parallel) for part in product.parts
    ]
    return [block.o, block.down, *parallel]


def _fused_words(blocks: list[Block]) -> str:
    parts = [
        name
        for name, product in (("qkv", "qkv"), ("gate+up", "gate_up"))
        if all(isinstance(getattr(block, product), Fused) for block in blocks)
    ]
    return "fused " + ", ".join(parts) if parts else "products by module"
