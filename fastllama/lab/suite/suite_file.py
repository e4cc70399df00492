"""The suite's records: one JSON line per line of the suite, in tb_logs/suite/<device>-<nnn>-<commit>.jsonl."""

import json
import re
from pathlib import Path
from typing import Any

from fastllama.lab import lines
from fastllama.lab.points import figures
from fastllama.lab.records.sources import ROOT
from fastllama.lab.records.words import LOGS

SCHEMA = 1
FOLDER = f"{LOGS}/suite"
DIRTY = "dirty"
_NAME = re.compile(r"(cpu|gpu)-(\d{3,6})-([0-9a-f]{7}|dirty)\.jsonl")
_FIELDS: dict[str, Any] = {
    "line": str,
    "what": str,
    "device": str,
    "asked": list,
    "measured": dict,
    "reached": (bool, type(None)),
    "reached_by_figure": dict,
    "not_measured": (str, type(None)),
    "parity": (str, type(None)),
    "points": list,
    "samples": dict,
    "seconds": (int, float),
    "environment": dict,
    "commit": (str, type(None)),
    "dirty": bool,
    "source_sha256": str,
    "recorded_at": str,
    "quick": bool,
    "selected": bool,
    "command": str,
}


def check(record, where: str) -> dict:
    """The record itself; ValueError, one sentence that starts with `where`, if it is not one of schema 1."""
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"{where}: must be an object with schema {SCHEMA}")
    for name, kind in _FIELDS.items():
        if name not in record or not isinstance(record[name], kind):
            raise ValueError(f"{where}: field {name} is missing or of a wrong kind")
    for bound in record["asked"]:
        if not isinstance(bound, dict) or bound.keys() != {"figure", "op", "bound"}:
            raise ValueError(f"{where}: what is asked needs figure, op and bound")
    if record["reached"] and (record["not_measured"] is not None or not all(record["reached_by_figure"].values())):
        raise ValueError(f"{where}: it is called reached and is not")
    return record


def create(device: str, commit: str | None, root: Path = ROOT) -> Path:
    """A new empty file with the next number; without `commit`, for sources that no commit holds, it says "dirty"."""
    folder = Path(root) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    number = max(map(_number, _files(root)), default=0) + 1
    while True:
        path = folder / f"{device}-{number:03d}-{commit[:7] if commit else DIRTY}.jsonl"
        try:
            path.open("x").close()
            return path
        except FileExistsError:
            number += 1


def append(path: Path, record: dict) -> None:
    """Add one record as a line, on disk before this returns. ValueError if it does not follow the schema."""
    lines.append(path, json.dumps(check(record, f"a line for {path}"), allow_nan=False))


def read(path: Path) -> list[dict]:
    """The records of a file; a last line that an interruption cut short is left out, with a warning.

    ValueError names the file and the line that is wrong; FileNotFoundError if there is no file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    records = []
    for number, line in enumerate(lines.read(path), 1):
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{where}: not valid JSON") from None
        records.append(check(record, where))
    return records


def _files(root: Path) -> list[Path]:
    found = [path for path in (Path(root) / FOLDER).glob("*.jsonl") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_number)


def newest(root: Path = ROOT) -> dict[str, tuple[Path, list[dict]]]:
    """Of each device the newest file of a whole run with its records: not of a quick run or of selected lines."""
    found = {}
    for path in _files(root):
        records = read(path)
        if records and not any(record["quick"] or record["selected"] for record in records):
            found[records[0]["device"]] = (path, records)
    return found


def current(root: Path = ROOT) -> dict[str, dict[str, tuple[Path, dict]]]:
    """Of each machine the newest record of each line, in the device's newest whole run or by itself (`--only`) since.

    Machines are named as `figures.machine_name` does: what one measures replaces nothing of another's.
    """
    first = {device: _number(path) for device, (path, _) in newest(root).items()}
    found: dict[str, dict[str, tuple[Path, dict]]] = {}
    for path in _files(root):
        for record in read(path):
            if not record["quick"] and _number(path) >= first.get(record["device"], 0):
                found.setdefault(machine(record), {})[record["line"]] = (path, record)
    return found


def machine(record: dict) -> str:
    """On which machine a line was measured."""
    return figures.machine_name({**record, "device": "cpu" if record["device"] == "cpu" else "cuda"})


def _number(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[2])
