"""python -m fastllama.lab board: TensorBoard's files of every record, written anew."""

import argparse

from fastllama.lab.pages import board
from fastllama.lab.records import record, words


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command has none of its own."""


def run(arguments) -> int:
    """The exit code."""
    count = board.write_all(record.read_all(arguments.root), arguments.root / words.LOGS)
    print(f"{count} records written for tensorboard --logdir {words.LOGS}")
    return 0
