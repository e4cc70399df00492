"""Starting: how long compiling takes with and without kept code, and how soon a new process has its first token."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from fastllama.lab.measuring import checkpoint
from fastllama.lab.points import workload
from fastllama.lab.points.workload import Workload
from fastllama.lab.suite.line import Case, Measured

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[3])
_LIMIT_S = 900
_TURNS = 3
_PROMPT = 32

_OURS = """
import json, sys, time, torch, fastllama
folder, dtype, device, compile, ids = json.loads(sys.argv[1])
place = {} if device == "cpu" else {"device_map": {"": device}}
model = fastllama.LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **place)
start = time.perf_counter()
model.preallocate(batch_size=1, cache_length=2 * len(ids), compile=compile)
compile_s = time.perf_counter() - start
"""
_VANILLA = """
import json, sys, torch, transformers
folder, dtype, device, compile, ids = json.loads(sys.argv[1])
place = {} if device == "cpu" else {"device_map": {"": device}}
model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **place)
compile_s = 0.0
"""
_FIRST_TOKEN = """
ids = torch.tensor([ids], device=model.device)
out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
print(json.dumps({"compile_s": compile_s, "token": int(out[0, -1])}), flush=True)
"""
_PROGRAMS = {"ours": _OURS + _FIRST_TOKEN, "vanilla": _VANILLA + _FIRST_TOKEN}


def cache_environment(folder: Path) -> dict[str, str]:
    """The variables that put everything a process compiles and keeps under `folder`: the one place that knows them."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "XDG_CACHE_HOME": str(folder / "user"),
    }


def start(name: str, task: list, folder: Path) -> dict:
    """A new process of "ours" or "vanilla" up to its first token: compile_s, token, and first_token_s from its start.

    `folder` holds its compiled code. Raises `RuntimeError` with the last line that a failed process said.
    """
    search = os.pathsep.join(filter(None, [_PACKAGE_PARENT, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **cache_environment(folder), "PYTHONPATH": search}
    # As where the package is installed: a process finds the bytecode that the one before it left.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", _PROGRAMS[name], json.dumps(task)]
    with tempfile.TemporaryFile() as noise:
        begun = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=noise, env=environment)
        try:
            line = child.stdout.readline()
            seconds = time.perf_counter() - begun
            child.wait(_LIMIT_S)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            child.stdout.close()
        noise.seek(0)
        errors = noise.read().decode(errors="replace").splitlines()
    if child.returncode != 0 or not line:
        raise RuntimeError(f"a new process of {name} failed: {(errors or ['it said nothing'])[-1]}")
    return {**json.loads(line), "first_token_s": seconds}


def _task(case: Case, model: str, device: str, compile: str) -> list:
    point = case.point(device, model=model)
    found = checkpoint.find(model, point.torch_dtype)
    prompt = workload.prompt(Workload(1, _PROMPT, 1), checkpoint.tokenizer(found))
    # The folder and not the name: with another user cache the model would be built anew.
    dtype = str(point.torch_dtype).removeprefix("torch.")
    return [os.path.abspath(found.place), dtype, str(torch.device(device)), compile, prompt.input_ids[0].tolist()]


def first_use(case: Case, device: str, small: str = "demo") -> Measured:
    """compile_s of a second process over the first's, and the first token of a new process on `small` over vanilla's.

    The case's model is compiled with an empty cache and again; then each way to start takes turns on warm caches.
    """
    compiled = _task(case, case.model, device, "static")
    native = "native" if torch.device(device).type == "cpu" else "static"
    ways = {
        "ours": ("ours", _task(case, small, device, native)),
        "static": ("ours", _task(case, small, device, "static")),
        "vanilla": ("vanilla", _task(case, small, device, "no")),
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        compiling = [start("ours", compiled, folder)["compile_s"] for _ in range(2)]
        taken = {way: [start(*what, folder)] for way, what in ways.items()}
        for _ in range(_TURNS):
            for way, starts in taken.items():
                starts.append(start(*ways[way], folder))
    same = len({one["token"] for starts in taken.values() for one in starts}) == 1
    verdict = "exact" if same else "half" if case.dtype != "fp32" else "differs"
    # The first of each filled the caches.
    seconds = {way: median(one["first_token_s"] for one in starts[1:]) for way, starts in taken.items()}
    figures = {
        "compile_ratio": compiling[1] / compiling[0],
        "first_compile_s": compiling[0],
        "second_compile_s": compiling[1],
        "first_token_ratio": seconds["ours"] / seconds["vanilla"],
        "static_first_token_ratio": seconds["static"] / seconds["vanilla"],
        "first_token_s": seconds["ours"],
        "vanilla_first_token_s": seconds["vanilla"],
    }
    samples = {"compile_s": compiling, "starts": taken}
    return Measured(figures, samples=samples, checks=[(case.dtype, verdict)])
