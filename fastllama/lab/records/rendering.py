"""python -m fastllama.lab changes, and readme: what is written from the records, or whether it still is."""

import argparse
import sys

from fastllama.lab.records import changes, readme, record


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if it is out of date")


def run(arguments) -> int:
    """The exit code."""
    records = record.read_all(arguments.root)
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
