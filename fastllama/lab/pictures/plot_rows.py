"""A picture of one group of the log: decode tok/s of each commit, beside vanilla from the same run.

matplotlib is an extra and is imported where it is needed.
"""

import textwrap
from pathlib import Path

from fastllama.lab.pictures import canvas
from fastllama.lab.points import figures
from fastllama.lab.records import changes


def choose(records: list[dict], group: str | None = None) -> list[dict]:
    """One group's records: that whose "machine: workload" contains `group`, or the newest record's.

    ValueError if there are no records, or if `group` fits none or several.
    """
    named = {
        f"{machine}: {figures.workload_name(rows[0])}": rows
        for machine, workloads in changes.groups(records).items()
        for rows in workloads.values()
    }
    if not named:
        raise ValueError("there is no record to draw yet")
    if group is None:
        return next(rows for rows in named.values() if any(row is records[-1] for row in rows))
    fitting = [name for name in named if group in name]
    if len(fitting) != 1:
        raise ValueError(f"{group!r} fits {len(fitting)} groups of {len(named)}; the groups: {'; '.join(named)}")
    return named[fitting[0]]


def _label(record: dict) -> str:
    """The record's number and what changed, on at most two lines."""
    text = f"{record['id'].split('-')[0]}  {record['what']}"
    return "\n".join(textwrap.wrap(text, 34, max_lines=2, placeholder=" ..."))


_OURS = {"facecolor": canvas.INK, "edgecolor": "black", "lw": 0.6}
_VANILLA = {"facecolor": canvas.SHADE, "edgecolor": "black", "lw": 0.6, "hatch": "////"}


def _bar(axes, y: float, height: float, median: float, spread: tuple[float, float], style: dict) -> None:
    axes.barh(y, median, height, xerr=canvas.reaches([median], [spread]), error_kw=canvas.WHISKER, **style)


def rows(records: list[dict], path: Path) -> Path:
    """Draw decode tok/s of each commit of one group, beside vanilla from the same run, with smallest and largest.

    records: one group, as `choose` gives. path: .png or .svg. Returns the path.
    """
    path, plt = canvas.target(path), canvas.pyplot()
    drawn = [record for record in changes.own_rows(records) if record["decode_tok_per_s"] is not None]
    if not drawn:
        raise ValueError("no record of this group decoded a second token, so there is no decode tok/s to draw")
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.6 * len(drawn)), layout="constrained")
    longest = max(figures.spread(record)[1] for record in drawn)
    for index, record in enumerate(drawn):
        median, spread = record["decode_tok_per_s"], figures.spread(record)
        baseline = record["baseline"]
        compared = baseline is not None and baseline["decode_tok_per_s"] is not None
        height, y = (0.36, index - 0.19) if compared else (0.5, index)
        _bar(axes, y, height, median, spread, _OURS if record["switches"]["preallocate"] else _VANILLA)
        note = changes.speed(median)
        if compared:
            note += f"  x{changes.times_vanilla(record)}"
            reach = figures.spread(record, baseline=True)
            longest = max(longest, reach[1])
            _bar(axes, index + 0.19, height, baseline["decode_tok_per_s"], reach, _VANILLA)
        if record["ceiling_fraction"] is not None:
            note += f"  {100 * record['ceiling_fraction']:.0f} % of ceiling"
        axes.annotate(note, (spread[1], y), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(drawn)), [_label(record) for record in drawn])
    axes.set_ylim(len(drawn) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.35 * longest)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set_xlabel("decode tok/s: median, with smallest and largest sample")
    axes.set_title(f"{figures.workload_name(drawn[0])}\n{figures.machine_name(drawn[0])}", fontsize=9, loc="left")
    handles = [plt.Rectangle((0, 0), 1, 1, **style) for style in (_OURS, _VANILLA)]
    names = ["fastllama", "vanilla transformers, same run"]
    figure.legend(handles, names, frameon=False, ncols=2, fontsize=8, loc="outside lower center")
    return canvas.save(plt, figure, path)
