"""A line at the end of a file."""

import os
from pathlib import Path


def append(path: Path, line: str) -> None:
    """Adds a line, on disk before this returns."""
    with open(path, "ab") as file:
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())
