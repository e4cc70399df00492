"""Several points, one after the other: kept as soon as they are measured, and not measured twice."""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

from fastllama.lab import digest, measure, record
from fastllama.lab.fault import sentence
from fastllama.lab.point import Point
from fastllama.lab.workload import Workload

BATCH_SIZES = [1, 2, 4, 8, 16, 32, 64, 128]
PROMPT_LENGTHS = [100, 200, 400, 800, 1600]
RUNS = 10


def workloads(batch_sizes: list[int], prompt_lengths: list[int], new_tokens: list[int], **rest) -> Iterator[Workload]:
    """The product of the sizes, the last varying fastest."""
    for batch_size, prompt_length, count in product(batch_sizes, prompt_lengths, new_tokens):
        yield Workload(batch_size, prompt_length, count, **rest)


def file_name(kind: str, point: Point) -> str:
    """Where a sweep keeps its points, when it is not told: one file per model, dtype, device and way to run."""
    way = "preallocate" if point.preallocate else "vanilla"
    model = point.model_name.replace(":", "-").replace("/", "-")
    return f"{kind}-{model}-{point.dtype}-{point.device.replace(':', '-')}-{way}-{point.compile}.jsonl"


def identity(command: str, source_sha256: str) -> tuple[str, str]:
    """Two points are the same if one command line names both and the same source measured them."""
    return command, source_sha256


def measured(path: Path) -> dict[tuple, dict]:
    """The points that a file already holds, by identity. `ValueError` if a line is not a point."""
    if not Path(path).exists():
        return {}
    found = {}
    for number, point in enumerate(record.read_jsonl(path), 1):
        if not isinstance(point, dict) or "command" not in point:
            raise ValueError(f"{path}: line {number} is not a measured point")
        found[identity(point["command"], point.get("source_sha256"))] = point
    return found


def run(
    points: list[Point],
    *,
    file: Path | None,
    resume: bool,
    begin: Callable[[str], None],
    show: Callable[[dict], None],
    say: Callable[[str], None],
) -> tuple[list[dict], int]:
    """Measure the points in order; (records, how many failed).

    Each record is appended to `file` before it is shown and before the next point starts. With `resume`, a
    point that the file holds is taken from there. A point that fails is reported with `say`, and the next
    one starts; if it is the only one, its error is raised.
    """
    source_sha256 = record.source_sha256()
    known = measured(file) if resume and file is not None else {}
    records, failures = [], 0
    for point in points:
        old = known.get(identity(point.command(), source_sha256))
        if old is not None:
            say(f"already in {file}: {_words(point)}")
            records.append(old)
            continue
        try:
            measured_point = measure.measure(point, begin)
        except (ValueError, OSError, MemoryError, RuntimeError) as fault:
            if len(points) == 1:
                raise
            say(f"error: {_words(point)}: {sentence(fault)}")
            failures += 1
            continue
        measured_point = digest.seal({**measured_point, "source_sha256": source_sha256})
        if file is not None:
            record.append_jsonl(file, measured_point)
        records.append(measured_point)
        show(measured_point)
    return records, failures


def _words(point: Point) -> str:
    work = point.workload
    return f"batch {work.batch_size}, prompt {work.prompt_length}, {work.new_tokens} new tokens"
