"""python -m fastllama.lab: render the log, note a prediction, score, draw, export, plan memory, fill TensorBoard."""

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

from fastllama.lab.records.sources import ROOT, require_clone

# Each command: the module that has its `arguments(parser)` and `run(arguments)`, imported when it is asked for, and
# what it does. What they import, torch and transformers, takes seconds, which help and a refused command do without.
_COMMANDS = {
    "changes": ("records.rendering", "render changes.md from the records in tb_logs"),
    "readme": ("records.rendering", "render the tables of README.md from the records in tb_logs"),
    "predict": ("records.noting", "note what a change is expected to do, to commit before the run"),
    "export": ("records.export", "points or records as md, csv, json, jsonl or sqlite"),
    "report": ("pages.report", "write the log, tables and plots as one HTML page"),
    "board": ("pages.fill", "write TensorBoard's event files from the records"),
    "plot": ("pictures.plot", "draw the log, a sweep, its memory or the ceiling"),
    "doctor": ("measuring.doctor", "what this machine can do, and what to install to be faster"),
    "compare": (
        "measuring.compare",
        "is B faster than A: two records, or two commits or branches, which are measured now, in turns",
    ),
    "eval": (
        "quality.evaluation",
        "score what a low precision costs: perplexity, KL divergence and agreement with vanilla transformers",
    ),
    "context": (
        "quality.context_score",
        "score a shifted context against computing what is left in it anew, and the turning of keys by itself",
    ),
    "options": (
        "options.command",
        "a table of llama.cpp's options over prompt files: each text, its timings, and what differs from the default's",
    ),
    "plan": (
        "memory.planner",
        "which weights and caches fit into so much memory, about how fast, and how good where that was measured",
    ),
    "memory-table": (
        "memory.memory_table",
        "peaks of memory by context length, predicted beside measured, from files of --memory-only points",
    ),
    "parallel": (
        "prompts.parallel",
        "requests behind one system prompt, several at a time: a finished request's place is taken by the next",
    ),
    "soak": ("soak.command", "many short generations of every kind: memory must stay flat and every text the same"),
    "spread": (
        "devices.paper",
        "on paper: what a token of a tensor-parallel Llama costs in bytes and messages, and where the limit lies",
    ),
}
# What reads or writes the log of the repository, and has none where the package is installed.
_OF_THE_LOG = ("changes", "readme", "predict", "board", "report")


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"fastllama.lab.{_COMMANDS[command][0]}")


def _parser(asked: set[str]) -> argparse.ArgumentParser:
    """Of all commands, and of those in `asked` with their arguments."""
    parser = argparse.ArgumentParser(prog="python -m fastllama.lab", description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, what) in _COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        if name in asked:
            _module(name).arguments(command)
    return parser


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The command line, and behind the "--" of compare the switches that it hands on to run_llama.py."""
    if "compare" not in argv or "--" not in argv:
        return argv, []
    place = argv.index("--")
    return argv[:place], argv[place + 1 :]


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; as argparse does, exits with code 2 where it is wrong. `switches`: what compare hands on."""
    argv, switches = _split(argv)
    arguments = _parser(set(argv) & set(_COMMANDS)).parse_args(argv)
    arguments.switches = switches
    return arguments


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 where --check finds a difference, 2 (and one sentence) on bad input."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        if arguments.command in _OF_THE_LOG and arguments.root == ROOT:
            require_clone(ROOT, f"{arguments.command} is about the records, which are kept")
        return _module(arguments.command).run(arguments)
    except (ValueError, OSError, MemoryError) as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
