"""A picture of a memory timeline: the curve, its phases and their peaks. matplotlib is an extra."""

import importlib.util
from pathlib import Path

from fastllama.lab.pictures import canvas

_HATCHES = ("", "//", "", "\\\\")


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(seen: dict, path: Path) -> Path:
    """Draw what `timeline.timeline` saw as .png or .svg; returns the path. Raises `ValueError` without matplotlib."""
    plt = canvas.pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 3.6))
    times, levels = zip(*seen["samples_s_mb"], strict=True)
    axes.plot(times, levels, color=canvas.INK, linewidth=1.2, drawstyle="steps-post")
    highest = max(phase["peak_mb"] for phase in seen["phases"])
    for phase, hatch in zip(seen["phases"], _HATCHES * len(seen["phases"]), strict=False):
        start, end = phase["start_s"], phase["end_s"]
        axes.axvspan(start, end, facecolor="white" if not hatch else "#eeeeee", hatch=hatch, edgecolor="#dddddd")
        axes.hlines(phase["peak_mb"], start, end, color=canvas.INK, linestyle="dotted", linewidth=1.0)
    # Each name at a height of its own: a phase may be too short for it.
    for index, phase in enumerate(seen["phases"]):
        middle = (phase["start_s"] + phase["end_s"]) / 2
        height = 1.05 + 0.07 * index
        axes.annotate(
            f"{phase['phase']} {phase['peak_mb']:,.0f} MB",
            (middle, highest),
            (middle, highest * height),
            ha="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6},
        )
    axes.set_ylim(0, highest * 1.35)
    axes.set_xlabel("seconds")
    what = "anonymous memory" if seen["device"] == "cpu" else "allocated memory"
    axes.set_ylabel(f"{what}, MB")
    axes.set_title(
        f"{seen['model']} {seen['dtype']}, {seen['subject']}, batch {seen['batch_size']}, prompt "
        f"{seen['prompt_length']}, {seen['new_tokens']} new (dotted: a phase's peak with mapped weights)",
        fontsize=8,
        pad=12,
    )
    return canvas.save(plt, figure, path)
