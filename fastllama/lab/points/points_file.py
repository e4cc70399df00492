"""Files of points, one JSON object a line: measured ones, those that failed or were skipped, with the reason, and those
of which nothing but the peak of memory was measured.
"""

import json
from pathlib import Path

from fastllama.lab import lines
from fastllama.lab.measuring import assisted
from fastllama.lab.points.sampler import Sampler
from fastllama.lab.records import schema

SCHEMA = 1  # of the lines that are no measured points
STATUSES = ("failed", "skipped", "memory")

_TEXTS = ("reason", "model", "dtype", "device", "command", "source_sha256")
_SIZES = ("batch_size", "prompt_length", "new_tokens", "cache_length")
# MB (10^6 bytes) of a point that was skipped since it could not fit, and of one whose memory alone was measured.
_FIGURES = {"skipped": ("predicted_mb", "free_mb"), "memory": ("predicted_mb", "max_mem_mb")}


def is_measured(entry: dict) -> bool:
    """Whether a line is a measured point; else it says why there is none."""
    return "status" not in entry


def is_memory(entry: dict) -> bool:
    """Whether a line holds a predicted and a measured peak of memory, and no speed."""
    return entry.get("status") == "memory"


def check(entry, where: str) -> dict:
    """The entry itself; `ValueError`, one sentence that starts with `where`, if it is not one that can be trusted."""
    if not isinstance(entry, dict) or is_measured(entry):
        schema.check_point(entry, where)
    else:
        _check_unmeasured(entry, where)
    if "sampler" in entry:
        try:
            Sampler(**entry["sampler"])
        except (TypeError, ValueError, OverflowError) as fault:
            raise ValueError(f"{where}: field sampler: {fault}") from None
    return entry


def _check_unmeasured(entry: dict, where: str) -> None:
    def refuse(name: str, wanted: str):
        text = repr(entry.get(name, "missing"))
        raise ValueError(f"{where}: field {name} is {text[:60]} but must be {wanted}")

    if entry["status"] not in STATUSES:
        refuse("status", f"one of {', '.join(STATUSES)}, or not there")
    if entry.get("schema") != SCHEMA or isinstance(entry["schema"], bool):
        refuse("schema", f"{SCHEMA}, which this version reads")
    for name in _TEXTS:
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            refuse(name, "a string that is not empty")
    for name in _SIZES:
        if type(entry.get(name)) is not int or entry[name] < 1:
            refuse(name, "a whole number above zero")
    if type(entry.get("seed")) is not int or entry["seed"] < 0:
        refuse("seed", "a whole number that is not negative")
    for name in ("switches", "sampler", "environment"):
        if not isinstance(entry.get(name), dict):
            refuse(name, "an object")
    if "assisted" in entry:
        if not isinstance(entry["assisted"], dict):
            refuse("assisted", "an object")
        try:
            assisted.check_options(entry["assisted"])
        except ValueError as fault:
            raise ValueError(f"{where}: {fault}") from None
    for name in _FIGURES.get(entry["status"], ()):
        value = entry.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e15:
            refuse(name, "a finite number that is not negative")


def append(path: Path, entry: dict) -> None:
    """Add one entry as a line, on disk before this returns. A line that an interruption cut short is removed.

    `ValueError` if the entry does not follow the schema, since it could not be read again.
    """
    path = Path(path)
    check(entry, f"a point for {path}")
    lines.append(path, json.dumps(entry, allow_nan=False))


def read(path: Path) -> list[dict]:
    """Every entry of a file that `append` wrote, measured or not; [] if there is no file.

    A last line that an interruption cut short is left out, with a warning: it has to be measured again. Any
    other fault is a `ValueError` naming the file and the line.
    """
    path = Path(path)
    if not path.exists():
        return []
    entries = []
    for number, line in enumerate(lines.read(path), 1):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{where}: not valid JSON") from None
        entries.append(check(entry, where))
    return entries


def read_measured(path: Path) -> list[dict]:
    """The measured points of a file, as `read` gives them."""
    return [entry for entry in read(path) if is_measured(entry)]
