"""Marks: named ranges in a trace around the parts of a generation, set from outside and taken away afterwards.

A mark is an event "part:NAME" or "part:NAME:LAYER". Compiled code is left as it is, since whatever it
calls is part of what it was compiled for: a compiled step has a mark around the whole of it and none inside. A compiled
layer is an event `LAYER`, as torch has events for what it compiles itself.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.llama import modeling_llama

from fastllama.cache.float_cache import FloatCache
from fastllama.cache.small_cache import Parts, SmallCache
from fastllama.decode.choice import Choice, GreedyChoice
from fastllama.lab.measuring.contestant import Contestant, synchronize
from fastllama.model import forward, layered_step
from fastllama.model.layered_step import LayeredStep
from fastllama.model.native_step import NativeStep
from fastllama.model.weights import Block, Fused, Parallel, Weights

PREFIX = "part:"
LAYER = "compiled layer"
# The private class costs a tenth of the public one, and what a mark costs is time that the trace shows.
_mark = getattr(torch._C._profiler, "_RecordFunctionFast", torch.profiler.record_function)

_FUNCTIONS = {
    "rotate": "rotary",
    "attend": "attention",
    "attend_cache": "attention",
    "attend_causal": "attention",
    "attend_prompt": "attention",
    "_mlp": "activation",  # but for the products and the norm inside it, which have marks of their own
    "write_tokens": "cache write",
}
_MODULES = {
    "embed_tokens": "embedding",
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
    "self_attn": "attention",
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv"),
    "o_proj": "o",
    "mlp": "activation",
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up"),
    "down_proj": "down",
    "norm": "norm",
    "lm_head": "head",
}


def name(part: str, layer: int | None = None) -> str:
    """The event that a mark leaves in a trace."""
    return f"{PREFIX}{part}" if layer is None else f"{PREFIX}{part}:{layer}"


def within(function: Callable, event: str) -> Callable:
    """The function, each call of which leaves the event."""

    @functools.wraps(function, updated=())
    def run(*args, **kwargs):
        with _mark(event):
            return function(*args, **kwargs)

    return run


def _product(product, event: str):
    """A product, a pair of fused ones or a tuple of parallel ones, marked."""
    if isinstance(product, Fused):
        joint: Any = within(product.joint.__call__, event)
        return product._replace(joint=joint)
    if isinstance(product, Parallel):
        return Parallel(tuple(within(part.__call__, event) for part in product.parts))
    return within(product.__call__, event)


def _block(block: Block, layer: int) -> Block:
    return block._replace(
        input_norm=within(block.input_norm.__call__, name("norm", layer)),
        qkv=_product(block.qkv, name("qkv", layer)),
        o=_product(block.o, name("o", layer)),
        post_norm=within(block.post_norm.__call__, name("norm", layer)),
        gate_up=_product(block.gate_up, name("gate_up", layer)),
        down=_product(block.down, name("down", layer)),
    )


def _weights(weights: Weights) -> Weights:
    return weights._replace(
        embed=within(weights.embed.__call__, name("embedding")),
        blocks=tuple(_block(block, layer) for layer, block in enumerate(weights.blocks)),
        norm=within(weights.norm.__call__, name("norm")),
        lm_head=_product(weights.lm_head, name("head")),
    )


class _Inside:
    """The parts of our eager forward passes. Prepared once, since what entering costs is time that the trace shows."""

    def __init__(self, engine):
        places: dict[tuple[Any, str], str] = {(forward, function): name(part) for function, part in _FUNCTIONS.items()}
        places[FloatCache, "write_prompt"] = places[Parts, "write"] = name("cache write")
        places[SmallCache, "attend_prompt"] = name("attention")
        self.plain: list[tuple[Any, str, Any]] = [(*place, getattr(*place)) for place in places]
        self.plain.append((engine.binding, "weights", engine.binding.weights))
        self.marked: list[tuple[Any, str, Any]] = [
            (*place, within(getattr(*place), event)) for place, event in places.items()
        ]
        self.marked.append((engine.binding, "weights", _weights(engine.binding.weights)))

    def __enter__(self) -> None:
        for owner, attribute, value in self.marked:
            setattr(owner, attribute, value)

    def __exit__(self, *unused) -> None:
        for owner, attribute, value in self.plain:
            setattr(owner, attribute, value)


@contextmanager
def _ours(model: nn.Module, device: torch.device) -> Iterator[Callable[[], None]]:
    engine = model._engine
    inside, eager = _Inside(engine), engine.config.compile == "no"

    def marked(run: Callable, part: str, inside) -> Callable:
        def forward_pass(*args, **kwargs):
            with inside, _mark(name(part)):
                out = run(*args, **kwargs)
                synchronize(device)  # so that no kernel of this pass runs in the next one's range
                return out

        return forward_pass

    prefill = marked(engine.prefill, "prefill", nullcontext() if eager else inside)
    by_layer = isinstance(engine._step, LayeredStep)  # its other parts are eager
    step = marked(engine.step, "step", inside if by_layer else nullcontext())
    with ExitStack() as stack:
        stack.enter_context(patch.object(engine, "prefill", prefill))
        stack.enter_context(patch.object(engine, "step", step))
        for cls in (Choice, GreedyChoice):
            stack.enter_context(patch.object(cls, "take", within(cls.take, name("sampling"))))
        native = within(NativeStep.__call__, name("native step"))
        stack.enter_context(patch.object(NativeStep, "__call__", native))
        stack.enter_context(patch.object(layered_step, "run_layer", within(layered_step.run_layer, LAYER)))
        if eager:
            stack.enter_context(inside)
        yield lambda: None


@contextmanager
def _vanilla(model: nn.Module, device: torch.device, eager: bool) -> Iterator[Callable[[], None]]:
    open_marks, handles, passes = [], [], 0

    def begin(event: str) -> None:
        open_marks.append(_mark(event))
        open_marks[-1].__enter__()

    def end(*unused) -> None:
        open_marks.pop().__exit__(None, None, None)

    def begin_pass(*unused) -> None:
        nonlocal passes
        begin(name("step" if passes else "prefill"))
        passes += 1

    def restart() -> None:
        nonlocal passes
        passes = 0

    def end_pass(*unused) -> None:
        synchronize(device)
        end()

    def watch(module: nn.Module, event: str) -> None:
        handles.append(module.register_forward_pre_hook(lambda *unused: begin(event)))
        handles.append(module.register_forward_hook(end))

    with ExitStack() as stack:
        try:
            handles.append(model.register_forward_pre_hook(begin_pass))
            handles.append(model.register_forward_hook(end_pass))
            if eager:
                for path, module in model.named_modules():
                    part = _MODULES.get(path.rpartition(".")[2])
                    layer = int(path.split(".")[2]) if ".layers." in path else None
                    if part is not None:
                        watch(module, name(part, layer))
                rotate = within(modeling_llama.apply_rotary_pos_emb, name("rotary"))
                stack.enter_context(patch.object(modeling_llama, "apply_rotary_pos_emb", rotate))
                update = within(Cache.update, name("cache write"))
                stack.enter_context(patch.object(Cache, "update", update))
            yield restart
        finally:
            for handle in handles:
                handle.remove()


def marked(contestant: Contestant):
    """A context in which the contestant's generate calls leave marks; it gives a function to call before each."""
    device = contestant.model.device
    if contestant.name == "ours":
        return _ours(contestant.model, device)
    return _vanilla(contestant.model, device, eager=contestant.name == "vanilla")
