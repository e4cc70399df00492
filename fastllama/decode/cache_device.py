"""Where keys and values lie, and attention runs: beside the weights, or on the CPU (llama.cpp's --no-kv-offload)."""

import torch
from torch import nn

from fastllama.model.config import FastConfig


def model_device(model: nn.Module) -> torch.device:
    """Where the weights are; a norm's are never packed."""
    return model.model.norm.weight.device


def cache_device(model: nn.Module, config: FastConfig) -> torch.device:
    """Where the cache is. Raises `ValueError` where a compiled step would have to span two devices."""
    device = model_device(model)
    if config.cache_device is None or device.type == config.cache_device:
        return device
    if config.compile != "no":
        raise ValueError(
            f"compile={config.compile!r} cannot be honoured beside cache_device={config.cache_device!r} with the model "
            f"on {device}: a compiled step stays on one device; use compile='no'"
        )
    return torch.device(config.cache_device)


def words(config: FastConfig, device: torch.device) -> str:
    """What came of it, for people, as the end of a sentence; `device` is the model's."""
    if config.cache_device is None:
        return ""
    if device.type == config.cache_device:
        return f", cache_device={config.cache_device} without effect: the model is there"
    return f", cache and attention on the {config.cache_device.upper()}"
