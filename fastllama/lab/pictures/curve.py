"""A picture of decode speed against the bytes of a token: every model's share of the memory's bandwidth at once.

matplotlib is an extra and is imported where it is needed.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from fastllama.lab.pictures import canvas
from fastllama.lab.points import figures
from fastllama.lab.records import changes

# Where a label may be, in points from its point, the nearest first. The ceiling falls from the upper left, so what
# is left of a point is below it and what is right and above is beyond it.
_OFFSETS = sorted(
    [(dx, dy) for dx in (-9, -40, -90) for dy in range(0, -181, -12)]
    + [(dx, dy) for dx in (9, 25, 60, 110) for dy in range(0, 181, 12)]
    + [(9, dy) for dy in range(0, -181, -12)],
    key=lambda offset: abs(offset[0]) + abs(offset[1]),
)
_FAR = 30  # from here on a line leads to the label


def _belongs(point: dict) -> bool:
    if (
        "assisted" in point
        or point["batch_size"] != 1
        or not point["switches"]["preallocate"]
        or point["baseline"] is None
    ):
        return False
    return bool(point["row_tok_per_s"] and point["baseline"]["row_tok_per_s"] and point["ceiling_gb_per_s"])


def points(records: list[dict], lines: Sequence[dict] = ()) -> list[dict]:
    """Of each machine, model and dtype the newest point of one row with vanilla beside it.

    records: as record.read_all gives; lines: of a suite file, whose points count with the time of their line.
    """
    dated = [(record["recorded_at"], record) for record in changes.own_rows(records)]
    dated += [(line["recorded_at"], point) for line in lines for point in line["points"]]
    newest = {}
    for _, point in sorted((pair for pair in dated if _belongs(pair[1])), key=lambda pair: pair[0]):
        newest[figures.machine_name(point), point["model"], point["dtype"]] = point
    return list(newest.values())


def token_bytes(point: dict) -> float:
    """Bytes that a token of the point must read."""
    return point["read_gb_per_s"] * 1e9 / point["row_tok_per_s"]


def _label(axes, renderer, taken: list, text: str, x: float, y: float) -> None:
    """Write `text` at the first of the offsets where it is inside and covers none of `taken`, boxes in pixels.

    Where there are too many points for that, at the last.
    """
    from matplotlib.text import Text

    for dx, dy in _OFFSETS:
        leader = {"arrowstyle": "-", "color": canvas.GRAY, "lw": 0.6, "shrinkA": 0, "shrinkB": 4}
        leader["relpos"] = (0, 0.5) if dx > 0 else (1, 0.5)
        note = axes.annotate(
            text,
            (x, y),
            (dx, dy),
            textcoords="offset points",
            va="center",
            ha="left" if dx > 0 else "right",
            fontsize=8,
            linespacing=1.15,
            arrowprops=leader if abs(dx) + abs(dy) > _FAR else None,
        )
        note.update_positions(renderer)
        box = Text.get_window_extent(note, renderer)  # without the leading line
        inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
        free = inside and not any(box.overlaps(other) for other in taken)
        if free or (dx, dy) == _OFFSETS[-1]:
            taken.append(box)
            return
        note.remove()


def curve(drawn: list[dict], path: Path) -> Path:
    """Draw steps per second of ours and of vanilla over bytes per token, log-log, under the ceiling of each machine.

    drawn: as `points` gives. path: .png or .svg. Returns the path. ValueError if there is nothing to draw.
    """
    path, plt = canvas.target(path), canvas.pyplot()
    if not drawn:
        raise ValueError("no record has one row of ours beside vanilla, so there is no curve to draw")
    from matplotlib.transforms import Bbox

    machines = list(dict.fromkeys(map(figures.machine_name, drawn)))
    sizes = [token_bytes(point) for point in drawn]
    reach = min(sizes) / 8, max(sizes) * 8
    figure, axes = plt.subplots(figsize=(8, 4.5 + 0.2 * len(drawn)))
    axes.set_xscale("log")
    axes.set_yscale("log")
    styles = ["-", "--", "-.", ":"]
    for index, machine in enumerate(machines):
        ceilings = [point["ceiling_gb_per_s"] for point in drawn if figures.machine_name(point) == machine]
        middle, lowest, highest = (value * 1e9 for value in (median(ceilings), min(ceilings), max(ceilings)))
        where = f"{machine}: " if len(machines) > 1 else ""
        name = f"{where}ceiling {middle / 1e9:.0f} GB/s ({lowest / 1e9:.0f} to {highest / 1e9:.0f})"
        axes.fill_between(reach, [lowest / x for x in reach], [highest / x for x in reach], color=canvas.SHADE, lw=0)
        axes.plot(reach, [middle / x for x in reach], styles[index % 4], color="black", lw=1, label=name)
    axes.set_xlim(reach)
    ours = [point["row_tok_per_s"] for point in drawn]
    vanilla = [point["baseline"]["row_tok_per_s"] for point in drawn]
    axes.vlines(sizes, vanilla, ours, color=canvas.GRAY, lw=1)
    for medians, is_baseline in ((ours, False), (vanilla, True)):
        spreads = [figures.spread(point, "row_tok_per_s", is_baseline) for point in drawn]
        reaches = canvas.reaches(medians, spreads)
        axes.errorbar(sizes, medians, yerr=reaches, fmt="none", zorder=1.9, **canvas.WHISKER)
    for index, machine in enumerate(machines):
        mine = [place for place, point in enumerate(drawn) if figures.machine_name(point) == machine]
        xs = [sizes[place] for place in mine]
        style = {"marker": canvas.style(index)["marker"], "linestyle": "none"}
        name = "fastllama" if len(machines) == 1 else f"fastllama, {machine}"
        axes.plot(xs, [ours[place] for place in mine], **style, color=canvas.INK, markersize=7, label=name)
        beside = None if index else canvas.VANILLA
        hollow = {"color": canvas.GRAY, "markerfacecolor": "white", "markersize": 6, "label": beside}
        axes.plot(xs, [vanilla[place] for place in mine], **style, **hollow)
    axes.set_ylim(bottom=min(*ours, *vanilla) / 3)
    axes.set_xlabel("bytes that a token must read")
    axes.set_ylabel("steps per second, one row: median, smallest, largest")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e9:g} GB" if value >= 1e9 else f"{value / 1e6:g} MB")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.grid(color=canvas.GRID, lw=0.6)
    axes.set_axisbelow(True)
    if len(machines) == 1:
        axes.set_title(machines[0], fontsize=9, loc="left")
    axes.legend(
        frameon=False, fontsize=8, ncols=3 if len(machines) == 1 else 1, loc="upper left", bbox_to_anchor=(0, -0.12)
    )
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    taken = []
    places = [*zip(sizes, ours, strict=True), *zip(sizes, vanilla, strict=True)]
    for machine in machines:
        ceiling = median(point["ceiling_gb_per_s"] for point in drawn if figures.machine_name(point) == machine)
        steps = [reach[0] * (reach[1] / reach[0]) ** (step / 200) for step in range(201)]
        places += [(x, ceiling * 1e9 / x) for x in steps]
    for x, low, high in zip(sizes, vanilla, ours, strict=True):
        places += [(x, low * (high / low) ** (step / 20)) for step in range(21)]
    for x, y in places:
        across, up = axes.transData.transform((x, y))
        taken.append(Bbox.from_extents(across - 6, up - 6, across + 6, up + 6))
    for point, x, y in sorted(zip(drawn, sizes, ours, strict=True), key=lambda item: item[1], reverse=True):
        share = f", {100 * point['ceiling_fraction']:.0f} % of ceiling" if point["ceiling_fraction"] else ""
        model = point["model"].partition(":")[2] or point["model"]
        _label(axes, renderer, taken, f"{model} {point['dtype']}\n{changes.speed(y)}/s{share}", x, y)
    return canvas.save(plt, figure, path)
