"""fastllama: a drop-in LlamaForCausalLM that generates the same tokens, faster."""

import gc
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastllama.decode.exported.loaded import ExportedStep, load_step
    from fastllama.decode.many.result import Generated
    from fastllama.decode.sampling.options import Sampling
    from fastllama.decode.sampling.processor import SamplingProcessor
    from fastllama.exporting import export
    from fastllama.llama import LlamaForCausalLM
    from fastllama.model.config import FastConfig
    from fastllama.registration import register, unregister

__version__ = "0.1.0"
__all__ = [
    "ExportedStep",
    "FastConfig",
    "Generated",
    "LlamaForCausalLM",
    "Sampling",
    "SamplingProcessor",
    "export",
    "load_step",
    "register",
    "unregister",
]
# torch and transformers take seconds to import, which help, a version and a refused option need not wait for.
_HOMES = {
    "ExportedStep": "decode.exported.loaded",
    "FastConfig": "model.config",
    "Generated": "decode.many.result",
    "LlamaForCausalLM": "llama",
    "Sampling": "decode.sampling.options",
    "SamplingProcessor": "decode.sampling.processor",
    "export": "exporting",
    "load_step": "decode.exported.loaded",
    "register": "registration",
    "unregister": "registration",
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    collects = gc.isenabled()
    gc.disable()  # an import makes hundreds of thousands of objects and next to no garbage: looking for it is a twelfth
    try:
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    finally:
        if collects:
            gc.enable()
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
