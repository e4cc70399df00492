"""A profile: one short generation, its trace on disk and its costliest operators in a table."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from fastllama.lab import checkpoint, contestant, workload
from fastllama.lab.point import Point

NEW_TOKENS = 10
_TOP = 10


def trace(point: Point, folder: Path, progress: Callable[[str], None] = lambda doing: None) -> tuple[Table, Path]:
    """Profile one generation of the point's subject after its warm-up; (costliest operators, trace file).

    The trace (*.pt.trace.json) opens in TensorBoard's profiler plugin and in Perfetto. Raises as `measure` does.
    """
    device = torch.device(point.device)
    found = checkpoint.find(point.model, point.torch_dtype)
    tokenizer = checkpoint.tokenizer(found)
    checkpoint.require_room(found, point)
    prompt = workload.prompt(point.workload, tokenizer)
    progress("loading")
    subject = contestant.load_alone(point, found, point.contestants[0], workload.pad_id(tokenizer))
    progress("warming up")
    subject.warm_up(prompt, point.workload.new_tokens, point.warmup)
    progress("profiling")
    folder = Path(folder) / _folder_name(point)
    before = set(folder.glob("*.json"))
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    # Without a name of its own the handler writes the host's name into the file's.
    handler = tensorboard_trace_handler(str(folder), worker_name=_folder_name(point))
    # The first call under the profiler pays for the profiler, so it is not recorded.
    phases = schedule(wait=0, warmup=1, active=1, repeat=1)
    with profile(activities=activities, schedule=phases, on_trace_ready=handler) as profiler:
        for _ in range(2):
            subject.generate(prompt, point.workload.new_tokens)
            profiler.step()
    (path,) = set(folder.glob("*.json")) - before
    _forget_machine(path)
    return _costliest(profiler.key_averages(), device), path


def _forget_machine(path: Path) -> None:
    """Take the host's name and this machine's path out of a trace: traces are shared."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r'^\s*"host_name":.*\n', "", text, count=1, flags=re.MULTILINE)
    text = re.sub(r'"traceName": *"[^"]*"', f'"traceName": "{path.name}"', text)
    path.write_text(text, encoding="utf-8")


def _folder_name(point: Point) -> str:
    model = point.model_name.replace(":", "-").replace("/", "-")
    return f"{model}-{point.contestants[0]}-{point.compile}"


def _costliest(events, device: torch.device) -> Table:
    on_device = device.type != "cpu"

    def micros(event) -> float:
        return event.self_device_time_total if on_device else event.self_cpu_time_total

    total = sum(map(micros, events)) or 1.0
    table = Table(title=f"the {_TOP} costliest operators on {device.type}", title_justify="left")
    table.add_column("operator", overflow="fold")
    for name in ("calls", "self ms", "share"):
        table.add_column(name, justify="right")
    for event in sorted(events, key=micros, reverse=True)[:_TOP]:
        # The profiler's own frame around the call holds what no operator does: the Python between them.
        name = "(between operators)" if event.key.startswith("ProfilerStep") else event.key
        table.add_row(name, str(event.count), f"{micros(event) / 1e3:.2f}", f"{micros(event) / total:.1%}")
    return table
