"""What a run would do: its points, which of them are done, about how long they take, and what they need."""

from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastllama.lab.memory import peak
from fastllama.lab.sweeping import estimate, sweep
from fastllama.lab.sweeping.plan import Plan

TO_DO, NO_ROOM, LEFT_OUT = "to do", "does not fit", "left out"


def _state(entry: dict | None, retry_failed: bool, room: peak.Fit) -> str:
    if sweep.is_done(entry, retry_failed):
        return "failed" if entry.get("status") == "failed" else "measured"
    return TO_DO if room.fits else NO_ROOM


def table(plan: Plan, file: Path | None, retry_failed: bool = False, only_memory: bool = False) -> Group:
    """The points by name. file: where a resumed sweep finds what it has. Nothing is built or loaded."""
    setting, held = sweep.Setting.of(plan.points, only_memory), sweep.known(file)
    dtypes: dict[str, set[str]] = {}
    for point in plan.points:
        dtypes.setdefault(point.device, set()).add(point.dtype)
    rates = {device: estimate.Rates.measure(device, names) for device, names in dtypes.items()}
    shown = Table(title="what would run", title_justify="left", padding=(0, 0, 0, 1))
    shown.add_column("point", overflow="fold")
    shown.add_column("", no_wrap=True)
    shown.add_column("about", justify="right", no_wrap=True)
    shown.add_column("predicted peak MB", justify="right")
    total_s, left = 0.0, 0
    for each in plan.planned:
        state = _state(held.get(setting.identity(each.point)), retry_failed, peak.fit(each.point, only_memory))
        duration_s = estimate.seconds(each.point, rates[each.point.device], only_memory) if state == TO_DO else 0.0
        total_s, left = total_s + duration_s, left + (state == TO_DO)
        names = each.point.contestants[:1] if only_memory else each.point.contestants
        peaks = [f"{name} {peak.predict(each.point, name).nbytes / 1e6:,.0f}" for name in names]
        shown.add_row(Text(each.name), state, estimate.words(duration_s) if state == TO_DO else "-", ", ".join(peaks))
    for name, _ in plan.left_out:
        shown.add_row(Text(name), LEFT_OUT, "-", "-")
    notes = [f"left out: {name}: {why}" for name, why in plan.left_out]
    total = f"{left} of {len(plan.planned)} points to measure, about {estimate.words(total_s)}"
    notes.append(f"{total}, right to a factor of two or three")
    return Group(shown, *map(Text, notes))
