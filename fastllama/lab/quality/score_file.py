"""Files of scores: one JSON object a line for each subject of `python -m fastllama.lab eval`, sealed by a digest."""

import json
from pathlib import Path

from fastllama.lab.points import fields
from fastllama.lab.points.fields import (
    check,
    name,
    number,
    object_,
    or_null,
    scalar,
    sha256,
    small_count,
    small_size,
    word,
)
from fastllama.lab.quality import score
from fastllama.lab.records import appended, digest, schema2
from fastllama.lab.records.schema1 import DTYPES
from fastllama.lab.records.words import LOGS

SCHEMA = 1
FOLDER = f"{LOGS}/quality"
AGAINST = (*DTYPES, "ours")
_LINE = {
    "schema": small_size,
    "model": name,
    "dtype": word(*DTYPES),
    "device": name,
    "against": word(*AGAINST),
    "switches": object_,
    "switch_defaults": object_,
    "path": name,
    "reserved_bytes": small_size,
    "text": object_,
    "score": object_,
    "greedy": object_,
    "seconds": number,
    "environment": object_,
    "command": name,
    "source_sha256": sha256,
    "recorded_at": fields.time,
    "digest": sha256,
}
_TEXT = {"name": name, "sha256": sha256, "tokens": small_size, "window": small_size}
_GREEDY = {
    "prompts": small_size,
    "prompt_length": small_size,
    "new_tokens": small_size,
    "same": small_count,
    "first_divergence": or_null(object_),
}


def _check_greedy(greedy: dict) -> None:
    check(greedy, _GREEDY, "greedy.", closed=True)
    found = greedy["first_divergence"]
    if (found is None) != (greedy["same"] == greedy["prompts"]) or greedy["same"] > greedy["prompts"]:
        raise ValueError(f"field greedy.same is {greedy['same']} beside a first_divergence of {fields.show(found)}")
    if found is not None:
        check(found, schema2.DIVERGENCE, "greedy.first_divergence.", closed=True)
        if found["row"] >= greedy["prompts"] or found["position"] >= greedy["new_tokens"]:
            raise ValueError("field greedy.first_divergence names a token that was not generated")


def check_line(line, where: str) -> dict:
    """The line itself; `ValueError`, one sentence that starts with `where`, if it is not one that can be trusted."""
    try:
        if not isinstance(line, dict) or line.get("schema") != SCHEMA or isinstance(line["schema"], bool):
            raise ValueError(f"it is not an object of schema {SCHEMA}, which this version reads")
        check(line, _LINE, closed=True)
        check(line["switches"], dict.fromkeys(line["switches"], scalar), "switches.")
        check(line["switch_defaults"], dict.fromkeys(line["switches"], scalar), "switch_defaults.", closed=True)
        check(line["text"], _TEXT, "text.", closed=True)
        score.check(line["score"], "score.")
        _check_greedy(line["greedy"])
        schema2.check_environment(line)
        digest.check(line)
    except (ValueError, OverflowError, RecursionError) as fault:
        raise ValueError(f"{where}: {fault}") from None
    return line


def append(path: Path, line: dict) -> None:
    """Add a line, on disk before this returns. `ValueError` if it could not be read again."""
    appended.append(path, json.dumps(check_line(line, f"a score for {path}"), allow_nan=False))


def read(path: Path) -> list[dict]:
    """The lines of a file. `ValueError` names the file and the line that is wrong."""
    lines = []
    for number_, text in enumerate(Path(path).read_bytes().splitlines(), 1):
        where = f"{path} line {number_}"
        try:
            line = json.loads(text, object_pairs_hook=fields.only_once)
        except (ValueError, RecursionError) as fault:
            raise ValueError(f"{where}: not valid JSON: {fault}") from None
        lines.append(check_line(line, where))
    return lines


def kept(root: Path) -> dict[Path, list[dict]]:
    """Every file of scores that the repository keeps, in order of name."""
    return {path: read(path) for path in sorted((Path(root) / FOLDER).glob("*.jsonl"))}
