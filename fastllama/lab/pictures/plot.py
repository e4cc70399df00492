"""python -m fastllama.lab plot: the pictures by kind, each as .png or .svg, drawn without a screen.

They read in black and white: series differ in marker and line, and what is vanilla is hollow or hatched.
"""

import argparse
from pathlib import Path

from fastllama.lab.pictures import curve, history, plot_assisted, plot_memory, plot_rows, plot_sweep
from fastllama.lab.points import points_file
from fastllama.lab.records import record
from fastllama.lab.suite import suite_file
from fastllama.lab.tasks import file as task_file


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    kinds = parser.add_subparsers(dest="kind", required=True)
    rows = kinds.add_parser("rows", help="decode tok/s of each row of one group, beside vanilla")
    rows.add_argument("--group", help="part of the group's machine or workload (default: the newest record's group)")
    sweep = kinds.add_parser("sweep", help="a figure of a sweep's points against what the sweep varies")
    sweep.add_argument(
        "--figure", choices=plot_sweep.FIGURES, default="tok_per_s", help="what is drawn (default: tok_per_s)"
    )
    memory = kinds.add_parser("memory", help="peak memory, and the cache's part, against what a sweep varies")
    for part in (sweep, memory):
        part.add_argument("file", type=Path, help="what run_llama.py --json wrote")
        part.add_argument("--axis", metavar="OPTION", help="of two options that vary, the one along the axis")
    assisted = kinds.add_parser("assisted", help="the gain of assistance against acceptance, predicted and measured")
    assisted.add_argument("file", type=Path, help="what run_llama.py --task NAME --json wrote")
    ceiling = kinds.add_parser("curve", help="decode speed against the bytes of a token, beside the ceiling")
    ceiling.add_argument("--suite", type=Path, metavar="FILE", help="also the points of a file of tb_logs/suite")
    times = kinds.add_parser("timeline", help="x vanilla of each group over its commits")
    for part in (rows, sweep, memory, assisted, ceiling, times):
        part.add_argument("-o", "--output", type=Path, required=True, help="a .png or .svg file")


def _drawn(given) -> Path:
    if given.kind == "assisted":
        return plot_assisted.assisted(task_file.read(given.file), given.output)
    if given.kind in ("sweep", "memory"):
        if not given.file.exists():
            raise FileNotFoundError(f"there is no file {given.file}")
        entries = points_file.read(given.file)
        if given.kind == "memory":
            return plot_memory.memory(entries, given.output, given.axis)
        return plot_sweep.sweep(entries, given.output, given.figure, given.axis)
    records = record.read_all(given.root)
    if given.kind == "timeline":
        return history.timeline(records, given.output)
    if given.kind == "curve":
        lines = suite_file.read(given.suite) if given.suite else []
        return curve.curve(curve.points(records, lines), given.output)
    return plot_rows.rows(plot_rows.choose(records, given.group), given.output)


def run(given) -> int:
    """Draw what the arguments say, and print the path; the exit code. ValueError or OSError in one sentence."""
    print(_drawn(given))
    return 0
