"""Prefill and steps for people who write their own loop, on the cache and the graphs that generate uses."""

import torch
from torch import nn

from fastllama.decode.ending import well_ended
from fastllama.decode.engine import Engine
from fastllama.decode.prompt import unpad
from fastllama.decode.support import model_obstacle


def prefill(model: nn.Module, engine: Engine, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None) -> torch.Tensor:
    """Starts anew with prompts; returns the logits [B, V] after each row's last token. Raises `ValueError`."""
    obstacle = model_obstacle(model)
    if obstacle is not None:
        raise ValueError(f"prefill and step cannot run: {obstacle}")
    prompt = unpad(ids_BT, mask_BT)

    def run() -> torch.Tensor:
        engine.refresh(model)
        engine.fit(model, ids_BT.shape[0], prompt.longest, prompt.longest)
        engine.begin(ids_BT.shape[0])
        return engine.prefill(prompt).clone()

    return engine.alone("prefill()", lambda: well_ended(engine, run))


def step(model: nn.Module, engine: Engine, ids_BQ: torch.Tensor) -> torch.Tensor:
    """Appends tokens to the rows of the last prefill; returns logits [B, Q, V]. Raises `ValueError`."""
    if ids_BQ.shape[1] == 0:
        raise ValueError("step() was given no token")
    # One layout for compiled code, whatever the caller sliced it from.
    ids_BQ = ids_BQ.to(model.device, torch.int64, copy=True, memory_format=torch.contiguous_format)

    def run() -> torch.Tensor:
        engine.require_rows(ids_BQ.shape[0])
        engine.texts.require_own()
        if not engine.binding.is_whole:  # weights were moved, or asked for, since the prefill
            engine.refresh(model)
        while engine.room() < ids_BQ.shape[1]:
            engine.grow(model, ids_BQ.shape[1])
        return engine.step(ids_BQ).clone()

    return engine.alone("step()", lambda: well_ended(engine, run))
