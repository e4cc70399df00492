"""Weights that transformers' tensor parallelism spread over processes: the part of each that lies here, and the sums.

A process holds whole heads, a part of the MLP's inner columns, and rows of the vocabulary (Shoeybi et al. 2019,
arXiv 1909.08053). The parts are the local tensors of transformers' own DTensors; nothing is held twice.

Legend: B batch, Q query tokens, E hidden size, V vocabulary.
"""

from typing import NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from fastllama.kernels.linear import Native, Stock

if dist.is_available():
    from torch.distributed.tensor import DTensor

# What transformers replaces a module's forward with, and what is ours (shared_heads.py) in its manner.
_FORWARDS = ("transformers.distributed.tensor_parallel", "fastllama.model.shared_heads")
SHARED_HEADS = "fastllama_shared_heads"  # begins the name of the rule for kv heads that several processes hold
_ROWS = ("colwise",)
_COLUMNS = ("rowwise",)
_STYLES = {
    "model.embed_tokens": (None, "embedding_rowwise"),
    "model.layers.*.self_attn.q_proj": _ROWS,
    "model.layers.*.self_attn.k_proj": _ROWS,
    "model.layers.*.self_attn.v_proj": _ROWS,
    "model.layers.*.self_attn.o_proj": _COLUMNS,
    "model.layers.*.mlp.gate_proj": _ROWS,
    "model.layers.*.mlp.up_proj": _ROWS,
    "model.layers.*.mlp.down_proj": _COLUMNS,
    "lm_head": ("colwise_gather_output", "colwise_rep"),
}


def is_distributed(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a DTensor, of which this process may hold a part only."""
    return dist.is_available() and isinstance(tensor, DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that lies here: itself, where it is not distributed. Rebinding its `data` is seen."""
    return cast("DTensor", tensor)._local_tensor if is_distributed(tensor) else tensor


def processes(model: nn.Module) -> int:
    """How many processes hold a part of the model by tensor parallelism; 1 where none but this does."""
    return getattr(model, "_tp_size", None) or 1


def is_spread(module: nn.Module) -> bool:
    """Whether the module's forward is the one that tensor parallelism put in its place."""
    return getattr(vars(module).get("forward"), "__module__", None) in _FORWARDS


def obstacle(model: nn.Module) -> str | None:
    """Why weights that are spread over processes cannot be read as this file does; None when they can, or are not."""
    if is_distributed(model.model.norm.weight):  # which a tp_plan leaves whole
        return "weights are spread over processes in other ways than by a tp_plan"
    if processes(model) == 1:
        return None
    plan = {name: "colwise" if style.startswith(SHARED_HEADS) else style for name, style in model.tp_plan.items()}
    for name, styles in _STYLES.items():
        if plan.get(name) not in styles:
            return f"the tp_plan says {plan.get(name)!r} of {name}, and not {' or '.join(map(repr, styles))}"
    if plan.keys() - _STYLES.keys():
        return f"the tp_plan has a rule for {min(plan.keys() - _STYLES.keys())}"
    return heads_obstacle(model.config, processes(model))


def heads_obstacle(config, size: int) -> str | None:
    """Why `size` processes cannot hold whole heads of a model each; None when they can."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % size:
        return f"{heads} attention heads are no whole number for each of {size} processes"
    if kv_heads % size and size % kv_heads:
        return f"{kv_heads} kv heads are neither a multiple nor a divisor of {size} processes"
    return None


def local_heads(model: nn.Module) -> tuple[int, int]:
    """(attention heads, kv heads) that this process holds."""
    size, config = processes(model), model.config
    return config.num_attention_heads // size, max(config.num_key_value_heads // size, 1)


class Group(NamedTuple):
    """The processes that hold a model, and this one's place among them."""

    size: int
    rank: int
    handle: "dist.ProcessGroup"

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every process's x, in place; the same bits everywhere. One message."""
        dist.all_reduce(x, group=self.handle)
        return x

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """Every process's x [..., n], side by side: [..., size n]. One message."""
        functional = torch.ops._c10d_functional
        parts = functional.all_gather_into_tensor(x.contiguous()[None], self.size, self.handle.group_name)
        return torch.cat(functional.wait_tensor(parts).unbind(0), dim=-1)


def group_of(model: nn.Module) -> Group | None:
    """The processes of a model that `obstacle` has nothing against; None where it is on one."""
    if processes(model) == 1:
        return None
    mesh = model.lm_head.weight.device_mesh
    return Group(mesh.size(), mesh.get_local_rank(), mesh.get_group())


class Part(NamedTuple):
    """This process's rows or columns of a linear module, by the names that a module has."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


def part(module: nn.Linear) -> Part:
    return Part(local(module.weight), None if module.bias is None else local(module.bias))


class Total(NamedTuple):
    """A product of which each process has some columns: the results are added up, and the bias once."""

    product: Stock | Native
    bias: torch.Tensor | None
    group: Group

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        total = self.group.total(self.product(x))
        return total if self.bias is None else total + self.bias


class Joined(NamedTuple):
    """A product of which each process has some rows (the last may have fewer), whole in every process."""

    product: Stock | Native
    out_features: int
    group: Group

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        mine = self.product(x)
        short = -(-self.out_features // self.group.size) - mine.shape[-1]
        return self.group.joined(F.pad(mine, (0, short)) if short else mine)[..., : self.out_features]


class SpreadTable(NamedTuple):
    """The embedding, of which this process holds the rows from `first` on: [V / processes, E]."""

    weight: torch.Tensor
    first: int
    group: Group

    def __call__(self, ids_BQ: torch.Tensor) -> torch.Tensor:
        place_BQ = ids_BQ - self.first
        elsewhere_BQ = (place_BQ < 0) | (place_BQ >= self.weight.shape[0])
        rows_BQE = F.embedding(place_BQ.masked_fill(elsewhere_BQ, 0), self.weight)
        return self.group.total(rows_BQE.masked_fill(elsewhere_BQ[..., None], 0))


def spread_table(embedding: nn.Embedding, group: Group) -> SpreadTable:
    """The part of the embedding's table that lies here."""
    rows = -(-embedding.num_embeddings // group.size)
    return SpreadTable(local(embedding.weight), min(group.rank * rows, embedding.num_embeddings), group)
