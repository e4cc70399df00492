"""Memory over time, watched from within: `python -m fastllama.lab.tracing.phases` loads and generates once.

On a CPU a thread reads the process's anonymous memory; on an accelerator it asks torch's allocator, which also keeps
each phase's exact peak and, on CUDA, a snapshot that https://pytorch.org/memory_viz shows.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import fastllama
from fastllama.lab.fault import sentence
from fastllama.lab.measuring import checkpoint, contestant
from fastllama.lab.measuring.contestant import Contestant, synchronize
from fastllama.lab.memory import memory
from fastllama.lab.points import workload
from fastllama.lab.points.point import Point

_POLL_S = 0.002
_SAME = 2**16  # bytes by which neighbouring samples may differ and be one line
_TOP = 8
_FAULTS = (ValueError, OSError, MemoryError, RuntimeError)


class Watch:
    """Samples (seconds, bytes) from a thread, and the phases they fell into."""

    def __init__(self, device: torch.device, poll_s: float = _POLL_S):
        self.device, self.poll_s = device, poll_s
        self.samples: list[tuple[float, int]] = []
        self.phases: list[dict] = []
        self._start = time.perf_counter()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *unused) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self.poll_s):
            self.sample()

    def sample(self) -> None:
        """Take one sample now."""
        if self.device.type == "cpu":
            now = memory._anonymous_bytes(os.getpid())
        else:
            now = torch.accelerator.memory_allocated(self.device)
        self.samples.append((time.perf_counter() - self._start, now))

    def begin(self, name: str) -> None:
        """A phase begins."""
        synchronize(self.device)
        self.sample()
        if self.device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(self.device)
        self.phases.append({"name": name, "start_s": self.samples[-1][0]})

    def end(self, model: torch.nn.Module) -> None:
        """The phase that began last ends, with `model` as it is now."""
        synchronize(self.device)
        self.sample()
        phase, (now, nbytes) = self.phases[-1], self.samples[-1]
        peak = max(nbytes for at, nbytes in self.samples if at >= phase["start_s"])
        mapped = memory.mapped_bytes(model) or 0 if self.device.type == "cpu" else 0
        if self.device.type != "cpu":
            peak = torch.accelerator.max_memory_allocated(self.device)
        phase |= {"end_s": now, "peak_bytes": peak, "end_bytes": nbytes, "mapped_bytes": mapped}


def thinned(samples: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """In order of time, without the samples that lie on a level line between their neighbours."""
    ordered = sorted(samples)
    kept = ordered[:1]
    for sample, following in pairwise(ordered[1:]):
        if abs(sample[1] - kept[-1][1]) > _SAME or abs(following[1] - sample[1]) > _SAME:
            kept.append(sample)
    return kept + ordered[1:][-1:]


@contextmanager
def _preallocation(watch: Watch) -> Iterator[None]:
    """Within it, preallocating is a phase of its own."""
    plain = fastllama.LlamaForCausalLM.preallocate

    def preallocate(self, *args, **kwargs):
        watch.end(self)
        watch.begin("preallocate")
        return plain(self, *args, **kwargs)

    with patch.object(fastllama.LlamaForCausalLM, "preallocate", preallocate):
        yield


@contextmanager
def _first_pass(subject: Contestant, then: Callable[[], None]) -> Iterator[None]:
    """Within it, `then` is called once, after the first forward pass."""
    model, called = subject.model, False

    def after(*unused) -> None:
        nonlocal called
        if not called:
            called = True
            then()

    if subject.name != "ours":
        handle = model.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()
        return
    plain = model._engine.prefill

    def prefill(*args, **kwargs):
        out = plain(*args, **kwargs)
        after()
        return out

    with patch.object(model._engine, "prefill", prefill):
        yield


def _cache_bytes(subject: Contestant, point: Point, positions: int) -> int:
    if subject.name == "ours":
        engine = subject.model._engine
        return engine.cache.shape.nbytes + engine.rotary.nbytes
    held = {"compiled": point.workload.total_length, "static": point.positions}.get(subject.name, positions)
    config, itemsize = subject.model.config, point.torch_dtype.itemsize
    return checkpoint.position_bytes(config, itemsize) * point.workload.batch_size * held


def _passing_bytes(profiler, on_device: bool) -> int | None:
    """The most that torch's allocator held at once beyond what it held at first; None where torch keeps no account."""
    results = getattr(profiler.profiler, "kineto_results", None)
    if results is None:
        return None
    records = [event for event in results.events() if event.name() == "[memory]"]
    records = [event for event in records if (event.device_type() != DeviceType.CPU) is on_device]
    changes = sorted((event.start_ns(), event.nbytes()) for event in records)
    return max(accumulate((nbytes for _, nbytes in changes), initial=0))


def _allocations(subject: Contestant, prompt, new_tokens: int) -> tuple[list[dict], int | None]:
    """The operators that allocate most in one generation, MB each over all calls, less what they freed again; and
    what tensors in passing took at once, in bytes."""
    on_device = subject.model.device.type != "cpu"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (subject.model.device.type == "cuda")
    with profile(activities=activities, profile_memory=True) as profiler:
        subject.generate(prompt, new_tokens)
    field = "self_device_memory_usage" if on_device else "self_cpu_memory_usage"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, field))[:_TOP]
    operators = [
        {"operator": event.key, "calls": event.count, "mb": getattr(event, field) / 1e6}
        for event in events
        if getattr(event, field) > 0
    ]
    return operators, _passing_bytes(profiler, on_device)


def watched(point: Point, snapshot: Path | None = None) -> dict:
    """The point's subject loads, preallocates, prefills and decodes under a watch; JSON-ready, bytes and seconds.

    `snapshot`: where CUDA's allocator leaves its history. Raises as `memory.peaks` does.
    """
    device = torch.device(point.device)
    found = checkpoint.find(point.model, point.torch_dtype)
    tokenizer = checkpoint.tokenizer(found)
    checkpoint.require_room(found, point)
    prompt = workload.prompt(point.workload, tokenizer)
    new_tokens, longest = point.workload.new_tokens, point.workload.prompt_length
    if device.type == "cuda" and snapshot is not None:
        # Without the stacks, which would hold this machine's paths.
        torch.cuda.memory._record_memory_history(context=None)
    with Watch(device) as watch:
        watch.begin("load")
        with _preallocation(watch):
            subject = contestant.load_alone(point, found, point.contestants[0], workload.pad_id(tokenizer))
        watch.end(subject.model)
        watch.begin("prefill")

        def decode() -> None:
            watch.end(subject.model)
            watch.begin("decode")

        with _first_pass(subject, decode):
            subject.generate(prompt, new_tokens)
        watch.end(subject.model)
    if device.type == "cuda" and snapshot is not None:
        torch.cuda.memory._dump_snapshot(str(snapshot))
        torch.cuda.memory._record_memory_history(enabled=None)
    for phase in watch.phases:
        ours, done = subject.name == "ours", {"prefill": longest, "decode": longest + new_tokens - 1}
        empty = phase["name"] == "load" or (phase["name"] not in done and not ours)
        phase["cache_bytes"] = 0 if empty else _cache_bytes(subject, point, done.get(phase["name"], 0))
    allocations, passing = _allocations(subject, prompt, new_tokens)
    return {
        "subject": subject.name,
        "samples": thinned(watch.samples),
        "phases": watch.phases,
        "weights_bytes": found.weight_bytes(point.torch_dtype, point.weights),
        "allocations": allocations,
        "passing_bytes": passing,
    }


def _child() -> int:
    task = json.load(sys.stdin)
    try:
        told = watched(Point.from_dict(task["point"]), Path(task["snapshot"]) if task["snapshot"] else None)
    except _FAULTS as fault:
        kind = next(cls.__name__ for cls in _FAULTS if isinstance(fault, cls))
        print(json.dumps({"fault": [kind, sentence(fault)]}))
        return 2
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(_child())
