"""`fastllama generate`, as the tests call it."""

import io
import sys
from typing import NamedTuple

from fastllama.lab.cli.command import main


class Said(NamedTuple):
    """The exit code, standard output and standard error."""

    code: int
    out: str
    err: str


def generate(capsys, *argv, stdin: str | None = "") -> Said:
    """A call within this process; `stdin` is its standard input."""
    capsys.readouterr()
    before, sys.stdin = sys.stdin, io.StringIO(stdin)
    try:
        code = main(["generate", *map(str, argv)])
    finally:
        sys.stdin = before
    return Said(code, *capsys.readouterr())
