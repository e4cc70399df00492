"""The machine and the versions a measurement was made with. Never a host name, a user name or a path."""

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import psutil
import torch

from fastllama.lab.measuring import flags


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _cpuinfo(key: str) -> str | None:
    found = re.search(rf"^{key}\s*:\s*(.+)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    return found[1].strip() if found else None


def cpu_name() -> str:
    """The processor's own name, or its architecture where the system does not tell; with family and model, since a
    cloud's processors of several generations may share one name."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    family, model = _cpuinfo("cpu family"), _cpuinfo("model")
    return f"{name} (family {family}, model {model})" if family and model else name


def has_bf16_products() -> bool:
    """True if the CPU multiplies bf16 in hardware, so that bf16 weights cost no conversion."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def _first_line(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


@functools.cache
def _compiler() -> str | None:
    for name in (os.environ.get("CXX"), "g++", "gcc", "clang++", "clang"):
        if name and (line := _first_line(name, "--version")):
            return line
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(device: torch.device) -> dict:
    facts = dict.fromkeys(("gpu", "gpu_memory_gb", "gpu_driver", "gpu_power_limit", "cuda"))
    if device.type == "cpu":
        return facts
    if device.type != "cuda":
        return {**facts, "gpu": device.type}
    properties = torch.cuda.get_device_properties(device)
    # By its own identity: a visible device's index need not be its index in the machine.
    which = f"--id=GPU-{properties.uuid}"
    limits = _first_line("nvidia-smi", which, "--query-gpu=driver_version,power.limit", "--format=csv,noheader")
    driver, _, power = (limits or "").partition(", ")
    return {
        "gpu": properties.name,
        "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
        "gpu_driver": driver or None,
        "gpu_power_limit": power or None,
        "cuda": torch.version.cuda,
    }


def _memory_source(device: torch.device) -> str:
    if device.type != "cpu":
        return "torch's allocator"
    return "anonymous memory" if os.path.exists("/proc/self/status") else "resident memory (psutil)"


def usable_cores() -> int | None:
    """Processors that this process may run on; None where the system does not tell."""
    # Not every system lets a process ask for the processors that it may run on.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def environment(device: torch.device) -> dict:
    """JSON-ready facts, the fields of schema2.ENVIRONMENT; None where the system does not tell."""
    return {
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "usable_cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_bf16": has_bf16_products(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "ram_gb": round(psutil.virtual_memory().total / 1e9, 1),
        **_gpu(device),
        "os": f"{platform.system()} {re.match(r'[0-9.]*', platform.release())[0]} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,  # names the build too, where the package's own version may not
        **{name: _version(name) for name in ("transformers", "accelerate", "tokenizers", "safetensors")},
        "compiler": _compiler(),
        "memory_from": _memory_source(device),
        "flags": flags.flags(),
        "variables": flags.variables(),
    }
