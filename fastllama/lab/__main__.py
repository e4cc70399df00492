"""python -m fastllama.lab: render the log, note a prediction, score, draw, export, plan memory, fill TensorBoard."""

import argparse
import sys
from pathlib import Path

from fastllama.lab.devices import paper
from fastllama.lab.measuring import compare, doctor
from fastllama.lab.memory import memory_table, planner
from fastllama.lab.options import command as options
from fastllama.lab.pages import board, report
from fastllama.lab.pictures import plot
from fastllama.lab.prompts import parallel
from fastllama.lab.quality import context_score, evaluation
from fastllama.lab.records import changes, export, readme, record, words
from fastllama.lab.records.sources import ROOT, require_clone
from fastllama.lab.soak import command as soak


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastllama.lab", description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True)

    for name in ("changes", "readme"):
        rendering = commands.add_parser(name, help=f"render {name} from the records in tb_logs")
        rendering.add_argument("--check", action="store_true", help="write nothing; exit code 1 if it is out of date")

    predict = commands.add_parser("predict", help="note what a change is expected to do, to commit before the run")
    predict.add_argument("what", help="the words that --record will be given")
    predict.add_argument("text", help="what you expect")

    export.arguments(commands)
    doctor.arguments(commands)
    report.arguments(commands)
    commands.add_parser("board", help="write TensorBoard's event files from the records")

    compare.arguments(commands)
    evaluation.arguments(commands)
    context_score.arguments(commands)
    options.arguments(commands)

    plot.arguments(commands)
    planner.arguments(commands)
    memory_table.arguments(commands)
    parallel.arguments(commands)
    soak.arguments(commands)
    paper.arguments(commands)
    return parser


def _render(arguments, records: list[dict]) -> int:
    if arguments.command == "changes":
        current = changes.is_current(records, arguments.root)
        if not arguments.check:
            changes.write(records, arguments.root)
        name = changes.NAME
    else:
        current = readme.write(records, arguments.root, arguments.check)
        name = readme.NAME
    if arguments.check and not current:
        print(f"{name} is out of date: run python -m fastllama.lab {arguments.command}", file=sys.stderr)
        return 1
    print(f"{name}: {'up to date' if current else 'written'}, {len(records)} records")
    return 0


# What reads or writes the log of the repository, and has none where the package is installed.
_OF_THE_LOG = ("changes", "readme", "predict", "board", "report")


def _run(arguments) -> int:
    if arguments.command in _OF_THE_LOG and arguments.root == ROOT:
        require_clone(ROOT, f"{arguments.command} is about the records, which are kept")
    if arguments.command == "predict":
        path = words.predict(arguments.what, arguments.text, arguments.root)
        print(f"noted in {path}: commit it, then run with --record {arguments.what!r}")
        return 0
    if arguments.command == "export":
        return export.run(arguments)
    if arguments.command == "doctor":
        return doctor.run(arguments)
    if arguments.command == "plot":
        return plot.run(arguments)
    if arguments.command == "plan":
        return planner.run(arguments)
    if arguments.command == "memory-table":
        return memory_table.run(arguments)
    if arguments.command == "parallel":
        return parallel.run(arguments)
    if arguments.command == "spread":
        return paper.run(arguments)
    if arguments.command == "compare":
        return compare.run(arguments)
    if arguments.command == "eval":
        return evaluation.run(arguments)
    if arguments.command == "context":
        return context_score.run(arguments)
    if arguments.command == "options":
        return options.run(arguments)
    if arguments.command == "soak":
        return soak.run(arguments)
    records = record.read_all(arguments.root)
    if arguments.command in ("changes", "readme"):
        return _render(arguments, records)
    if arguments.command == "board":
        count = board.write_all(records, arguments.root / words.LOGS)
        print(f"{count} records written for tensorboard --logdir {words.LOGS}")
        return 0
    return report.run(arguments, records)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 where --check finds a difference, 2 (and one sentence) on bad input."""
    argv, switches = compare.split(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(argv)
    arguments.switches = switches
    try:
        return _run(arguments)
    except (ValueError, OSError, MemoryError) as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
