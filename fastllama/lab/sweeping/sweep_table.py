"""The table that ends a run of several points."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastllama.lab.pages.table import PARITY_STYLES, number
from fastllama.lab.points import points_file
from fastllama.lab.sweeping import no_effect
from fastllama.lab.sweeping.plan import Plan

_FIGURES = ("tok_per_s", "decode_tok_per_s", "ttft_ms", "max_mem_mb")


def _cells(entry: dict) -> list:
    if not points_file.is_measured(entry):
        return ["-"] * (len(_FIGURES) + 1) + [Text(entry["status"], "bold red")]
    figures = [number(entry[name]) for name in _FIGURES]
    return [*figures, f"{entry['speedup']:.2f}x", Text(entry["parity"], PARITY_STYLES[entry["parity"]])]


def _marks(entries: list[dict]) -> tuple[dict[int, list[str]], list[str]]:
    """(what has no effect, by the entry's index; what is to be said about all)."""
    measured = [index for index, entry in enumerate(entries) if points_file.is_measured(entry)]
    try:
        found = no_effect.marks([entries[index] for index in measured])
    except ValueError as fault:  # scipy is an extra
        return {}, [f"what has no effect is not judged: {fault}"]
    return dict(zip(measured, found, strict=True)), []


def summary(plan: Plan, entries: list[dict]) -> Group:
    """One row for each of the plan's points, and below them why some were not measured and which had no effect."""
    table = Table(title="all points", title_justify="left", padding=(0, 0, 0, 1))
    table.add_column("point", overflow="fold")
    for name in ("tok/s", "decode\ntok/s", "first\ntoken ms", "peak\nMB", "speed-up"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("parity", no_wrap=True)
    marks, notes = _marks(entries)
    for index, (each, entry) in enumerate(zip(plan.planned, entries, strict=True)):
        table.add_row(Text(each.name), *_cells(entry))
        if not points_file.is_measured(entry):
            notes.append(f"{each.name}: {entry['status']}: {entry['reason']}")
        notes += [f"{each.name}: {text}" for text in marks.get(index, [])]
    notes += [f"{name}: left out: {why}" for name, why in plan.left_out]
    return Group(table, *map(Text, notes))
