"""A timeline of memory: a curve over the phases of one run, its peak, and what the peak was made of."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fastllama.lab.measuring.environment import environment
from fastllama.lab.memory.memory import _PACKAGE_PARENT
from fastllama.lab.points.point import Point
from fastllama.lab.records.words import dump_json
from fastllama.lab.tracing import timeline_plot

_FAULTS = {cls.__name__: cls for cls in (ValueError, OSError, MemoryError, RuntimeError)}
_HOLDS = {
    "libraries_mb": "the interpreter and its libraries",
    "weights_mb": "weights",
    "cache_mb": "cache",
    "rest_mb": "tensors in passing and the rest",
}


def _alone(point: Point, snapshot: Path | None) -> dict:
    """What `phases.watched` tells, from a new process: what this one holds must not count."""
    search = os.pathsep.join(filter(None, [_PACKAGE_PARENT, os.environ.get("PYTHONPATH")]))
    task = json.dumps({"point": asdict(point), "snapshot": None if snapshot is None else str(snapshot)})
    done = subprocess.run(
        [sys.executable, "-m", "fastllama.lab.tracing.phases"],
        input=task,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": search},
    )
    if done.returncode < 0:
        killer = signal.Signals(-done.returncode).name
        raise MemoryError(f"the process whose memory was watched was ended by {killer}: too little memory?")
    lines, errors = done.stdout.splitlines(), done.stderr.splitlines()
    told = json.loads(lines[-1]) if lines else {"fault": ("RuntimeError", (errors or ["no message"])[-1])}
    if "fault" in told:
        kind, why = told["fault"]
        raise _FAULTS[kind](f"watching the memory failed: {why}")
    return told


def composed(told: dict) -> list[dict]:
    """The phases of what `phases.watched` tells: seconds, and MB (10^6 bytes) at the peak and at the end.

    What a peak holds adds up to it: libraries (what was there before the load), weights, cache, and the rest. Weights
    that are mapped from the checkpoint's file are in no anonymous memory, and are added as they are at a phase's end.
    """
    libraries = told["samples"][0][1]
    phases = []
    for phase in told["phases"]:
        mapped = phase["mapped_bytes"]
        peak = phase["peak_bytes"] + mapped
        holds = {"libraries_mb": libraries, "weights_mb": told["weights_bytes"], "cache_mb": phase["cache_bytes"]}
        holds["rest_mb"] = peak - sum(holds.values())
        phases.append(
            {
                "phase": phase["name"],
                "start_s": phase["start_s"],
                "end_s": phase["end_s"],
                "peak_mb": peak / 1e6,
                "end_mb": (phase["end_bytes"] + mapped) / 1e6,
                "mapped_weights_mb": mapped / 1e6,
                **{name: nbytes / 1e6 for name, nbytes in holds.items()},
            }
        )
    return phases


def words(phases: list[dict], device: str, passing_bytes: int | None) -> list[str]:
    """At which phase the peak was, and what it was made of. `passing_bytes`: by torch's own account."""
    highest = max(phases, key=lambda phase: phase["peak_mb"])
    holds = ", ".join(f"{what} {highest[name]:,.1f}" for name, what in _HOLDS.items())
    given_back = highest["peak_mb"] - highest["end_mb"]
    where = "anonymous memory and mapped weights" if device == "cpu" else "allocated by torch"
    said = [
        f"The peak, {highest['peak_mb']:,.1f} MB ({where}), was in phase {highest['phase']}: {holds}.",
        f"By the end of that phase {given_back:,.1f} MB of it were given back.",
    ]
    if highest["rest_mb"] < 0:
        said.append(
            "The rest is below 0: libraries left memory that tensors took over, or part of the cache is unused."
        )
    if passing_bytes is not None:
        said.append(
            f"By torch's own account, a generation's passing tensors take {passing_bytes / 1e6:,.1f} MB at once."
        )
    return said


def table(phases: list[dict]) -> Table:
    """The phases, for a terminal."""
    made = Table(title="memory by phase, MB (what each peak holds adds up to it)", title_justify="left")
    made.add_column("phase")
    for column in ("s", "peak", "at the end", "libraries", "weights", "cache", "the rest"):
        made.add_column(column, justify="right")
    for phase in phases:
        values = (phase[name] for name in ("peak_mb", "end_mb", *_HOLDS))
        made.add_row(phase["phase"], f"{phase['end_s'] - phase['start_s']:.2f}", *(f"{v:,.1f}" for v in values))
    return made


def allocations_table(allocations: list[dict]) -> Table:
    """Which operators allocate, for a terminal."""
    made = Table(title="the operators that allocate most in one generation", title_justify="left")
    made.add_column("operator", overflow="fold")
    for column in ("calls", "MB in all"):
        made.add_column(column, justify="right")
    for row in allocations:
        made.add_row(row["operator"], str(row["calls"]), f"{row['mb']:,.2f}")
    return made


def file_stem(point: Point) -> str:
    """The name of a timeline's files, by point."""
    names = (point.model_name, point.dtype, point.contestants[0], point.compile, point.name)
    return re.sub(r"[^\w.]+", "-", " ".join(names).replace("=", ""))


def timeline(point: Point, folder: Path) -> tuple[dict, list[Path]]:
    """Watch one run of the point's subject; (what was seen, the files written): JSON, and PNG and SVG where matplotlib
    is. Raises as `memory.peaks` does."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = file_stem(point)
    snapshot = folder / f"{stem}.snapshot.pickle" if torch.device(point.device).type == "cuda" else None
    told = _alone(point, snapshot)
    phases = composed(told)
    curve = [[at, nbytes / 1e6] for at, nbytes in told["samples"]]
    seen = {
        **point.identity(),
        "subject": told["subject"],
        "phases": phases,
        "words": words(phases, torch.device(point.device).type, told["passing_bytes"]),
        "samples_s_mb": curve,
        "allocations": told["allocations"],
        "passing_mb": None if told["passing_bytes"] is None else told["passing_bytes"] / 1e6,
        "environment": environment(torch.device(point.device)),
        "command": point.command(),
    }
    files = [folder / f"{stem}.json"]
    dump_json(files[0], seen)
    if timeline_plot.can_draw():
        files += [timeline_plot.draw(seen, folder / f"{stem}{suffix}") for suffix in (".png", ".svg")]
    return seen, files + ([snapshot] if snapshot is not None else [])


def run(points: list[Point], logs: Path, console: Console) -> int:
    """Watch each point, and say what was seen; the exit code."""
    for point in points:
        seen, files = timeline(point, logs / "memory")
        if len(points) > 1:
            console.print(point.name)
        console.print(table(seen["phases"]))
        console.print(allocations_table(seen["allocations"]))
        for sentence in seen["words"]:
            console.print(sentence)
        for path in files:
            print(f"timeline: {path}")
    if not timeline_plot.can_draw():
        print('not drawn: drawing needs matplotlib: pip install -e ".[plot]"', file=sys.stderr)
    return 0
