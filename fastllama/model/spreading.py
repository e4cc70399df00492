"""Spreading a model over processes while it is loaded: transformers' own, for any number of kv heads."""

from collections.abc import Callable

from torch import nn

from fastllama.model.spread import heads_obstacle

_ASKED = ("tp_plan", "tp_size")


def asked_plainly(arguments: dict, weights: str | None) -> dict:
    """from_pretrained's arguments, with tp_plan and tp_size as the DistributedConfig that transformers makes of them.

    Raises `ValueError` for weights in few bits, which are quantised whole, beside them.
    """
    given = {name: arguments[name] for name in _ASKED if arguments.get(name) is not None}
    config = arguments.get("distributed_config")
    if config is None and not given:
        return arguments
    if weights is not None:
        raise ValueError(
            f"weights={weights!r} cannot be honoured beside tensor parallelism: leave out the one or other"
        )
    if config is not None:
        return arguments  # transformers has its own word on both together
    from transformers.distributed import DistributedConfig

    others = {name: value for name, value in arguments.items() if name not in _ASKED}
    return others | {"distributed_config": DistributedConfig(**given)}


def distribute(parents: Callable, model: nn.Module, config, mesh) -> nn.Module:
    """What the parent's `maybe_distribute_model` returns; called before any weight is read.

    Raises `ValueError` where the processes cannot hold whole heads.
    """
    size = getattr(config, "tp_size", None) or 1
    if mesh is None or size == 1:
        return parents(model, config, mesh)
    obstacle = heads_obstacle(model.config, size)
    if obstacle is not None:
        raise ValueError(f"tensor parallelism cannot be honoured: {obstacle}")
    from fastllama.model.shared_heads import share_heads, use_local_groups

    share_heads(model, size)
    model = parents(model, config, mesh)
    use_local_groups(model)
    return model
