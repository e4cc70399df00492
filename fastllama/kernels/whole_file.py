"""A file that appears whole or not at all, whatever stops the writing: a full disk, an interruption, a power cut."""

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

try:
    import fcntl
except ImportError:  # not on every system
    fcntl = None  # type: ignore[assignment]


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


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """One process at a time, in a folder that is made; the lock goes with the process that holds it.

    Where the system has no such locks, several at a time: what is written there is `whole` all the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def raise_named(fault: OSError, path: Path, *instead: Path) -> NoReturn:
    """Raises the same failure with `path` in its words, where it names no file, or one of those that stand for it."""
    if fault.errno is None or fault.filename not in (None, *map(str, instead)):
        raise fault
    raise type(fault)(fault.errno, fault.strerror, str(path)) from fault
