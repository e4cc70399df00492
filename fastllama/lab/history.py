"""A picture of changes.md: each group's "x vanilla" over its commits in order, with smallest and largest.

matplotlib is an extra and is imported where it is needed.
"""

import textwrap
from pathlib import Path

from fastllama.lab import changes, figures, plot, statistics

_STYLES = [("o", "-"), ("s", "--"), ("^", "-."), ("v", ":"), ("D", "-"), ("P", "--"), ("X", "-."), ("*", ":")]


def series(records: list[dict]) -> dict[str, list[dict]]:
    """By "machine: workload" each commit's own record that has vanilla beside it and a decode speed, in order."""
    found = {}
    for machine, workloads in changes.groups(records).items():
        for rows in workloads.values():
            own = [row for row in changes.own_rows(rows) if row["baseline"] and row["decode_speedup"]]
            if own:
                found[f"{machine}: {figures.workload_name(own[0])}"] = own
    return found


def timeline(records: list[dict], path: Path) -> Path:
    """Draw every group as a line over the commits, a panel per machine. path: .png or .svg; returns it.

    ValueError if no record has vanilla beside it.
    """
    path, plt = plot._target(path), plot._pyplot()
    found = series(records)
    if not found:
        raise ValueError("no record has a decode speed beside vanilla's, so there is no timeline to draw")
    machines = list(dict.fromkeys(figures.machine_name(rows[0]) for rows in found.values()))
    commits = list(dict.fromkeys(row["commit"] for row in records if any(row in rows for rows in found.values())))
    figure, panels = plt.subplots(
        len(machines), figsize=(9, 0.8 + 3.6 * len(machines)), layout="constrained", squeeze=False
    )
    for machine, axes in zip(machines, panels[:, 0], strict=True):
        mine = [rows for rows in found.values() if figures.machine_name(rows[0]) == machine]
        for index, rows in enumerate(mine):
            marker, line = _STYLES[index % len(_STYLES)]
            medians = [row["decode_speedup"] for row in rows]
            ratios = [statistics.ratios_to_vanilla(row) for row in rows]
            spreads = [(min(each), max(each)) for each in ratios]
            below = [max(0.0, median - low) for median, (low, _) in zip(medians, spreads, strict=True)]
            above = [max(0.0, high - median) for median, (_, high) in zip(medians, spreads, strict=True)]
            axes.errorbar(
                [commits.index(row["commit"]) for row in rows], medians, yerr=[below, above], marker=marker,
                linestyle=line, color=plot._INK if index % 2 == 0 else "#6b7280", capsize=2.5, elinewidth=1,
                markersize=5.5, label=textwrap.shorten(figures.workload_name(rows[0]), 70, placeholder=" ..."),
            )  # fmt: skip
        axes.axhline(1, color="black", lw=0.8, linestyle=(0, (1, 2)))
        axes.set_xlim(-0.5, len(commits) - 0.5)
        axes.set_ylim(bottom=0)
        axes.set_xticks(range(len(commits)), [sha[:7] for sha in commits], rotation=60, fontsize=7)
        axes.set_ylabel("x vanilla")
        axes.set_title(machine, fontsize=9, loc="left")
        axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return plot._save(plt, figure, path)
