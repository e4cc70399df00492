"""python -m fastllama.lab doctor: what this machine can do, which way decoding will go, and what would make it faster.

Names no host, no user and no path, so that what it says can be shown to anybody.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.utils import cpp_extension
from transformers.utils import logging

from fastllama.cache.budget import available_bytes
from fastllama.kernels import native
from fastllama.kernels.linear import can_pack
from fastllama.lab.measuring import advice, matrix, paths
from fastllama.lab.measuring.ceiling import Ceiling
from fastllama.lab.measuring.checkpoint import auto_device, check_device
from fastllama.lab.measuring.environment import environment
from fastllama.lab.points.point import DTYPES

_CEILING_BYTES = 512 * 2**20
_LONG_S = 0.05  # how long the largest product takes that the matrix rate is measured with


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if something here makes decoding slower")
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (what run_llama.py takes by itself)")
    # For tests, and for whoever wants the words without the figures.
    parser.add_argument("--rough", action="store_true", help=argparse.SUPPRESS)


def without_paths(text: str) -> str:
    """The text with each absolute path cut down to its last part."""
    return re.sub(r"(?<![\w.])/(?:[^\s/:'\",;()]+/)*([^\s/:'\",;()]*)", r"\1", text)


def usable_cores() -> int:
    """Cores that this process may use: of the machine's, those that its affinity and its control group allow."""
    facts = environment(torch.device("cpu"))
    cores = [facts["cores"]]
    if hasattr(os, "sched_getaffinity"):
        cores.append(len(os.sched_getaffinity(0)))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores.append(max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return min(cores)


def _compiler() -> str | None:
    """The first line of what the compiler that torch would call says of itself; None where it does not run."""
    command = shlex.split(cpp_extension.get_cxx_compiler())
    if not command or shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    return without_paths(lines[0].strip()) if done.returncode == 0 and lines else None


@contextmanager
def _quiet():
    """Loading a model shows no bar and says nothing."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def examine(device: torch.device, rough: bool = False, say: Callable[[str], None] = lambda doing: None) -> dict:
    """All that the doctor finds, JSON-ready. `rough`: with sizes too small to mean anything.

    Bandwidth in GB/s (10^9 bytes): CPU: read; accelerator: copied, read plus written. Matrix rates in TFLOP/s.
    """
    say("looking for a compiler, and building the C++ operators if this machine has none yet (up to a minute)")
    reason = native.load() if device.type == "cpu" else None
    facts = environment(device)
    found = {
        "device": device.type,
        **{name: facts.get(name) for name in ("cpu", "cores", "threads", "cpu_capability", "cpu_bf16", "governor")},
        "usable_cores": usable_cores(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        **{name: facts.get(name) for name in ("gpu", "gpu_memory_gb", "gpu_driver", "gpu_power_limit", "cuda")},
        **{name: facts.get(name) for name in ("os", "python", "torch", "transformers")},
        "memory_free_gb": available_bytes(torch.device("cpu")) / 1e9,
        "gpu_memory_free_gb": None if device.type == "cpu" else available_bytes(device) / 1e9,
        "nvidia_driver": shutil.which("nvidia-smi") is not None,
        "compiler": _compiler(),
        "native": device.type == "cpu" and reason is None,
        "native_reason": without_paths(reason) if reason else None,
        "matrix_unit": device.type == "cpu" and native.has_matrix_unit,
        "onednn_packed": [
            name for name, dtype in DTYPES.items() if can_pack(torch.empty(1, dtype=dtype, device=device))
        ],
        "missing_packages": advice.missing_packages(),
    }
    say("reading memory")
    ceiling = Ceiling(device, 2**20 if rough else _CEILING_BYTES)
    found["bandwidth_gb_per_s"] = ceiling.measure()
    say("multiplying matrices")
    long_s = 0.0 if rough else _LONG_S
    found["matrix_tflop_per_s"] = {name: _rate(dtype, device, long_s) for name, dtype in DTYPES.items()}
    say("asking which way decoding goes")
    with _quiet():
        found["compile_reason"] = paths.compile_reason(device)
        found["compile_reason"] = found["compile_reason"] and without_paths(found["compile_reason"])
        found["paths"] = [
            {**path, "path": without_paths(path["path"])}
            for path in paths.paths(device, found["compile_reason"], rough)
        ]
    found["advice"] = [entry.as_json() for entry in advice.advice(found)]
    return found


def _rate(dtype: torch.dtype, device: torch.device, long_s: float) -> float | None:
    try:
        return matrix.tflop_per_s(dtype, device, long_s)
    except RuntimeError:  # a device that has no such product
        return None


def _facts_table(found: dict) -> Table:
    table = Table(title="this machine", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("found", overflow="fold")
    processor = f"{found['cpu']}, {found['cores']} cores, {found['usable_cores']} of them usable"
    rates = (
        f"{name} {'none' if rate is None else f'{rate:.3g}'}" for name, rate in found["matrix_tflop_per_s"].items()
    )
    products = f"{'with' if found['cpu_bf16'] else 'without'} bf16 products"
    rows = {
        "processor": processor,
        "threads": str(found["threads"]),
        "instructions": f"{found['cpu_capability']}, {products}{', a matrix unit' if found['matrix_unit'] else ''}",
        "memory free": f"{found['memory_free_gb']:.1f} GB",
    }
    if found["gpu"] is not None:
        rows["GPU"] = (
            f"{found['gpu']}, {found['gpu_memory_gb']} GB, {found['gpu_memory_free_gb']:.1f} GB free, "
            f"driver {found['gpu_driver']}, power limit {found['gpu_power_limit']}, CUDA {found['cuda']}"
        )
    verb = "read" if found["device"] == "cpu" else "copied"
    rows |= {
        "bandwidth": f"{found['bandwidth_gb_per_s']:.1f} GB/s {verb} on {found['device']}",
        "matrix rate": f"TFLOP/s: {', '.join(rates)}",
        "compiler": found["compiler"] or "none that runs",
        "C++ operators": "ready" if found["native"] else f"not there: {found['native_reason'] or 'they are for CPUs'}",
        "torch.compile": "works" if found["compile_reason"] is None else f"does not: {found['compile_reason']}",
        "oneDNN packs": ", ".join(found["onednn_packed"]) or "nothing",
        "versions": f"Python {found['python']}, torch {found['torch']}, transformers {found['transformers']}",
    }
    for what, words in rows.items():
        table.add_row(what, words)
    return table


def _paths_table(found: dict) -> Table:
    table = Table(title="which way decoding goes, one row of a prompt", title_justify="left")
    for column in ("dtype", "switches", "path"):
        table.add_column(column, overflow="fold")
    for path in found["paths"]:
        table.add_row(path["dtype"], path["switches"], path["path"])
    return table


def run(arguments) -> int:
    """Print what is found; 0, or with --strict 1 where something makes decoding slower than this machine could."""
    device = torch.device(check_device(arguments.device or auto_device()))
    started = time.perf_counter()

    def say(doing: str) -> None:
        print(f"{doing} ...", file=sys.stderr)

    found = examine(device, arguments.rough, say)
    slower = [entry for entry in found["advice"] if entry["slows"]]
    if arguments.json:
        print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        console = Console()
        console.print(_facts_table(found))
        console.print(_paths_table(found))
        for entry in found["advice"]:
            mark = "slower without" if entry["slows"] else "also"
            console.print(f"{mark}: {entry['what']}", highlight=False, markup=False)
            console.print(f"    {entry['command']}", highlight=False, markup=False)
        if not slower:
            console.print("nothing found that makes decoding slower than this machine can be")
        console.print(f"{time.perf_counter() - started:.0f} s")
    return 1 if arguments.strict and slower else 0
