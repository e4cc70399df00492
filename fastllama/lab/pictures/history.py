"""A picture of changes.md: each group's "x vanilla" over its commits in order, with smallest and largest.

matplotlib is an extra and is imported where it is needed.
"""

import textwrap
from pathlib import Path

from fastllama.lab.measuring import statistics
from fastllama.lab.pictures import canvas
from fastllama.lab.points import figures
from fastllama.lab.records import changes

_LABELS = 30  # commits whose names fit beside each other
_TOGETHER = 8  # groups that one panel can tell apart


def series(records: list[dict]) -> dict[str, list[dict]]:
    """By "machine: workload" each commit's own record that has vanilla beside it and a decode speed, in order."""
    found = {}
    for machine, workloads in changes.groups(records).items():
        for rows in workloads.values():
            own = [row for row in changes.own_rows(rows) if row["baseline"] and row["decode_speedup"]]
            if own:
                found[f"{machine}: {figures.workload_name(own[0])}"] = own
    return found


def _panel(axes, groups: list[list[dict]], commits: list[str]) -> None:
    width = min(0.16, 0.7 / len(groups))
    for index, rows in enumerate(groups):
        # Beside each other, so that no whisker hides another.
        offset = (index - (len(groups) - 1) / 2) * width
        medians = [row["decode_speedup"] for row in rows]
        ratios = [statistics.ratios_to_vanilla(row) for row in rows]
        style = canvas.style(index)
        axes.errorbar(
            [commits.index(row["commit"]) + offset for row in rows],
            medians,
            yerr=canvas.reaches(medians, [(min(each), max(each)) for each in ratios]),
            label=textwrap.fill(figures.workload_name(rows[0]), 66),
            **canvas.WHISKER | {"ecolor": style["color"]},
            **style,
        )
    axes.axhline(1, color="black", lw=0.8, linestyle=(0, (1, 2)))
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.8), max(high, 2.2))  # so that two ticks tell the scale
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="y", color=canvas.GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlim(-0.5, len(commits) - 0.5)
    shown = range(0, len(commits), -(-len(commits) // _LABELS))
    axes.set_xticks(shown, [commits[place][:7] for place in shown], rotation=90, fontsize=8)
    axes.set_ylabel("decode tok/s, x vanilla of the same run:\nmedian, smallest, largest")


def timeline(records: list[dict], path: Path) -> Path:
    """Draw every group as a line over the commits, panels by machine, narrow enough for the page of a phone.

    path: .png or .svg; returns it. ValueError if no record has vanilla beside it.
    """
    path, plt = canvas.target(path), canvas.pyplot()
    found = series(records)
    if not found:
        raise ValueError("no record has a decode speed beside vanilla's, so there is no timeline to draw")
    drawn = {row["commit"] for rows in found.values() for row in rows}
    commits = [sha for sha in dict.fromkeys(row["commit"] for row in records) if sha in drawn]
    machines: dict[str, list[list[dict]]] = {}
    for rows in found.values():
        machines.setdefault(figures.machine_name(rows[0]), []).append(rows)
    panels = [
        (machine, groups[start : start + _TOGETHER])
        for machine, groups in machines.items()
        for start in range(0, len(groups), _TOGETHER)
    ]
    heights = [3.4 + 0.2 * len(groups) for _, groups in panels]
    figure = plt.figure(figsize=(5.6, sum(heights)), layout="constrained")
    places = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for (machine, groups), place in zip(panels, places, strict=True):
        axes = place.subplots()
        _panel(axes, groups, commits)
        axes.set_title(textwrap.fill(machine, 70), fontsize=9, loc="left")
        place.legend(frameon=False, fontsize=8, loc="outside lower left")
    return canvas.save(plt, figure, path)
