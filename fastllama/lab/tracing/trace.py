"""A profile: one short generation, its trace on disk, its costliest operators and what its parts took."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from fastllama.kernels.whole_file import whole
from fastllama.lab.measuring import checkpoint, contestant, matrix
from fastllama.lab.measuring.ceiling import Ceiling
from fastllama.lab.measuring.environment import environment
from fastllama.lab.measuring.progress import progress
from fastllama.lab.points import workload
from fastllama.lab.points.point import Point
from fastllama.lab.records.words import dump_json
from fastllama.lab.tracing.breakdown import breakdown
from fastllama.lab.tracing.breakdown_words import Measured, as_json, decode_words, prefill_words, table
from fastllama.lab.tracing.marks import PREFIX, marked
from fastllama.lab.tracing.parts import shape_of

NEW_TOKENS = 10
_TOP = 10
_TIMED = 3


@dataclass(frozen=True)
class Traced:
    """What a profile shows: tables and sentences for people, and the two files that hold the rest."""

    tables: list[Table]
    words: list[str]
    path: Path
    breakdown_path: Path


def trace(point: Point, folder: Path, begin: Callable[[str], None] = lambda doing: None) -> Traced:
    """Profile one generation of the point's subject after its warm-up.

    The trace (*.pt.trace.json) opens in TensorBoard's profiler plugin and in Perfetto; beside it lies its breakdown
    (*.breakdown.json). Raises as `measure` does.
    """
    device = torch.device(point.device)
    found = checkpoint.find(point.model, point.torch_dtype)
    tokenizer = checkpoint.tokenizer(found)
    checkpoint.require_room(found, point)
    prompt = workload.prompt(point.workload, tokenizer)
    begin("loading")
    ceiling = Ceiling(device)
    ceiling.measure()
    subject = contestant.load_alone(point, found, point.contestants[0], workload.pad_id(tokenizer))
    begin("warming up")
    new_tokens = point.workload.new_tokens
    subject.warm_up(prompt, new_tokens, point.warmup)
    timed = [[subject.generate(prompt, count)[1] for count in (1, new_tokens)] for _ in range(_TIMED)]
    first_s, whole_s = (median(times) for times in zip(*timed, strict=True))
    begin("profiling")
    folder = Path(folder) / _folder_name(point)
    before = set(folder.glob("*.json"))
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    # Without a name of its own the handler writes the host's name into the file's.
    handler = tensorboard_trace_handler(str(folder), worker_name=_file_name(point))
    # The first call under the profiler pays for the profiler, so it is not recorded.
    phases = schedule(wait=0, warmup=1, active=1, repeat=1)
    with (
        marked(subject) as restart,
        profile(activities=activities, schedule=phases, on_trace_ready=handler) as profiler,
    ):
        for _ in range(2):
            restart()
            subject.generate(prompt, new_tokens)
            profiler.step()
    (path,) = set(folder.glob("*.json")) - before
    _forget_machine(path)
    ceiling.measure()
    measured = Measured(first_s, whole_s, ceiling.gb_per_s, matrix.tflop_per_s(point.torch_dtype, device))
    shape = shape_of(subject, prompt.lengths, new_tokens)
    prefill, decode = breakdown(profiler.events(), shape, device.type != "cpu")
    tables = [table("prefill", prefill, shape, ceiling.gb_per_s)]
    words = prefill_words(prefill, shape, measured)
    kept = {**point.identity(), **asdict(measured), "prefill": as_json(prefill, shape, ceiling.gb_per_s)}
    if decode is not None:
        tables.append(table("a decode step", decode, shape, ceiling.gb_per_s))
        words += decode_words(decode, shape, measured)
        kept["decode"] = as_json(decode, shape, ceiling.gb_per_s)
    kept |= {"words": words, "environment": environment(device), "command": point.command()}
    breakdown_path = path.with_name(path.name.replace(".pt.trace.json", ".breakdown.json"))
    dump_json(breakdown_path, kept)
    return Traced([_costliest(profiler.key_averages(), device), *tables], words, path, breakdown_path)


def _forget_machine(path: Path) -> None:
    """Take the host's name and this machine's path out of a trace: traces are shared."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r'^\s*"host_name":.*\n', "", text, count=1, flags=re.MULTILINE)
    text = re.sub(r'"traceName": *"[^"]*"', f'"traceName": "{path.name}"', text)
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _folder_name(point: Point) -> str:
    model = point.model_name.replace(":", "-").replace("/", "-")
    return f"{model}-{point.contestants[0]}-{point.compile}"


def _file_name(point: Point) -> str:
    """A trace's own name, by which the points of a sweep are told apart in one folder."""
    return re.sub(r"[^\w.]+", "-", f"{_folder_name(point)} {point.name}".replace("=", ""))


def _costliest(events, device: torch.device) -> Table:
    on_device = device.type != "cpu"

    def micros(event) -> float:
        return event.self_device_time_total if on_device else event.self_cpu_time_total

    times: dict[str, list[tuple]] = {}
    for event in events:
        mark = event.key.removeprefix(PREFIX) if event.key.startswith(PREFIX) else None
        # The profiler's own frame around the call, and a mark's, hold what no operator does: the Python between them.
        python = event.key.startswith("ProfilerStep") or mark not in (None, "native step")
        name = "(between operators)" if python else mark or event.key
        times.setdefault(name, []).append((event.count, micros(event)))
    sums = {name: tuple(map(sum, zip(*found, strict=True))) for name, found in times.items()}
    total = sum(us for _, us in sums.values()) or 1.0
    made = Table(title=f"the {_TOP} costliest operators on {device.type}", title_justify="left")
    made.add_column("operator", overflow="fold")
    for name in ("calls", "self ms", "share"):
        made.add_column(name, justify="right")
    for name, (count, us) in sorted(sums.items(), key=lambda item: -item[1][1])[:_TOP]:
        calls = "" if name == "(between operators)" else str(count)
        made.add_row(name, calls, f"{us / 1e3:.2f}", f"{us / total:.1%}")
    return made


def run(points: list[Point], logs: Path, console: Console) -> int:
    """Profile each point, and say what was found; the exit code."""
    for point in points:
        with progress(3) as begin:
            traced = trace(point, logs / "traces", begin)
        if len(points) > 1:
            console.print(point.name)
        for made in traced.tables:
            console.print(made)
        for sentence in traced.words:
            console.print(sentence)
        print(f"trace: {traced.path}")
        print(f"breakdown: {traced.breakdown_path}")
    return 0
