"""Calls of a model that is spread over processes: each makes the same call, and all must take the same decisions."""

import torch
import torch.distributed as dist
from torch import nn

from fastllama.model import spread


def begin(model: nn.Module, generation_config) -> None:
    """Before a call's first token. Raises `ValueError` for what would make the processes part."""
    if spread.processes(model) == 1:
        return
    require(model, generation_config)
    if generation_config.do_sample and spread.obstacle(model) is None:
        share_draws(model)


def require(model: nn.Module, generation_config) -> None:
    """Raises `ValueError` for a limit that each of several processes would reach at a token of its own."""
    if spread.processes(model) > 1 and generation_config.max_time is not None:
        raise ValueError(
            f"max_time={generation_config.max_time!r} cannot be honoured: the model is spread over "
            f"{spread.processes(model)} processes, and each has a clock of its own"
        )


def share_draws(model: nn.Module) -> None:
    """Puts torch's generator where the first process has it, so that all draw what that one draws."""
    group = spread.group_of(model)
    if group is None:
        return
    device = model.device
    on_cpu = device.type == "cpu"
    state = torch.get_rng_state() if on_cpu else torch.get_device_module(device).get_rng_state(device)
    shared = state.to(device)
    dist.broadcast(shared, group=group.handle, group_src=0)
    if on_cpu:
        torch.set_rng_state(shared)
    else:
        torch.get_device_module(device).set_rng_state(shared.cpu(), device)
