"""Peaks of memory, each from a fresh process: `python -m fastllama.lab.memory.memory` is that process.

On a CPU the parent watches the child's anonymous memory, and the child adds the weights that it uses where
the checkpoint's file is mapped: transformers maps a file whose dtype it keeps, so that those weights are in no
anonymous memory, though every step reads them. Resident memory would not do: it also counts pages of the file
that were copied and may go. On an accelerator the child asks torch's allocator.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from fastllama.lab.fault import sentence
from fastllama.lab.measuring import checkpoint, contestant
from fastllama.lab.points import workload
from fastllama.lab.points.point import Point
from fastllama.model.released import is_released
from fastllama.model.small_linear import small_tensors
from fastllama.model.spread import local

_POLL_S = 0.002
_FAULTS = {cls.__name__: cls for cls in (ValueError, OSError, MemoryError, RuntimeError)}
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[3])


@dataclass(frozen=True)
class Peaks:
    """Peaks of one process in MB (10^6 bytes), and the seconds its checkpoint took to load.

    CPU: anonymous memory and mapped weights; resident memory with all file pages. Accelerator: allocated;
    reserved. mapped_weights_mb is the part of the first that the system could read again from the file.
    """

    max_mem_mb: float | None
    max_reserved_mb: float | None
    load_s: float | None
    mapped_weights_mb: float | None = None


def _status_bytes(pid: int | str, field: str) -> int | None:
    """A field of /proc/<pid>/status in bytes; None once the process has no memory left."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _anonymous_bytes(pid: int) -> int:
    if os.path.exists("/proc/self/status"):
        return _status_bytes(pid, "RssAnon") or 0
    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def own_bytes() -> int:
    """Anonymous memory of this process now (resident memory where the system does not tell)."""
    return _anonymous_bytes(os.getpid())


def peaks(point: Point, name: str, more: dict | None = None) -> Peaks:
    """Peaks of contestant `name` loading and generating once, alone in a new process.

    more: environment variables that it has beside this process's. Raises `MemoryError` if the process was killed, and
    what it raised if it failed.
    """
    # The package need not be installed, nor the working directory be the repository.
    search = os.pathsep.join(filter(None, [_PACKAGE_PARENT, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": search, **(more or {})}
    task = json.dumps({"point": asdict(point), "name": name}).encode()
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as noise:
        given.write(task)
        given.seek(0)
        command = [sys.executable, "-m", "fastllama.lab.memory.memory"]
        child = subprocess.Popen(command, stdin=given, stdout=answer, stderr=noise, env=environment)
        try:
            highest = 0
            while child.poll() is None:
                highest = max(highest, _anonymous_bytes(child.pid))
                time.sleep(_POLL_S)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        for stream in (answer, noise):
            stream.seek(0)
        lines, errors = answer.read().decode().splitlines(), noise.read().decode(errors="replace").splitlines()
    if child.returncode < 0:
        killer = signal.Signals(-child.returncode).name
        raise MemoryError(f"the process that measures the memory of {name} was ended by {killer}: too little memory?")
    if child.returncode != 0:
        kind, why = json.loads(lines[-1]) if lines else ("RuntimeError", (errors or ["no message"])[-1])
        raise _FAULTS[kind](f"measuring the memory of {name} failed: {why}")
    told = json.loads(lines[-1])
    if torch.device(point.device).type == "cpu":
        told["max_mem_mb"] = highest / 1e6 + (told["mapped_weights_mb"] or 0.0)
        # Where the system keeps no peak of its own, what was watched is resident memory already.
        told["max_reserved_mb"] = highest / 1e6 if told["max_reserved_mb"] is None else told["max_reserved_mb"]
    return Peaks(**told)


def mapped_bytes(model: torch.nn.Module) -> int | None:
    """Bytes of parameters that lie in files mapped into this process; None where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except FileNotFoundError:
        return None
    # address range, permissions, offset, device, inode, path: an inode of 0 is memory without a file
    regions = [fields[0].split("-") for fields in map(str.split, lines) if fields[4] != "0"]
    ranges = [(int(start, 16), int(end, 16)) for start, end in regions]
    # Packed weights lie in no file; to ask for one would unpack them all.
    modules = [module for module in model.modules() if not is_released(module)]
    parameters = [tensor for module in modules for tensor in module.parameters(recurse=False)]
    tensors = (*parameters, *small_tensors(model))
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in map(local, tensors) if tensor.device.type == "cpu"}
    return sum(nbytes for at, nbytes in sizes.items() if any(start <= at < end for start, end in ranges))


def _allocator_mb(device: torch.device) -> tuple[float | None, float | None]:
    if device.type == "cpu":
        reserved = _status_bytes("self", "VmHWM")
        return None, None if reserved is None else reserved / 1e6
    allocated, reserved = torch.accelerator.max_memory_allocated(device), torch.accelerator.max_memory_reserved(device)
    return allocated / 1e6, reserved / 1e6


def _child() -> int:
    task = json.load(sys.stdin)
    point = Point.from_dict(task["point"])
    try:
        found = checkpoint.find(point.model, point.torch_dtype)
        tokenizer = checkpoint.tokenizer(found)
        prompt = workload.prompt(point.workload, tokenizer)
        alone = contestant.load_alone(point, found, task["name"], workload.pad_id(tokenizer))
        alone.generate(prompt, point.workload.new_tokens)
    except tuple(_FAULTS.values()) as fault:
        kind = next(name for name, cls in _FAULTS.items() if isinstance(fault, cls))
        print(json.dumps([kind, sentence(fault)]))
        return 2
    allocated, reserved = _allocator_mb(torch.device(point.device))
    mapped = mapped_bytes(alone.model) if point.device == "cpu" else None
    print(json.dumps(asdict(Peaks(allocated, reserved, alone.load_s, None if mapped is None else mapped / 1e6))))
    return 0


if __name__ == "__main__":
    sys.exit(_child())
