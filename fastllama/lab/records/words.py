"""The words beside the records: what cannot be measured and is written by hand, as small JSON files.

tb_logs/cited.json        rows of others' logs, named with their source and never compared with ours
tb_logs/unmeasured.json   what is not yet measured, one command a line
tb_logs/tried.json        what was tried and left before it was worth a record
tb_logs/predictions.json  what was expected of a change, committed before it was measured
"""

import json
from pathlib import Path

from fastllama.kernels.whole_file import whole
from fastllama.lab.points import fields
from fastllama.lab.records import git
from fastllama.lab.records.sources import ROOT

LOGS = "tb_logs"
PREDICTIONS = f"{LOGS}/predictions.json"

_CITED = {"source": str, "machine": str, "model": str, "workload": str, "note": str, "rows": list}
_CITED_ROW = {"what": str, "compile": str, "tok_per_s": float, "max_mem_mb": float, "hash": str}
_UNMEASURED = {"what": str, "command": str}
_TRIED = {"what": str, "expected": str, "found": str}


def load_json(path: Path):
    """The content of a JSON file. ValueError, naming the file, if it is not JSON or has a key twice in an object.

    FileNotFoundError if there is none.
    """
    try:
        return json.loads(Path(path).read_bytes(), object_pairs_hook=fields.only_once)
    except (ValueError, RecursionError) as fault:
        raise ValueError(f"{path}: not valid JSON: {fault}") from None


def write_atomically(path: Path, text: str) -> None:
    """Write `text` under a temporary name beside `path`, then rename it: readers never see half a file."""
    with whole(path) as unfinished, open(unfinished, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def dump_json(path: Path, value) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _rows(path: Path, rows, fields: dict) -> list[dict]:
    if not isinstance(rows, list):
        raise ValueError(f"{path}: must be a list of objects")
    for index, row in enumerate(rows):
        for name, kind in fields.items():
            if not isinstance(row, dict) or not isinstance(row.get(name), kind):
                raise ValueError(f"{path}: entry {index} needs {name} as a {kind.__name__}")
    return rows


def cited(root: Path = ROOT) -> list[dict]:
    """The cited tables: source, machine, model, workload, note, and rows as the source printed them."""
    path = Path(root) / LOGS / "cited.json"
    tables = _rows(path, load_json(path), _CITED) if path.exists() else []
    for table in tables:
        _rows(path, table["rows"], _CITED_ROW)
    return tables


def unmeasured(root: Path = ROOT) -> list[dict]:
    """What is not yet measured: {"what", "command"} each."""
    path = Path(root) / LOGS / "unmeasured.json"
    return _rows(path, load_json(path), _UNMEASURED) if path.exists() else []


def tried(root: Path = ROOT) -> list[dict]:
    """What was tried and left: {"what", "expected", "found"} each."""
    path = Path(root) / LOGS / "tried.json"
    return _rows(path, load_json(path), _TRIED) if path.exists() else []


def _checked(path, predictions) -> dict[str, str]:
    if not isinstance(predictions, dict) or not all(isinstance(text, str) for text in predictions.values()):
        raise ValueError(f"{path}: must be an object of strings, from what is measured to what is expected")
    return predictions


def predictions(root: Path = ROOT) -> dict[str, str]:
    """What was expected, by what is measured (the words given to --record)."""
    path = Path(root) / PREDICTIONS
    return _checked(path, load_json(path)) if path.exists() else {}


def predict(what: str, text: str, root: Path = ROOT) -> Path:
    """Add a prediction to the file, to be committed before the run. ValueError if `what` already has another."""
    if not what.strip() or not text.strip():
        raise ValueError("a prediction needs words: what is measured, and what is expected of it")
    known = predictions(root)
    if known.get(what, text) != text:
        raise ValueError(f"a prediction for {what!r} exists already ({known[what]!r}); predictions are not rewritten")
    path = Path(root) / PREDICTIONS
    path.parent.mkdir(exist_ok=True)
    dump_json(path, {**known, what: text})
    return path


def is_committed(what: str, text: str, commit: str, root: Path = ROOT) -> bool:
    """True if `commit` already held this prediction."""
    content = git.file_at(root, commit, PREDICTIONS)
    if content is None:
        return False
    try:
        committed = _checked(PREDICTIONS, json.loads(content))
    except ValueError as fault:
        raise ValueError(f"{PREDICTIONS} at commit {commit[:7]} cannot be read: {fault}") from None
    return committed.get(what) == text
