"""How the decode step is compiled: the only file that calls torch.compile. A layer by itself: layer_package.py."""

import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from fastllama.kernels import instruction_sets
from fastllama.kernels.small_kinds import Run, SmallProduct
from fastllama.model import layer_package
from fastllama.model.capture import CapturedStep, captured
from fastllama.model.forward import step
from fastllama.model.layered_step import LayeredStep


def _own_code(function: Callable) -> Callable:
    """A copy of the function with a code object of its own: torch counts recompilations per code object, so models
    that share one would use up each other's limit."""
    return types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__
    )


def _compiled(function: Callable, mode: str, device: torch.device) -> Callable:
    # Told in each process, so that every one looks under the same key for what was compiled before.
    options: dict[str, Any] | None = (
        {"cpp.vec_isa_ok": True} if device.type == "cpu" and instruction_sets.are_good() else None
    )
    return torch.compile(_own_code(function), dynamic=mode == "dynamic", fullgraph=True, options=options)


def compiled_step(mode: str, device: torch.device, capture: bool, by_layer: bool) -> Callable:
    """`model.forward.step` for a validated FastConfig.compile: as it is, compiled whole (and captured on a GPU), or
    `by_layer`, ahead of time."""
    if mode in ("no", "native"):
        return step
    if by_layer:
        return LayeredStep()
    compiled = _compiled(step, mode, device)
    return CapturedStep(compiled) if mode == "static" and capture else compiled


def graphs() -> int:
    """How many graphs this process has compiled, or loaded: the difference tells whether something else did."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # torch.compile, once it was used
    return layer_package.loaded + (dynamo.counters["stats"]["unique_graphs"] if dynamo is not None else 0)


def _each(products: list[SmallProduct], x: torch.Tensor) -> list[torch.Tensor]:
    return [product(x) for product in products]


class CompiledRun(Run):
    """Products compiled as the step is, for the measurement that chooses among them."""

    compiles = True

    def __init__(self, mode: str, device: torch.device):
        self.mode, self.device = mode, device

    def prepare(self, products: list[SmallProduct]) -> Callable[[torch.Tensor], list[torch.Tensor]]:
        compiled = _compiled(_each, self.mode, self.device)
        if self.mode == "static" and self.device.type == "cuda":
            return captured(compiled, products)
        return lambda x: compiled(products, x)


def run_for(mode: str, device: torch.device) -> Run:
    """How a step of a validated FastConfig.compile runs on the device."""
    return Run() if mode in ("no", "native") else CompiledRun(mode, device)


class Buckets:
    """Views of the position index, one per bucket, whose length is the step's one dynamic dimension.

    `marked`: said so to torch.compile, whose import takes a moment.
    """

    def __init__(self, positions: torch.Tensor, cache_length: int, bucket: int, marked: bool):
        self.positions, self.cache_length, self.bucket, self.marked = positions, cache_length, bucket, marked
        self.views: dict[int, torch.Tensor] = {}

    def lengths(self) -> list[int]:
        """Every bucket, shortest first."""
        return [*range(self.bucket, self.cache_length, self.bucket), self.cache_length]

    def covering(self, used: int) -> torch.Tensor:
        """The view for a step that reads `used` positions."""
        length = min(-(-used // self.bucket) * self.bucket, self.cache_length)
        view = self.views.get(length)
        if view is None:
            view = self.views[length] = self.positions[:length]
            if self.marked:
                torch._dynamo.mark_dynamic(view, 0)
        return view
