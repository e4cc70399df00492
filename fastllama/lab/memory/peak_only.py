"""Memory alone: the peak of a point's subject, predicted, and then measured in one run of it in a new process.

No clock takes part, so that it may be paused, and go on beside other work.
"""

from collections.abc import Callable
from dataclasses import asdict, replace

from fastllama.lab.memory import memory, peak
from fastllama.lab.points import points_file
from fastllama.lab.points.point import Point
from fastllama.lab.points.workload import Workload

_rehearsed: set[str] = set()


def measure(point: Point, progress: Callable[[str], None] = lambda doing: None) -> dict:
    """Predicted and measured bytes, MB (10^6) each, as a line of a file of points takes them.

    Raises as `memory.peaks` does.
    """
    name = point.contestants[0]
    progress(f"the base of {name}")
    predicted = peak.predict(point, name, peak.measured_base(point, name))
    if name == "ours":
        progress("choosing the products")
        _rehearse(point)
    progress(f"memory of {name}")
    seen = asdict(memory.peaks(point, name))
    del seen["load_s"]  # of a run that may have been paused
    return {
        "schema": points_file.SCHEMA,
        "status": "memory",
        "reason": "only memory was measured",
        "subject": name,
        "predicted_mb": predicted.nbytes / 1e6,
        "predicted_parts_mb": {part: nbytes / 1e6 for part, nbytes in asdict(predicted).items()},
        **seen,
    }


def _rehearse(point: Point) -> None:
    """Has the products measured, which takes memory on a machine's first use of a model and none later."""
    new_tokens = 1 + point.assistance.active * point.assistance.tokens  # a draft has to fit
    small = replace(point, workload=Workload(point.workload.batch_size, 16, new_tokens), cache_length=None)
    if small.command() not in _rehearsed:
        memory.peaks(small, "ours")
        _rehearsed.add(small.command())


def error(entry: dict) -> float:
    """By which share of the measured peak the predicted one is above it."""
    return entry["predicted_mb"] / entry["max_mem_mb"] - 1


def words(entry: dict) -> str:
    """Predicted and measured, for people."""
    return (
        f"{entry['subject']}: predicted {entry['predicted_mb']:,.0f} MB, measured {entry['max_mem_mb']:,.0f} MB "
        f"({error(entry):+.1%})"
    )
