"""FastConfig: the switches, validated in one place."""

from dataclasses import dataclass, field, fields
from typing import Any

from fastllama.kernels.blocks import FORMATS
from fastllama.kernels.small_weights import WEIGHTS
from fastllama.kernels.tune import PRODUCTS

_COMPILE = ("no", "static", "dynamic", "fullgraph", "native")
_FUSE = ("all", "qkv", "no")


def _switch(default: Any, help: str, allowed: str, lossless: bool = True) -> Any:
    return field(default=default, metadata={"help": help, "allowed": allowed, "lossless": lossless})


@dataclass(frozen=True)
class FastConfig:
    """How to generate. Every field is a switch; a value that is not allowed raises `ValueError` before any work."""

    compile: str = _switch(
        "no",
        "compile the decode step: static is, on a CPU, a layer compiled ahead of time and kept on disk for every "
        "layer, cache length and later process; where that cannot be, the whole step with dynamic=False, "
        "fullgraph=True (on a GPU with CUDA graphs); native is one C++ call a step, for CPUs, and traces nothing",
        "no, static, dynamic, fullgraph (the same as static), native",
    )
    bucket: int = _switch(
        256, "a step reads the used part of the cache, rounded up to a multiple of this", "an integer >= 16"
    )
    prefill_chunk: int | None = _switch(
        None,
        "prompt tokens per prefill pass; None takes a short prompt at once and a long one in passes of a fixed size",
        "None or an integer >= 16",
    )
    fuse: str = _switch("all", "products that share an input run as one: query/key/value, gate/up", "all, qkv, no")

    products: str = _switch(
        "auto",
        "how to multiply: stock is torch's call, native is C++ for CPUs, packed rearranges the weights for oneDNN and "
        "small ones for torch's int8 and int4 kernels, auto measures and remembers",
        "auto, stock, native, packed",
    )
    weights: str | None = _switch(
        None,
        "hold the weights in fewer bits, quantised while loading: int8 has a scale a row, int4 one for 32, 64, 128 or "
        "256 numbers; None leaves them as the checkpoint has them",
        f"None, {', '.join(WEIGHTS)}",
        lossless=False,
    )
    cache_k: str | None = _switch(
        None,
        "how keys are stored; None is the model's own dtype",
        f"None, {', '.join(FORMATS)}",
        lossless=False,
    )
    cache_v: str | None = _switch(
        None,
        "how values are stored; None is the model's own dtype",
        f"None, {', '.join(FORMATS)}",
        lossless=False,
    )

    cache_device: str | None = _switch(
        None,
        "where keys, values and attention are; None is beside the weights, cpu leaves an accelerator's memory to them",
        "None, cpu",
    )
    context_shift: bool = _switch(
        False,
        "go on when the cache is full: drop the older half of what a row holds behind its first keep tokens, and move "
        "the rest down",
        "True, False",
        lossless=False,
    )
    keep: int = _switch(
        0,
        "tokens at the start of the prompt that context_shift never drops, beside the one that begins a text; -1 is "
        "the whole prompt",
        "an integer >= -1",
        lossless=False,
    )
    grp_attn_n: int = _switch(
        1,
        "self-extend: tokens that share a position, in all windows but the newest; 1 is off",
        "an integer >= 1",
        lossless=False,
    )
    grp_attn_w: int = _switch(
        512, "self-extend: tokens of a window, a multiple of grp_attn_n", "an integer >= 1", lossless=False
    )

    def __post_init__(self) -> None:
        for switch in fields(self):
            require_allowed(switch.name, getattr(self, switch.name))
        if self.compile == "fullgraph":
            object.__setattr__(self, "compile", "static")
        if self.compile == "native" and (self.products not in ("auto", "native") or self.fuse != "all"):
            name, value = ("fuse", self.fuse) if self.fuse != "all" else ("products", self.products)
            raise ValueError(f"compile='native' brings its own products: {name}={value!r} cannot be honoured beside it")
        if self.grp_attn_w % self.grp_attn_n:
            raise ValueError(f"grp_attn_w={self.grp_attn_w} is not a multiple of grp_attn_n={self.grp_attn_n}")


def require_allowed(name: str, value: Any) -> None:
    """Raises `ValueError` for a value that no `FastConfig` may have, whatever else it has."""
    if not _IS_ALLOWED[name](value):
        allowed = FastConfig.__dataclass_fields__[name].metadata["allowed"]
        raise ValueError(f"{name}={value!r} is not allowed; allowed: {allowed}")


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _at_least_16(value: Any) -> bool:
    return _is_int(value, 16)


_IS_ALLOWED = {
    "compile": lambda value: value in _COMPILE,
    "bucket": _at_least_16,
    "prefill_chunk": lambda value: value is None or _at_least_16(value),
    "fuse": lambda value: value in _FUSE,
    "products": lambda value: value in PRODUCTS,
    "weights": lambda value: value is None or value in WEIGHTS,
    "cache_k": lambda value: value is None or value in FORMATS,
    "cache_v": lambda value: value is None or value in FORMATS,
    "cache_device": lambda value: value in (None, "cpu"),
    "context_shift": lambda value: isinstance(value, bool),
    "keep": lambda value: _is_int(value, -1),
    "grp_attn_n": lambda value: _is_int(value, 1),
    "grp_attn_w": lambda value: _is_int(value, 1),
}
