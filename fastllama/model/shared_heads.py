"""Tensor parallelism over more processes than there are kv heads: each holds one, with others that need the same.

transformers' plan cuts the keys' and values' rows evenly, within a head where there are fewer heads than processes,
and its attention then fails. Here its rule for k_proj and v_proj is another: the weight is a DTensor on a mesh of (kv
heads, copies), so that loading and saving stay transformers' own.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from fastllama.model.spread import SHARED_HEADS, local_heads


class _NoGradient(torch.autograd.Function):
    """As it is, forward. Backward, each process would see a part of the gradient only."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("training is not possible with fewer kv heads than processes: use fewer processes")


class SharedHeads(TensorParallelLayer):
    """The style of a projection to `kv_heads` heads, which divide the processes."""

    def __init__(self, kv_heads: int):
        self.kv_heads = kv_heads
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}

    def should_use_local_tensors(self, module) -> bool:
        return True

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        whole = module._parameters.get(param)
        if whole is None:
            return
        if mesh not in self._meshes:
            ranks = mesh.mesh.flatten().view(self.kv_heads, -1)
            self._meshes[mesh] = DeviceMesh(mesh.device_type, ranks, mesh_dim_names=("kv_head", "copy"))
        spread = distribute_tensor(whole, self._meshes[mesh], [Shard(0), Replicate()], src_data_rank=None)
        module._parameters[param] = nn.Parameter(spread, requires_grad=whole.requires_grad)

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        plain = module.forward

        def forward(x):
            with self.context_around_forward(module, mesh):
                return _NoGradient.apply(plain(x)) if torch.is_grad_enabled() else plain(x)

        module.forward = forward
        return module


def share_heads(model: nn.Module, size: int) -> None:
    """Gives a model that is not spread yet the rule for its kv heads, where they are fewer than `size` processes."""
    kv_heads = model.config.num_key_value_heads
    if kv_heads >= size:
        return
    style = f"{SHARED_HEADS}_{kv_heads}"
    ALL_PARALLEL_STYLES.register(style, cast(Callable, SharedHeads(kv_heads)))  # transformers says too little of it
    names = [f"model.layers.*.self_attn.{side}_proj" for side in "kv"]
    model.tp_plan = {**model.tp_plan, **dict.fromkeys(names, style)}


def use_local_groups(model: nn.Module) -> None:
    """Tells transformers' own attention how many query heads here share a kv head here."""
    heads, kv_heads = local_heads(model)
    for layer in model.model.layers:
        layer.self_attn.num_key_value_groups = heads // kv_heads
