"""python -m fastllama.lab memory-table: peaks of memory by context length, predicted beside measured."""

import argparse
from pathlib import Path

from fastllama.lab.memory import peak_only
from fastllama.lab.points import figures, option, points_file
from fastllama.lab.records.changes import table as markdown

# What the points of one table have in common.
_SAME = {
    "models": lambda entry: entry["model"],
    "dtypes": lambda entry: entry["dtype"],
    "batch sizes": lambda entry: entry["batch_size"],
    "machines": figures.machine_name,
}


def _held(entry: dict, name: str) -> str | None:
    return option.stored(entry, name)


def column(entry: dict) -> str:
    """Who a peak is of: "vanilla StaticCache", or ours and what its weights and cache are held in."""
    name = figures.subject_name(entry)
    if name != "ours":
        return {"static": "vanilla StaticCache"}.get(name, name)
    key, value = (_held(entry, side) or entry["dtype"] for side in ("cache_k", "cache_v"))
    weights = _held(entry, "weights")
    words = key if key == value else f"{key}/{value}"
    return f"ours {words}" + ("" if weights is None else f", {weights} weights")


def _cell(entry: dict | None) -> str:
    if entry is None:
        return "-"
    return f"{entry['predicted_mb']:,.0f} / {entry['max_mem_mb']:,.0f} ({peak_only.error(entry):+.1%})"


def rows(entries: list[dict]) -> tuple[list[str], list[list[str]]]:
    """(heads, rows): a row a context length, a column a contestant. Of points measured twice the last counts.

    Raises `ValueError` where the entries are of several models, machines or batch sizes.
    """
    peaks = [entry for entry in entries if points_file.is_memory(entry)]
    if not peaks:
        raise ValueError("no line of a memory alone: run_llama.py --sweep memory-table --memory-only measures some")
    for name, of in _SAME.items():
        if len(found := {of(entry) for entry in peaks}) > 1:
            raise ValueError(
                f"the points are of {len(found)} {name}, which are not one table: {', '.join(map(str, sorted(found)))}"
            )
    cells = {(entry["cache_length"], entry["prompt_length"], column(entry)): entry for entry in peaks}
    lengths = sorted({key[:2] for key in cells})
    columns = list(dict.fromkeys(column(entry) for entry in peaks))
    columns.sort(key=lambda name: name.startswith("ours"))  # vanilla first
    heads = ["context", "prompt", *columns]
    return heads, [
        [f"{context:,}", f"{prompt:,}", *(_cell(cells.get((context, prompt, name))) for name in columns)]
        for context, prompt in lengths
    ]


def words(entries: list[dict]) -> str:
    """The table as Markdown, and a line that says what it is of."""
    heads, body = rows(entries)
    first = next(entry for entry in entries if points_file.is_memory(entry))
    return (
        f"{first['model']} {first['dtype']}, batch {first['batch_size']}, {figures.machine_name(first)}: peak memory, "
        f"MB, predicted / measured (error)\n\n{markdown(heads, body)}"
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="what run_llama.py --memory-only --json wrote"
    )


def run(given) -> int:
    """Print the table; the exit code. `OSError` or `ValueError` in one sentence."""
    entries = []
    for path in given.files:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file of points {path}")
        entries += points_file.read(path)
    print(words(entries))
    return 0
