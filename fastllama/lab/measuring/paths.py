"""Paths: which way decoding goes here, by dtype and switches, as the model itself says after a call."""

import random

import torch

import fastllama
from fastllama import demo
from fastllama.kernels.tune import Chooser
from fastllama.lab.fault import sentence
from fastllama.lab.measuring import vanilla
from fastllama.lab.points.point import DTYPES

_LENGTH = 16
_WEIGHT = (2048, 2048)  # of a model that does not fit the processor's caches
_LARGE = 2**31  # bytes of such a model


def compile_reason(device: torch.device) -> str | None:
    """Why torch.compile cannot work here; None when it does, which a small function proves."""
    torch._dynamo.reset()
    try:
        # With a number that is in no cache, so that the compiler of today has to show itself.
        number = random.random()
        torch.compile(lambda x: torch.sin(x) * number, fullgraph=True)(torch.ones(64, device=device))
    except Exception as fault:  # whatever a compiler can do wrong
        return sentence(fault)
    finally:
        torch._dynamo.reset()
    return None


def paths(device: torch.device, compile_reason: str | None, rough: bool = False) -> list[dict]:
    """{"dtype", "switches", "path"} of the demo, one row, for each dtype and way to preallocate.

    What a compiled step would say is not waited for: `compile_reason` tells whether it can be. `rough` leaves out how
    a large weight is multiplied, which takes a measurement.
    """
    found = []
    for name, dtype in DTYPES.items():
        model = fastllama.LlamaForCausalLM.from_pretrained(demo.resolve("demo", dtype), dtype=dtype).eval().to(device)
        vanilla.plain_greedy(model, 0)
        found.append({"dtype": name, "switches": "none", "path": _path(model, None)})
        eager = _path(model, "no")
        found.append({"dtype": name, "switches": "--preallocate", "path": eager})
        if not rough and device.type == "cpu":
            found[-1]["path"] += f"; a large weight: {_large(dtype)}"
        static = eager.replace("no compile", "static compile" + (", CUDA graphs" if device.type == "cuda" else ""))
        static = static if compile_reason is None else f"refused: {compile_reason}"
        found.append({"dtype": name, "switches": "--preallocate --compile static", "path": static})
        found.append({"dtype": name, "switches": "--preallocate --compile native", "path": _path(model, "native")})
    return found


def _path(model, compile: str | None) -> str:
    """What the model says after two tokens."""
    try:
        if compile is not None:
            model.preallocate(batch_size=1, cache_length=_LENGTH, compile=compile)
        ids = torch.ones(1, 4, dtype=torch.int64, device=model.device)
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
        return model.path
    except ValueError as fault:
        return f"refused: {sentence(fault)}"
    finally:
        model.free()


def _large(dtype: torch.dtype) -> str:
    """How a weight of a model that no cache holds is multiplied: measured once and remembered, as preallocate does."""
    weight = torch.ones(_WEIGHT, dtype=dtype)
    return Chooser("auto", 1, _LARGE, weight)(weight, True)
