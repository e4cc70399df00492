"""The parent's weights as the fast path reads them: fused where they may be, never held twice.

Fused weights are one storage of which q_proj, k_proj, v_proj (and gate_proj, up_proj) are views. The module tree and
the checkpoint names stay the parent's, so saving, training and adapters see nothing new.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastllama.kernels import pages
from fastllama.kernels.attention import PromptAttention
from fastllama.kernels.linear import Native, Packed, Stock
from fastllama.kernels.norm import Norm
from fastllama.kernels.small_kinds import SMALL_KINDS, SmallProduct
from fastllama.kernels.small_product import TILE
from fastllama.model.released import Packing
from fastllama.model.small_linear import SmallLinear, is_small
from fastllama.model.sources import is_plain
from fastllama.model.spread import (
    Group,
    Joined,
    SpreadTable,
    Total,
    group_of,
    is_spread,
    local_heads,
    part,
    spread_table,
)
from fastllama.model.table import SmallTable, Table, table

Product = Stock | Native | Packed | SmallProduct | Total | Joined


class Choice(Protocol):
    """Which formulation a weight takes."""

    def __call__(self, weight: torch.Tensor, may_pack: bool) -> str:
        """ "stock", "native" or "packed", for floats."""

    def small(self, format: str, rows: int, columns: int, may_pack: bool) -> str:
        """A name of `SMALL_KINDS`, for few bits."""


# Which a prompt takes, by (query heads, kv heads, head dim).
AttentionChoice = Callable[[int, int, int], PromptAttention]


class Fused(NamedTuple):
    """Products with the same input as one, cut into parts of `sizes` rows."""

    joint: Product
    sizes: tuple[int, ...]

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.joint(x).split(self.sizes, dim=-1)


class Parallel(NamedTuple):
    """The same, one by one, for what cannot be fused (adapters, quantised modules) or shall not be."""

    parts: tuple[Product | nn.Module, ...]

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(part(x) for part in self.parts)


class Block(NamedTuple):
    """One decoder layer."""

    input_norm: Norm | nn.Module
    qkv: Fused | Parallel
    o: Product | nn.Module
    post_norm: Norm | nn.Module
    gate_up: Fused | Parallel
    down: Product | nn.Module
    activation: nn.Module


class Heads(NamedTuple):
    """How a layer's queries, keys and values are cut into heads, and what scores are multiplied by."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float


class Weights(NamedTuple):
    """Everything a forward pass reads, and the sizes it needs. `words` names what is fused and how it is multiplied."""

    embed: Table | SmallTable | SpreadTable | nn.Module
    blocks: tuple[Block, ...]
    norm: Norm | nn.Module
    lm_head: Product | nn.Module
    heads: Heads
    prompt_attention: PromptAttention
    words: str
    plain: bool  # whether no module of an unknown kind takes part: then the weights' addresses say all about a step


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
    if len(data) == 1:
        parameters[0].data = pages.moved(data[0])
        return parameters[0].data
    if not _adjacent(data):
        joined = pages.joined(data)
        rows = 0
        for parameter in parameters:
            count = parameter.shape[0]
            parameter.data = joined[rows : rows + count]
            rows += count
        return joined
    first = data[0]
    shape = (sum(tensor.shape[0] for tensor in data), *first.shape[1:])
    return first.as_strided(shape, first.stride(), first.storage_offset())


class _Gatherer:
    """Reads a model's weights, each in the formulation that `choose` gives it."""

    def __init__(self, choose: Choice, packing: Packing, group: Group | None = None):
        self.choose, self.packing, self.group = choose, packing, group
        self.kinds: Counter[str] = Counter()
        self.in_huge_pages = 0

    def product(self, modules: tuple[nn.Module, ...], tied: bool = False) -> Product:
        """The product of plain modules that share their input. A weight that is `tied` to others is never packed."""
        weight = _one_storage([module.weight for module in modules])
        bias = None if modules[0].bias is None else _one_storage([module.bias for module in modules])
        kind = self.choose(weight, not tied)
        packed = self.packing.take(modules, weight, bias) if kind == "packed" else None
        if kind == "packed" and packed is None:
            kind = self.choose(weight, False)
        self.kinds[kind] += 1
        if packed is not None:
            return packed
        self.in_huge_pages += pages.holds(weight)
        return (Native if kind == "native" else Stock)(weight, bias)

    def small(self, modules: tuple[nn.Module, ...]) -> SmallProduct:
        """The same of modules whose weights are held in few bits, in one format."""
        first = modules[0]
        quants = _one_storage([module.weight for module in modules])
        scales = _one_storage([module.weight_scale for module in modules])
        bias = None if first.bias is None else _one_storage([module.bias for module in modules])
        rows, columns = sum(module.out_features for module in modules), first.in_features
        owned = all(type(module) is SmallLinear for module in modules)
        kind = self.choose.small(first.format, rows, columns, owned)
        self.kinds[f"small {kind}"] += 1
        make = functools.partial(SMALL_KINDS[kind], quants, scales, bias, first.format, rows, columns)
        in_place = kind in ("native", "expanded") or first.format == "float8"
        self.in_huge_pages += in_place and pages.holds(quants)
        return make() if in_place else self.packing.small.take(modules, make)

    def one(self, module: nn.Module, tied: bool = False) -> Product | nn.Module:
        if is_small(module) and is_plain(module, type(module)):
            return self.small((module,))
        if is_plain(module):
            return self.product((module,), tied)
        if self.group is not None and is_spread(module):
            return self.exchanged(module)
        self.kinds["by module"] += 1
        return module

    def exchanged(self, module: nn.Linear) -> Total | Joined:
        """The product of a module of which each process holds columns, or rows."""
        mine = part(module)
        if mine.weight.shape[1] != module.in_features:
            columns = cast(Stock | Native, self.product((mine._replace(bias=None),), tied=True))  # tied: never packed
            return Total(columns, mine.bias, self.group)
        return Joined(cast(Stock | Native, self.product((mine,), tied=True)), module.out_features, self.group)

    def several(self, modules: tuple[nn.Module, ...], fuse: bool) -> Fused | Parallel:
        if self.group is not None and all(is_spread(module) for module in modules):
            parts = tuple(part(module) for module in modules)  # each process goes on with its own rows
            if fuse:
                return Fused(self.product(parts, tied=True), tuple(mine.out_features for mine in parts))
            return Parallel(tuple(self.product((mine,), tied=True) for mine in parts))
        plain = all(is_plain(module) for module in modules)
        if fuse and plain and len({(m.weight.dtype, m.weight.device, m.bias is None) for m in modules}) == 1:
            return Fused(self.product(modules), tuple(module.out_features for module in modules))
        if fuse and _lie_in_tiles(modules):
            return Fused(self.small(modules), tuple(module.out_features for module in modules))
        return Parallel(tuple(self.one(module) for module in modules))

    def words(self, blocks: list[Block]) -> str:
        fused = [
            name
            for name, product in (("qkv", "qkv"), ("gate+up", "gate_up"))
            if all(isinstance(getattr(block, product), Fused) for block in blocks)
        ]
        kinds = " + ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        formats = {block.down.format for block in blocks if isinstance(block.down, SmallProduct)}
        held = "".join(f"weights {format}, " for format in sorted(formats))
        huge = f", {self.in_huge_pages} in huge pages" if self.in_huge_pages else ""
        spread = "" if self.group is None else f", tensor parallel over {self.group.size} processes"
        return f"{held}{'fused ' + ', '.join(fused) if fused else 'nothing fused'}, products: {kinds}{huge}{spread}"


def _lie_in_tiles(modules: tuple[nn.Module, ...]) -> bool:
    """Whether small weights can follow each other in one storage: whole tiles, in one format."""
    return (
        all(type(module) is SmallLinear and is_plain(module, SmallLinear) for module in modules)
        and all(module.out_features % TILE == 0 for module in modules)
        and len({(m.format, m.in_features, m.weight.device, m.bias is None) for m in modules}) == 1
    )


def _norm(module: nn.Module) -> Norm | nn.Module:
    return Norm(module.weight, module.variance_epsilon) if is_plain(module, LlamaRMSNorm) else module


def gather(model: nn.Module, fuse: str, choose: Choice, choose_attention: AttentionChoice, packing: Packing) -> Weights:
    """Collects and fuses the weights of a transformers Llama. `fuse`: "all", "qkv" or "no"."""
    group = group_of(model)
    gatherer = _Gatherer(choose, packing, group)
    embedding, head = model.model.embed_tokens, model.lm_head
    blocks = []
    # Views made under inference mode could never be trained again.
    with torch.inference_mode(False), torch.no_grad():
        tied = embedding.weight is head.weight if hasattr(head, "weight") else False
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            blocks.append(
                Block(
                    input_norm=_norm(layer.input_layernorm),
                    qkv=gatherer.several((attention.q_proj, attention.k_proj, attention.v_proj), fuse != "no"),
                    o=gatherer.one(attention.o_proj),
                    post_norm=_norm(layer.post_attention_layernorm),
                    gate_up=gatherer.several((mlp.gate_proj, mlp.up_proj), fuse == "all"),
                    down=gatherer.one(mlp.down_proj),
                    activation=mlp.act_fn,
                )
            )
        lm_head = gatherer.one(head, tied)
        embed = spread_table(embedding, group) if is_spread(embedding) else table(embedding)
        norm = _norm(model.model.norm)
    attention = model.model.layers[0].self_attn
    opaque = gatherer.kinds["by module"] or isinstance(embed, nn.Module) or isinstance(norm, nn.Module)
    opaque = opaque or any(isinstance(x, nn.Module) for block in blocks for x in (block.input_norm, block.post_norm))
    heads = Heads(*local_heads(model), attention.head_dim, attention.scaling)
    return Weights(
        embed=embed,
        blocks=tuple(blocks),
        norm=norm,
        lm_head=lm_head,
        heads=heads,
        prompt_attention=choose_attention(*heads[:3]),
        words=gatherer.words(blocks),
        plain=not opaque,
    )
