"""run_llama.py --task: a table of examples in place of a point."""

from pathlib import Path

from rich.console import Console

from fastllama.lab.measuring.progress import progress
from fastllama.lab.tasks import run as examples
from fastllama.lab.tasks import table


def run(task: str, given: dict, runs: int, warmup: int, json: Path | None) -> int:
    """Measures the examples, each a line of `json` as soon as it is there; prints the table. Returns the exit code."""
    planned = examples.plan(task, given, runs, warmup)
    with progress(planned.steps) as begin:
        lines = examples.run(planned, json, begin)
    Console().print(table.of(lines))
    return 0
