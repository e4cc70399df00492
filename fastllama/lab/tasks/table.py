"""The table of a task: a row per example, and averages over their totals."""

from statistics import median

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastllama.lab.pages.table import PARITY_STYLES, number
from fastllama.lab.points import figures

HEADS = (
    "example",
    "prompt\ntokens",
    "new",
    "end to\nend\ntok/s",
    "prefill\nms",
    "draft\ns",
    "target\ns",
    "tokens\na for-\nward",
    "accep-\ntance",
    "speed-\nup",
    "ids",
)


def seconds(runs: list[dict]) -> float:
    """The median of a whole call."""
    return median(run["total_s"] for run in runs)


def prefill_ms(line: dict) -> float:
    """To the first token: with assistance as the calls report it, draft included; else of a call for one token."""
    return line["ttft_ms"] if line["assisted"] is None else 1000 * line["assisted"]["prefill_s"]


def totals(lines: list[dict]) -> dict:
    """Sums over the examples, and the averages that follow from the sums."""
    whole = sum(seconds(line["runs"]) for line in lines)
    tokens = sum(line["new_tokens"] for line in lines)
    found = {
        "prompt_length": sum(line["prompt_length"] for line in lines),
        "new_tokens": tokens,
        "seconds": whole,
        "tok_per_s": tokens / whole,
        "prefill_ms": sum(map(prefill_ms, lines)),
    }
    if any(line["assisted"] is None for line in lines):
        return found
    parts = [line["assisted"] for line in lines]
    reports = [report for part in parts for report in part["reports"]]
    count = {name: sum(report[name] for report in reports) for name in reports[0] if name != "mode"}
    return found | {
        "draft_s": sum(part["draft_s"] for part in parts),
        "target_s": sum(part["target_s"] for part in parts),
        "tokens_per_target_forward": count["new_tokens"] / count["target_forwards"],
        "acceptance": count["accepted_tokens"] / count["draft_tokens"] if count["draft_tokens"] else None,
        "speedup_end_to_end": sum(seconds(part["unassisted"]["runs"]) for part in parts) / whole,
        "switched_off": count["switched_off"],
    }


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _assisted_cells(found: dict) -> list[str]:
    if "draft_s" not in found:
        return ["-"] * 5
    return [
        f"{found['draft_s']:.3f}",
        f"{found['target_s']:.3f}",
        number(found["tokens_per_target_forward"]),
        _share(found["acceptance"]),
        f"{found['speedup_end_to_end']:.2f}",
    ]


def cells(line: dict) -> list[str]:
    """The row of an example but for its ids' verdict."""
    start = [line["example"], str(line["prompt_length"]), str(line["new_tokens"]), number(line["tok_per_s"])]
    return [*start, number(prefill_ms(line)), *_assisted_cells(line["assisted"] or {})]


def total_cells(lines: list[dict]) -> list[str]:
    """The last row."""
    found = totals(lines)
    start = ["total", str(found["prompt_length"]), str(found["new_tokens"]), number(found["tok_per_s"])]
    return [*start, number(found["prefill_ms"]), *_assisted_cells(found)]


def of(lines: list[dict]) -> Group:
    """The lines of one run of a task, for a terminal."""
    first, shown = lines[0], Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, title_justify="left")
    how = figures.assistance(first) if first["assisted"] is not None else "unassisted"
    shown.title = f"task {first['task']}: {first['model']} {first['dtype']}, {how}, on {first['device']}"
    for place, head in enumerate(HEADS):
        text, least = place in (0, len(HEADS) - 1), 12 if place == 0 else None
        shown.add_column(head, justify="left" if text else "right", overflow="fold", no_wrap=place > 0, min_width=least)
    for line in lines:
        shown.add_row(*map(Text, cells(line)), Text(_verdict(line), PARITY_STYLES[line["parity"]]))
    shown.add_section()
    shown.add_row(*map(Text, total_cells(lines)), "")
    notes = [f"path: {first['path']}"]
    notes += ["forward: of the target; speed-up: over the unassisted run"] if first["assisted"] is not None else []
    notes.append(f"medians of {len(first['runs'])} runs; the last row has sums, and averages over them")
    found = totals(lines)
    if "switched_off" in found:
        notes.append(f"assistance switched itself off {found['switched_off']} times in all timed runs")
    return Group(shown, *map(Text, notes))


def _verdict(line: dict) -> str:
    """Beside vanilla; and beside unassisted, where that is another verdict."""
    beside = line["parity"] if line["assisted"] is None else line["assisted"]["parity"]
    return line["parity"] if beside == line["parity"] else f"{line['parity']}, unassisted: {beside}"
