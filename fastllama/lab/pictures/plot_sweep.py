"""A picture of a sweep: a figure against what was varied, ours filled, vanilla of the same run hollow.

matplotlib is an extra and is imported where it is needed.
"""

import textwrap
from collections.abc import Callable
from pathlib import Path

from fastllama.lab.pictures import canvas
from fastllama.lab.points import figures, option
from fastllama.lab.points.option import OPTIONS
from fastllama.lab.sweeping import swept
from fastllama.lab.sweeping.swept import Swept

# With its unit, and whether it has samples, whose smallest and largest are shown.
FIGURES = {
    "tok_per_s": ("tok/s, whole run", True),
    "decode_tok_per_s": ("decode tok/s", True),
    "ttft_ms": ("time to first token, ms", True),
    "max_mem_mb": ("peak memory of a fresh process, MB", False),
}
_SIZES = {"batch_size": "batch {}", "prompt_length": "prompt {}", "new_tokens": "{} new tokens"}
_TICKS = 12  # labels that fit beside each other


def _title(found: Swept) -> str:
    """What does not vary, and what is not there, so that the picture can stand alone."""
    point, varying = found.points[-1], {found.axis, found.series}
    words = [" ".join(point[name] for name in ("model", "dtype") if name not in varying)]
    words += [text.format(point[name]) for name, text in _SIZES.items() if name not in varying]
    places = ("switch", "sampler", "assistance")
    chosen = [name for name, each in OPTIONS.items() if each.place in places and name not in varying]
    kept = {name: option.stored(point, name) for name in chosen}
    words += [f"{name}={option.words(kept[name])}" for name in chosen if kept[name] != OPTIONS[name].default]
    lines = [", ".join(word for word in words if word), figures.machine_name(point)]
    sources = {point.get("source_sha256") for point in found.points}
    if len(sources) > 1:
        lines.append(f"measured with {len(sources)} states of the sources")
    if found.missing:
        lines.append(f"not shown: {'; '.join(found.missing)}")
    return "\n".join(textwrap.fill(line, 90) for line in lines)


def _subject(found: Swept) -> str:
    """What the points of a picture with one series are of."""
    ours, paths = ({value(point) for point in found.points} for value in (_is_ours, lambda point: point["path"]))
    if len(ours) > 1:
        return "as measured"
    name = "fastllama" if ours == {True} else "transformers"
    return textwrap.shorten(f"{name}: {paths.pop()}", 60, placeholder=" ...") if len(paths) == 1 else name


def _is_ours(point: dict) -> bool:
    return point["switches"]["preallocate"]


def _line(axes, xs: list[float], points: list[dict], figure: str, baseline: bool, **style) -> None:
    medians = [(point["baseline"] if baseline else point)[figure] for point in points]
    known = FIGURES[figure][1]
    spreads = [figures.spread(point, figure, baseline) if known else None for point in points]
    whiskers = {"yerr": canvas.reaches(medians, spreads), **canvas.WHISKER, "ecolor": style["color"]} if known else {}
    axes.errorbar(xs, medians, **whiskers, **style)


def _places(found: Swept, points: list[dict], slot: int, slots: int) -> list[float]:
    """Where points stand along the axis: at their number, or beside each other at the place of their word."""
    values = [swept.value(point, found.axis) for point in points]
    if found.is_numeric:
        return values
    order = found.values(found.axis)
    return [order.index(one) + (slot - (slots - 1) / 2) * 0.6 / slots for one in values]


def _scale(axes, found: Swept) -> None:
    values = found.values(found.axis)
    if found.is_size:
        axes.set_xscale("log", base=2)
    if found.is_numeric:
        shown = values[:: -(-len(values) // _TICKS)]
        axes.set_xticks(shown, [f"{one:,}" for one in shown])
    else:
        words = [option.words(one) for one in values]
        long = sum(map(len, words)) > 60
        axes.set_xticks(range(len(words)), words, rotation=45 if long else 0, ha="right" if long else "center")
        axes.set_xlim(-0.5, len(words) - 0.5)
    axes.minorticks_off()


def draw(found: Swept, path: Path, figure: str, more: Callable | None = None) -> Path:
    """Draw the figure of every point; as `sweep`. more: draws further lines on the axes, on the same values."""
    path, plt = canvas.target(path), canvas.pyplot()
    drawing, axes = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    names = [None] if found.series is None else found.values(found.series)
    slots = 2 * len(names)
    beside, ours = False, []
    for index, name in enumerate(names):
        points, style = found.of(name), canvas.style(index)
        style |= {} if found.is_numeric else {"linestyle": "none"}
        label = _subject(found) if name is None else f"{found.series}={option.words(name)}"
        ours.append(label)
        _line(axes, _places(found, points, 2 * index, slots), points, figure, False, label=label, **style)
        compared = [point for point in points if point["baseline"] and point["baseline"][figure] is not None]
        if compared:
            hollow = style | {"color": canvas.GRAY, "markerfacecolor": "white", "linewidth": 1}
            words = {} if beside else {"label": canvas.VANILLA}
            _line(axes, _places(found, compared, 2 * index + 1, slots), compared, figure, True, **words, **hollow)
            beside = True
    if more is not None:
        more(axes)
    _scale(axes, found)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.grid(axis="y", color=canvas.GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(found.label)
    label, known = FIGURES[figure]
    axes.set_ylabel(f"{label}: median, smallest, largest" if known else label)
    axes.set_title(_title(found), fontsize=9, loc="left")
    # Ours first, then what stands beside it.
    order = [*ours, canvas.VANILLA]
    entries = sorted(
        zip(*axes.get_legend_handles_labels(), strict=True),
        key=lambda entry: order.index(entry[1]) if entry[1] in order else len(order),
    )
    drawing.legend(*zip(*entries, strict=True), frameon=False, fontsize=8, loc="outside lower left")
    return canvas.save(plt, drawing, path)


def sweep(entries: list[dict], path: Path, figure: str = "tok_per_s", axis: str | None = None) -> Path:
    """Draw a figure of a sweep's points against what the sweep varies, a series per value of a second option.

    entries: as points_file.read gives. figure: one of FIGURES. axis: the option along the axis, see swept.swept.
    path: .png or .svg. Returns the path. ValueError if the entries are not one sweep.
    """
    return draw(swept.swept(entries, figure, axis), canvas.target(path), figure)
