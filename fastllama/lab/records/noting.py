"""python -m fastllama.lab predict: what is expected of a change, kept before it is measured."""

import argparse

from fastllama.lab.records import words


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.add_argument("what", help="the words that --record will be given")
    parser.add_argument("text", help="what you expect")


def run(arguments) -> int:
    """The exit code."""
    path = words.predict(arguments.what, arguments.text, arguments.root)
    print(f"noted in {path}: commit it, then run with --record {arguments.what!r}")
    return 0
