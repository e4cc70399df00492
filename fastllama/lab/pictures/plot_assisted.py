"""A picture of assistance: the gain over the same model unassisted, against the share of drafted tokens accepted.

matplotlib is an extra and is imported where it is needed.
"""

from pathlib import Path
from statistics import mean, median

from fastllama.lab.pictures import canvas
from fastllama.lab.points import figures
from fastllama.lab.tasks import cost

SERIES = 8  # as many kinds of marker as there are
_STEPS = 100


def _series(lines: list[dict]) -> dict[str, list[dict]]:
    """The assisted lines that proposed anything, by task, model and assistance."""
    found: dict[str, list[dict]] = {}
    for line in lines:
        if line["assisted"] is not None and line["assisted"]["acceptance"] is not None and line["costs"] is not None:
            name = f"{line['task']}: {line['model']} {line['dtype']}, {figures.assistance(line)}"
            found.setdefault(name, []).append(line)
    return found


def gains(line: dict) -> list[float]:
    """Of each pair of runs, the unassisted one's seconds over the assisted one's."""
    pairs = zip(line["runs"], line["assisted"]["unassisted"]["runs"], strict=True)
    return [plain["total_s"] / run["total_s"] for run, plain in pairs]


def foretold(lines: list[dict], acceptance: float) -> float:
    """The gain that the series' costs foretell at an acceptance, with its mean K and over its examples together."""
    reports = [report for line in lines for report in line["assisted"]["reports"]]
    drafted, drafting = cost.drafted_a_round(reports), cost.a_round(reports, "draft_forwards")
    both = [
        cost.seconds(line["costs"], drafted, acceptance, line["new_tokens"], cost.prefills(line), drafting)
        for line in lines
    ]
    return sum(plain for plain, _ in both) / sum(assisted for _, assisted in both)


def assisted(lines: list[dict], path: Path) -> Path:
    """Draw each example's measured gain (filled) beside the one that its costs foretell (hollow), and as a line what
    they foretell at any acceptance.

    lines: as tasks.file.read gives them. path: .png or .svg. Returns the path. ValueError, one sentence, if no line
    was assisted, if they are of several machines, or of too many kinds.
    """
    path, plt = canvas.target(path), canvas.pyplot()
    series = _series(lines)
    if not series:
        raise ValueError("no line of the file was assisted and drafted a token, so there is nothing to draw")
    if len(series) > SERIES:
        raise ValueError(f"a picture shows at most {SERIES} series, and the file has {len(series)}")
    machines = list(dict.fromkeys(figures.machine_name(line) for kept in series.values() for line in kept))
    if len(machines) > 1:
        raise ValueError(f"the lines are of {len(machines)} machines, which are not compared: {'; '.join(machines)}")
    figure, axes = plt.subplots(figsize=(8, 5 + 0.2 * len(series)))
    axes.axhline(1, color=canvas.GRAY, lw=0.8)
    for index, (name, kept) in enumerate(series.items()):
        style = canvas.style(index)
        colour, marker = style["color"], style["marker"]
        xs = [line["assisted"]["acceptance"] for line in kept]
        ys = [line["assisted"]["speedup_end_to_end"] for line in kept]
        spreads = [(min(values), max(values)) for values in map(gains, kept)]
        axes.errorbar(xs, ys, yerr=canvas.reaches(ys, spreads), fmt="none", zorder=1.9, **canvas.WHISKER)
        axes.plot(xs, ys, marker, color=colour, markersize=6, label=name)
        hollow = {"color": colour, "markerfacecolor": "white", "markersize": 6}
        axes.plot(xs, [line["predicted_speedup"] for line in kept], marker, **hollow)
        drafted = mean([cost.drafted_a_round(line["assisted"]["reports"]) for line in kept])
        shares = [step / _STEPS for step in range(_STEPS + 1)]
        curve = [foretold(kept, share) for share in shares]
        label = f"predicted from measured costs, {drafted:.1f} tokens drafted a round"
        axes.plot(shares, curve, style["linestyle"], color=colour, lw=1, label=label)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("share of drafted tokens that is accepted")
    axes.set_ylabel("x unassisted, end to end: median, smallest, largest")
    axes.grid(color=canvas.GRID, lw=0.6)
    axes.set_axisbelow(True)
    runs = median(len(line["runs"]) for kept in series.values() for line in kept)
    title = f"{machines[0]}; {runs:g} runs\nfilled: measured, hollow: predicted of the same example"
    axes.set_title(title, fontsize=9, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.12))
    return canvas.save(plt, figure, path)
