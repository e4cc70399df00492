"""A plan's points, one after the other: kept as soon as they are measured, and not measured twice."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastllama.lab.devices.world import is_lost
from fastllama.lab.fault import sentence
from fastllama.lab.measuring import measure
from fastllama.lab.measuring.environment import environment
from fastllama.lab.memory import peak_only
from fastllama.lab.memory.peak import Fit, fit
from fastllama.lab.points import figures, points_file
from fastllama.lab.points.point import Point
from fastllama.lab.records import record
from fastllama.lab.sweeping.plan import Plan, Planned

Identity = tuple[str, str, str]


def identity(entry: dict) -> Identity:
    """Two entries are the same point if one command line names both, on the same source and machine."""
    return entry["command"], entry.get("source_sha256", ""), figures.machine_name(entry)


@dataclass(frozen=True)
class Setting:
    """What every point of a run shares: the sources, and the facts of the machine by device."""

    source_sha256: str
    environments: dict[str, dict]
    only_memory: bool = False

    @classmethod
    def of(cls, points: list[Point], only_memory: bool = False) -> "Setting":
        devices = {point.device for point in points}
        environments = {device: environment(torch.device(device)) for device in devices}
        return cls(record.source_sha256(), environments, only_memory)

    def entry(self, point: Point) -> dict:
        """What names a point in a file, whether it was measured or not."""
        return {
            **point.identity(),
            "command": point.command() + (" --memory-only" if self.only_memory else ""),
            "source_sha256": self.source_sha256,
            "environment": self.environments[point.device],
        }

    def identity(self, point: Point) -> Identity:
        return identity(self.entry(point))


def known(file: Path | None) -> dict[Identity, dict]:
    """What a file already holds, the last entry of each point. `ValueError` if a line is no entry."""
    return {} if file is None else {identity(entry): entry for entry in points_file.read(file)}


def is_done(entry: dict | None, retry_failed: bool) -> bool:
    """Whether a resumed sweep leaves a point as it is.

    What was skipped is judged again, since another moment has other memory; what failed is kept, since it would
    fail again, unless it shall be tried anew.
    """
    if entry is None or entry.get("status") == "skipped":
        return False
    return points_file.is_measured(entry) or points_file.is_memory(entry) or not retry_failed


def run(
    plan: Plan,
    *,
    file: Path | None,
    resume: bool,
    begin: Callable[[str], None],
    show: Callable[[dict], None],
    say: Callable[[str], None],
    retry_failed: bool = False,
    only_memory: bool = False,
) -> list[dict]:
    """Measure the points in order; the entry of each, measured, failed or skipped.

    only_memory: nothing but each subject's peak of memory is predicted and measured, by one run of it (peak_only.py).

    Each is appended to `file` before it is shown and before the next point starts. With `resume`, a point that the
    file holds is taken from there (see `is_done`). A point that cannot fit in memory is skipped and one that fails
    is kept with the reason; both are reported with `say`, and the next one starts. If nothing is varied,
    the one point's error is raised.
    """
    setting = Setting.of(plan.points, only_memory)
    held = known(file) if resume else {}
    for name, reason in plan.left_out:
        say(f"left out: {name}: {reason}")
    entries = []
    for each in plan.planned:
        old = held.get(setting.identity(each.point))
        if is_done(old, retry_failed):
            say(f"already in {file}: {each.name}" + _failed(old))
            entries.append(old)
            continue
        entry = _one(each, setting, begin, alone=not plan.axes)
        # A point that is skipped as before is in the file already.
        if file is not None and not (old is not None and entry.get("status") == old.get("status") == "skipped"):
            points_file.append(file, entry)
        entries.append(entry)
        if points_file.is_measured(entry):
            show(entry)
        elif points_file.is_memory(entry):
            say(f"{each.name}: {peak_only.words(entry)}")
        else:
            say(f"{'error' if entry['status'] == 'failed' else 'skipped'}: {each.name}: {entry['reason']}")
    return entries


def exit_code(entries: list[dict]) -> int:
    """2 if a point failed, or if none was measured; what was skipped beside others was foreseen, and is no error."""
    statuses = {entry.get("status") for entry in entries}
    return 2 if "failed" in statuses or statuses == {"skipped"} else 0


def _failed(entry: dict) -> str:
    if points_file.is_memory(entry):
        return f" ({peak_only.words(entry)})"
    return "" if points_file.is_measured(entry) else f" (failed: {entry['reason']}; --retry-failed tries again)"


def _one(each: Planned, setting: Setting, begin: Callable[[str], None], alone: bool) -> dict:
    """The entry of one point. If it is alone, what keeps it from being measured is raised."""
    point = each.point
    try:
        room = fit(point, setting.only_memory)
        if room.fits and setting.only_memory:
            return {**setting.entry(point), **peak_only.measure(point, begin)}
        if room.fits:
            entry = measure.measure(point, begin)
            entry.setdefault("source_sha256", setting.source_sha256)
            return entry
        if alone:
            raise MemoryError(f"{point.model_name} cannot run: {room}")
        return _skipped(point, setting, room)
    except Exception as fault:
        # Whatever ends one point must not end those after it, unless it is another process that ended.
        if alone or is_lost(fault):
            raise
        entry = _unmeasured(point, setting, "failed", _without_paths(_reason(fault), point))
    measure.release(point, [])  # what the failure's frames held is free only now
    return entry


def _reason(fault: Exception) -> str:
    known = isinstance(fault, (ValueError, OSError, MemoryError))
    return sentence(fault) if known else f"{type(fault).__name__}: {sentence(fault)}"


def _without_paths(reason: str, point: Point) -> str:
    """A folder's path is this machine's business, as in Point."""
    reason = reason.replace(point.model, point.model_name)
    draft = point.assistance.draft
    return reason if draft is None else reason.replace(draft, point.identity()["assisted"]["draft"])


def _unmeasured(point: Point, setting: Setting, status: str, reason: str, **more) -> dict:
    head = {"schema": points_file.SCHEMA, "status": status, "reason": reason}
    return {**head, **setting.entry(point), **more}


def _skipped(point: Point, setting: Setting, room: Fit) -> dict:
    more = {"predicted_mb": room.needed / 1e6, "free_mb": room.free / 1e6}
    return _unmeasured(point, setting, "skipped", str(room), **more)
