"""Pictures of the log and of sweeps. Shapes and shades differ, so they read in black and white.

matplotlib is an extra and is imported where it is needed.
"""

import textwrap
from pathlib import Path

from fastllama.lab import changes, figures

_INK, _SHADE = "#1f3a5f", "#c9ced6"
_FORMATS = (".png", ".svg")


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ValueError('drawing needs matplotlib: pip install -e ".[plot]"') from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#555555",
        "figure.dpi": 100,
        "savefig.dpi": 160,
        # A fixed salt and no date make the same records the same file.
        "svg.hashsalt": "fastllama",
        "svg.fonttype": "none",
    }
    plt.rcParams.update(style)
    return plt


def _save(plt, figure, path: Path) -> Path:
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, bbox_inches="tight", metadata=metadata)
    plt.close(figure)
    return path


def _target(path: Path) -> Path:
    path = Path(path)
    if path.suffix not in _FORMATS:
        raise ValueError(f"{path}: a plot is written as .png or .svg")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    return path


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


def _errors(median: float, spread: tuple[float, float]) -> list[list[float]]:
    return [[max(0.0, median - spread[0])], [max(0.0, spread[1] - median)]]


def _label(record: dict) -> str:
    """The record's number and what changed, on at most two lines."""
    text = f"{record['id'].split('-')[0]}  {record['what']}"
    return "\n".join(textwrap.wrap(text, 34, max_lines=2, placeholder=" ..."))


def rows(records: list[dict], path: Path) -> Path:
    """Draw decode tok/s of each commit of one group, beside vanilla from the same run, with smallest and largest.

    records: one group, as `choose` gives. path: .png or .svg. Returns the path.
    """
    path, plt = _target(path), _pyplot()
    drawn = [record for record in changes.own_rows(records) if record["decode_tok_per_s"] is not None]
    if not drawn:
        raise ValueError("no record of this group decoded a second token, so there is no decode tok/s to draw")
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.6 * len(drawn)), layout="constrained")
    whisker = {"ecolor": "black", "elinewidth": 1, "capsize": 2.5}
    longest = max(figures.spread(record)[1] for record in drawn)
    for index, record in enumerate(drawn):
        median, spread = record["decode_tok_per_s"], figures.spread(record)
        baseline = record["baseline"]
        compared = baseline is not None and baseline["decode_tok_per_s"] is not None
        style = {"color": _SHADE, "hatch": "////"} if not record["switches"]["preallocate"] else {"color": _INK}
        height, y = (0.36, index - 0.19) if compared else (0.5, index)
        axes.barh(y, median, height, xerr=_errors(median, spread), error_kw=whisker, edgecolor="black", lw=0.6, **style)
        note = changes.speed(median)
        if compared:
            note += f"  x{changes.times_vanilla(record)}"
            vanilla, reach = baseline["decode_tok_per_s"], figures.spread(record, baseline=True)
            longest = max(longest, reach[1])
            axes.barh(
                index + 0.19, vanilla, height, xerr=_errors(vanilla, reach), error_kw=whisker, edgecolor="black",
                lw=0.6, color=_SHADE, hatch="////",
            )  # fmt: skip
        if record["ceiling_fraction"] is not None:
            note += f"  {100 * record['ceiling_fraction']:.0f} % of ceiling"
        axes.annotate(note, (spread[1], y), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(drawn)), [_label(record) for record in drawn])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.35 * longest)
    axes.set_xlabel("decode tok/s: median, with smallest and largest sample")
    axes.set_title(f"{figures.workload_name(drawn[0])}\n{figures.machine_name(drawn[0])}", fontsize=9, loc="left")
    handles = [
        plt.Rectangle((0, 0), 1, 1, facecolor=_INK, edgecolor="black", lw=0.6),
        plt.Rectangle((0, 0), 1, 1, facecolor=_SHADE, edgecolor="black", lw=0.6, hatch="////"),
    ]
    names = ["fastllama", "vanilla transformers, same run"]
    figure.legend(handles, names, frameon=False, ncols=2, fontsize=8, loc="outside lower center")
    return _save(plt, figure, path)


_AXES = {"batch_size": "batch size", "prompt_length": "prompt length", "new_tokens": "new tokens"}


def _axis(points: list[dict]) -> str:
    varying = [name for name in _AXES if len({point[name] for point in points}) > 1]
    if len(varying) != 1:
        what = " and ".join(_AXES[name] for name in varying) or "nothing"
        raise ValueError(f"a sweep varies one of batch size, prompt length and new tokens; here {what} varies")
    for name in ("model", "dtype", "device"):
        if len({point[name] for point in points}) > 1:
            raise ValueError(f"the points differ in {name}, so they are not one curve")
    return varying[0]


def _curve(axes, xs, points, baseline, label, **style):
    medians = [(point["baseline"] if baseline else point)["tok_per_s"] for point in points]
    spreads = [figures.spread(point, "tok_per_s", baseline) for point in points]
    below = [max(0.0, median - spread[0]) for median, spread in zip(medians, spreads, strict=True)]
    above = [max(0.0, spread[1] - median) for median, spread in zip(medians, spreads, strict=True)]
    axes.errorbar(xs, medians, yerr=[below, above], label=label, capsize=3, elinewidth=1, markersize=5.5, **style)


def sweep(points: list[dict], path: Path) -> Path:
    """Draw tok/s of a sweep's points, ours and vanilla's, against what the sweep varies.

    points: as points_file.read_measured gives; of points measured twice the last counts. Returns the path.
    ValueError if there are no points or they are not one sweep.
    """
    path = _target(path)
    if not points:
        raise ValueError("there is no point to draw")
    axis = _axis(points)
    plt = _pyplot()
    series: dict[str, dict[int, dict]] = {}
    for point in points:
        name = f"fastllama: {point['path']}" if point["switches"]["preallocate"] else point["path"]
        series.setdefault(name, {})[point[axis]] = point
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    styles = [("o", "-"), ("s", "--"), ("^", "-."), ("v", ":")]
    vanilla: dict[int, dict] = {}
    for index, (name, by_x) in enumerate(series.items()):
        marker, line = styles[index % len(styles)]
        xs = sorted(by_x)
        style = {"color": _INK, "marker": marker, "linestyle": line}
        _curve(axes, xs, [by_x[x] for x in xs], False, textwrap.shorten(name, 60, placeholder=" ..."), **style)
        vanilla.update({x: by_x[x] for x in xs if by_x[x]["baseline"] is not None})
    if vanilla:
        xs = sorted(vanilla)
        style = {"color": "#6b7280", "marker": "D", "markerfacecolor": "white", "linestyle": (0, (4, 2))}
        _curve(axes, xs, [vanilla[x] for x in xs], True, "vanilla transformers, same run", **style)
    ticks = sorted({point[axis] for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(_AXES[axis])
    axes.set_ylabel("tok/s, whole run: median, smallest, largest")
    fixed = [f"{_AXES[name]} {points[0][name]}" for name in _AXES if name != axis]
    first = points[-1]
    title = f"{first['model']} {first['dtype']}, {', '.join(fixed)}\n{figures.machine_name(first)}"
    axes.set_title(title, fontsize=9, loc="left")
    axes.legend(frameon=False, fontsize=8)
    return _save(plt, figure, path)
