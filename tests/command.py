"""run_llama.py's command line, as the tests call it."""

import json
from pathlib import Path

import run_llama


def run(*argv) -> int:
    """Its exit code."""
    try:
        return run_llama.main([str(word) for word in argv])
    except SystemExit as end:
        return end.code


def read(path) -> list[dict]:
    """The lines of a file of points."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
