"""A file that appears whole or not at all, whatever stops the writing: a full disk, an interruption, a power cut."""

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A path to write to, of the same suffix, which takes the place of `path` when the block has ended and is on disk.

    Until then, and where anything fails, the old file is there. `OSError` names `path`.
    """
    path = Path(path)
    unfinished = path.with_name(f".{os.getpid()}-{threading.get_ident()}.unfinished{path.suffix}")
    try:
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as fault:
        raise_named(fault, path, unfinished)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def raise_named(fault: OSError, path: Path, *instead: Path) -> NoReturn:
    """Raises the same failure with `path` in its words, where it names no file, or one of those that stand for it."""
    if fault.errno is None or fault.filename not in (None, *map(str, instead)):
        raise fault
    raise type(fault)(fault.errno, fault.strerror, str(path)) from fault
