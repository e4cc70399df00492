"""Records: measured points kept for good, each naming the commit and the source it measured."""

import os
import re
from datetime import datetime, timezone
from pathlib import Path

from fastllama.lab.pages import board
from fastllama.lab.records import changes, digest, git, schema, words
from fastllama.lab.records.sources import ROOT, require_clone, source_sha256

__all__ = ["check_recordable", "read", "read_all", "save", "source_sha256", "verify"]


def check_recordable(commit: str | None = None, root: Path = ROOT) -> str:
    """The full sha that a record made now would name.

    Raises ValueError, one sentence, where a record could not be trusted: a source file differs from HEAD,
    `commit` is not HEAD, or, in a folder without .git, `commit` is missing or is not a full sha.
    """
    root = Path(root)
    require_clone(root)
    if not git.is_repository(root):
        if commit is None:
            raise ValueError(f"{root} has no .git, so name the commit that this tree is a copy of with --commit SHA")
        if not schema.is_commit(commit):
            raise ValueError(f"--commit {commit!r} is not a full sha (40 lower-case hexadecimal digits)")
        return commit
    head = git.head(root)
    if commit is not None and not (len(commit) >= 7 and head.startswith(commit)):
        raise ValueError(f"--commit {commit} is not the commit checked out here, {head}")
    dirty = git.dirty_files(root)
    if dirty:
        more = f" and {len(dirty) - 3} more" if len(dirty) > 3 else ""
        raise ValueError(f"the working tree is dirty ({', '.join(dirty[:3])}{more}): commit first, then record")
    return head


def _claim(logs: Path, commit: str) -> Path:
    """A new folder with the next number. mkdir fails where another process was first, and the next is tried."""
    logs.mkdir(exist_ok=True)
    taken = [int(found[1]) for path in logs.iterdir() if (found := re.match(r"(\d{3,6})-", path.name))]
    number = max(taken, default=0) + 1
    while True:
        folder = logs / f"{number:03d}-{commit[:7]}"
        try:
            os.mkdir(folder)
            return folder
        except FileExistsError:
            number += 1


def save(point: dict, what: str, prediction: str | None = None, commit: str | None = None, root: Path = ROOT) -> Path:
    """Keep a measured point as tb_logs/<nnn>-<shortsha>/record.json; returns that path.

    Also renders changes.md and writes what TensorBoard shows. Without `prediction`, the one that
    tb_logs/predictions.json holds for the same `what` is taken. Raises ValueError as check_recordable does,
    on a point that does not follow the schema; and, with the record kept, when changes.md cannot be rendered: another
    record in tb_logs cannot be trusted, or scipy is missing.
    """
    root = Path(root)
    commit = check_recordable(commit, root)
    source = source_sha256(root)
    if point.get("source_sha256", source) != source:
        raise ValueError("the source files changed while the point was measured: measure it again, then record")
    prediction = prediction if prediction is not None else words.predictions(root).get(what)
    committed = None
    if prediction is not None and git.is_repository(root):
        committed = words.is_committed(what, prediction, commit, root)
    header = {
        "id": f"000-{commit[:7]}",
        "what": what,
        "prediction": prediction,
        "prediction_committed": committed,
        "commit": commit,
        "source_sha256": source,
        "recorded_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    schema.check_point(point, "the measured point")
    record = _sealed({**header, **{name: value for name, value in point.items() if name not in header}})
    schema.check_record(record, "the measured point")
    folder = _claim(root / words.LOGS, commit)
    path = folder / "record.json"
    try:
        words.dump_json(path, _sealed({**record, "id": folder.name}))
    except BaseException:
        if not path.exists():
            folder.rmdir()
        raise
    board.write_all([read(path)], root / words.LOGS)
    try:
        _render(root)
    except ValueError as fault:
        raise ValueError(f"the record is kept as {path}, but {changes.NAME} is not rendered: {fault}") from None
    return path


def _sealed(record: dict) -> dict:
    # A point keeps the schema that it was measured under.
    return record if record["schema"] == 1 else digest.seal(record)


def _render(root: Path) -> None:
    while True:
        records = read_all(root)
        changes.write(records, root)
        board.write_all(records, root / words.LOGS)
        # Another process may have added a record since ours was read: the last to write must have seen all.
        if len(_files(root)) == len(records):
            return


def _files(root: Path) -> list[Path]:
    return list((Path(root) / words.LOGS).glob("*/record.json"))


def read(path: Path) -> dict:
    """A record. ValueError names the file and its fault; FileNotFoundError if there is none."""
    path = Path(path)
    record = schema.check_record(words.load_json(path), str(path))
    if record["id"] != path.parent.name:
        raise ValueError(f"{path}: id {record['id']} is not the name of its folder")
    return record


def verify(record: dict, root: Path = ROOT) -> bool:
    """True if the record's source hash is its commit's, False if this clone does not hold the commit.

    Raises ValueError, naming the record, where the two differ, or where it claims a prediction that the
    commit does not hold.
    """
    name, commit = f"record {record['id']}", record["commit"]
    if not git.has_commit(root, commit):
        return False
    if git.source_sha256_of_commit(commit, root, record["schema"]) != record["source_sha256"]:
        raise ValueError(f"{name}: its source hash is not that of commit {commit[:7]}, so it measured something else")
    if record["prediction_committed"] and not words.is_committed(record["what"], record["prediction"], commit, root):
        raise ValueError(f"{name}: its prediction is not in {words.PREDICTIONS} at commit {commit[:7]}")
    return True


def read_all(root: Path = ROOT) -> list[dict]:
    """Every record under tb_logs, verified against git where the commit is at hand, in order of number."""
    records = [read(path) for path in _files(root)]
    records.sort(key=lambda record: (int(record["id"].split("-")[0]), record["recorded_at"], record["id"]))
    for record in records:
        verify(record, root)
    return records
