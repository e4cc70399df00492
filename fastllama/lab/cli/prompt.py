"""The prompt: from the command line, a file or standard input."""

import re
import sys

from fastllama.lab.cli.run import Run
from fastllama.lab.points.workload import read_text

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "'": "'", '"': '"', "\\": "\\"}


def read(run: Run, say) -> str | None:
    """The text; None for a session that begins without one. Raises `ValueError` where it is empty or no text.

    A file's last line end is no part of it, as in llama.cpp.
    """
    if run.prompt is not None:
        text = run.prompt
    elif run.file is not None:
        text = read_text(run.file, "prompt file").removesuffix("\n")
    elif run.interactive:
        return None
    else:
        text = _standard_input(say)
    if run.escape:
        text = re.sub(r"\\([ntr'\"\\])", lambda found: _ESCAPES[found[1]], text)
    if not text:
        raise ValueError("the prompt is empty")
    return text


def _standard_input(say) -> str:
    if sys.stdin is None or sys.stdin.closed:
        raise ValueError("there is no prompt: give --prompt or --file")
    if sys.stdin.isatty():
        say("the prompt, up to the end of file (Ctrl-D):")
    try:
        text = sys.stdin.read()
        text.encode()
    except UnicodeError:
        raise ValueError("standard input is not UTF-8 text") from None
    return text.removesuffix("\n")
