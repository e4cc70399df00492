"""What was set by hand: torch's flags that are not at their default, and environment variables of the runtimes.

The one file that looks up where torch keeps its settings; what a version of torch does not tell is left out.
"""

import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Mapping

import torch

# Threads, memory and kernels are chosen by these families.
_FAMILIES = re.compile(
    r"(OMP|GOMP|KMP|MKL|DNNL|ONEDNN|ATEN|CUDA|CUBLAS|CUDNN|NVIDIA|MALLOC)_|TORCH|PYTORCH|LD_PRELOAD$|GLIBC_TUNABLES$"
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")
_DEVICE_ID = re.compile(r"\b(GPU|MIG)-[0-9a-fA-F][0-9a-fA-F/-]{7,}")
# Modules of settings that only count once something has imported them; an import would take a second.
_CONFIGS = {"dynamo": "torch._dynamo.config", "inductor": "torch._inductor.config"}


def _flushes_denormals() -> bool:
    return (torch.tensor([1e-310], dtype=torch.float64) * 0.5).item() == 0


def _attribute(path: str) -> Callable:
    def read():
        value = torch
        for part in path.split("."):
            value = getattr(value, part)
        return value() if callable(value) else value

    return read


# torch.set_float32_matmul_precision("highest") writes the second of these, which means the first.
_SAME = {"mkldnn.matmul.fp32_precision": ("none", "ieee")}

# Flag: (how it is read, torch's default).
_FLAGS = {
    "float32_matmul_precision": (torch.get_float32_matmul_precision, "highest"),
    "default_dtype": (lambda: str(torch.get_default_dtype()), "torch.float32"),
    "deterministic_algorithms": (torch.are_deterministic_algorithms_enabled, False),
    "flush_denormal": (_flushes_denormals, False),
    "anomaly_detection": (torch.is_anomaly_enabled, False),
    **{
        path: (_attribute(f"backends.{path}"), default)
        for path, default in {
            "cuda.matmul.allow_tf32": False,
            "cuda.matmul.allow_fp16_reduced_precision_reduction": True,
            "cuda.matmul.allow_bf16_reduced_precision_reduction": True,
            "cuda.flash_sdp_enabled": True,
            "cuda.mem_efficient_sdp_enabled": True,
            "cuda.math_sdp_enabled": True,
            "cuda.cudnn_sdp_enabled": True,
            "cudnn.enabled": True,
            "cudnn.allow_tf32": True,
            "cudnn.benchmark": False,
            "cudnn.deterministic": False,
            "mkldnn.enabled": True,
            "mkldnn.deterministic": False,
            "mkldnn.matmul.fp32_precision": "none",
        }.items()
    },
}


def hidden(value: str) -> str:
    """The value of a variable, or what it is in one word where it holds a path, a device's or the machine's name."""
    host = platform.node()
    if host and re.search(rf"\b{re.escape(host)}\b", value):
        return "(host)"
    value = _DEVICE_ID.sub(r"(\1)", value)
    return "(path)" if re.search(r"[/\\~]", value) else value


def variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables that runtimes of numerics read, in order of name; never a path or a secret."""
    found = {name: environ[name] for name in sorted(environ) if _FAMILIES.match(name)}
    return {name: "(secret)" if _SECRET.search(name) else hidden(value) for name, value in found.items()}


def _plain(value):
    """The value as JSON has it; anything else by its name or type, since its own words may hold an address."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return hidden(value)
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        shown = repr(value)
        return "(object)" if " at 0x" in shown else hidden(shown)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _changed_in(config) -> Iterable[tuple[str, object, object]]:
    entries, is_default = getattr(config, "_config", {}), getattr(config, "_is_default", None)
    if is_default is None:
        return
    for name, entry in entries.items():
        if is_default(name):
            continue
        value, default = getattr(config, name), getattr(entry, "default", None)
        # What was patched and put back is no longer at its default to torch, though it is the same.
        if value != default:
            yield name, value, default


def flags() -> dict[str, dict]:
    """{flag: {"value", "default"}} of torch's flags that differ from their defaults, JSON-ready."""
    found = {}
    for name, (read, default) in _FLAGS.items():
        try:
            value = read()
        except (AttributeError, RuntimeError):
            continue  # this version of torch, or a build without the backend, has no such flag
        if value not in _SAME.get(name, (default,)):
            found[name] = {"value": _plain(value), "default": default}
    for family, module in _CONFIGS.items():
        if module in sys.modules:
            for name, value, default in _changed_in(sys.modules[module]):
                found[f"{family}.{name}"] = {"value": _plain(value), "default": _plain(default)}
    return found
