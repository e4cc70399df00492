"""Files of lines that are added one by one: a line is on disk before `append` returns, or the file is as it was."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastllama.kernels.whole_file import raise_named

try:
    import fcntl
except ImportError:  # not a POSIX system: there one process at a time may write a file
    fcntl = None

logger = logging.getLogger(__name__)


def append(path: str | Path, line: str) -> None:
    """Adds a line. What an interruption left of an earlier one is removed, and other processes wait meanwhile.

    Raises `OSError`, which names the file; then it holds what it held.
    """
    path = Path(path)
    try:
        with open(path, "a+b", buffering=0) as file, _alone(file):
            size = _repaired(file, path)
            try:
                write_all(file.fileno(), line.encode() + b"\n")
                os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise
    except OSError as fault:
        raise_named(fault, path)


def read(path: str | Path) -> list[bytes]:
    """The lines of a file. A last one that was cut short is left out, with a warning; one that lacks only its end is
    not."""
    *lines, tail = Path(path).read_bytes().split(b"\n")
    if tail and _is_json(tail):
        lines.append(tail)
    elif tail:
        logger.warning("%s: the last line was cut short and is left out", path)
    return lines


@contextmanager
def _alone(file) -> Iterator[None]:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _repaired(file, path: Path) -> int:
    """Bytes of the file once its last line is whole."""
    file.seek(0)
    content = file.readall()
    tail = content.rpartition(b"\n")[2]
    if not tail:
        return len(content)
    if _is_json(tail):
        write_all(file.fileno(), b"\n")
        return len(content) + 1
    logger.warning("%s: the last line was cut short and is removed", path)
    file.truncate(len(content) - len(tail))
    return len(content) - len(tail)


def write_all(number: int, content: bytes) -> None:
    """Writes everything to an open file, or raises `OSError`."""
    while content:
        content = content[os.write(number, content) :]


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
