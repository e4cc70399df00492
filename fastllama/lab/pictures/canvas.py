"""What every picture shares: matplotlib without a screen, ink, line styles, whiskers, and files that can be repeated.

matplotlib is an extra and is imported where it is needed.
"""

from pathlib import Path
from typing import Any

from fastllama.kernels.whole_file import whole

INK, GRAY, SHADE, GRID = "#1f3a5f", "#6b7280", "#c9ced6", "#e5e7eb"
VANILLA = "hollow: vanilla transformers, same run"
WHISKER = {"ecolor": "black", "elinewidth": 1, "capsize": 2.5}
_FORMATS = (".png", ".svg")
_MARKERS, _LINES = "os^vDPX*", ("-", "--", "-.", ":")
# Colours that people with any kind of colour vision tell apart; marker and line say the same without them.
_COLOURS = (INK, "#d55e00", "#009e73", "#cc79a7", "#0072b2", "#8a6d00", "#56a0c9")


def pyplot():
    """matplotlib.pyplot, which draws to files only. ValueError, naming the extra, if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError('drawing needs matplotlib: pip install -e ".[plot]"') from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # A user's own matplotlibrc must not change a picture.
    matplotlib.rcdefaults()
    style: dict[Any, Any] = {
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


def target(path: Path) -> Path:
    """The path, if a picture can be written there. ValueError on another suffix or a folder that is not there."""
    path = Path(path)
    if path.suffix not in _FORMATS:
        raise ValueError(f"{path}: a plot is written as .png or .svg")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    return path


def save(plt, figure, path: Path) -> Path:
    """Write the figure, atomically, and close it; returns the path."""
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    try:
        with whole(path) as unfinished:
            figure.savefig(unfinished, bbox_inches="tight", metadata=metadata)
    finally:
        plt.close(figure)
    return path


def style(index: int) -> dict:
    """Marker, line and colour of series `index`; marker, fill and line alone are unlike for the first 32."""
    colour, again = _COLOURS[index % len(_COLOURS)], index // len(_MARKERS)
    return {
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _LINES[(index + again) % len(_LINES)],
        "color": colour,
        "markerfacecolor": "white" if again % 2 else colour,
        "markersize": 5.5,
    }


def reaches(medians: list[float], spreads: list[tuple[float, float] | None]) -> list[list[float]]:
    """[below, above] of whiskers from each median to its smallest and largest sample; none where there is no spread."""
    ends = [spread or (middle, middle) for middle, spread in zip(medians, spreads, strict=True)]
    below = [max(0.0, middle - low) for middle, (low, _) in zip(medians, ends, strict=True)]
    above = [max(0.0, high - middle) for middle, (_, high) in zip(medians, ends, strict=True)]
    return [below, above]
