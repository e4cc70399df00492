"""Files of prompts: one JSON object a line, {"prompt": "text"}, with an "id" and "max_new_tokens" of its own if it has.

A line that is wrong is kept with what is wrong: the others are not held up by it.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from fastllama.lab.points.fields import only_once
from fastllama.lab.points.workload import read_text

_FIELDS = ("prompt", "id", "max_new_tokens")


@dataclass(frozen=True)
class Asked:
    """One line. `error`: what is wrong with it, None where nothing is; `id` and `max_new_tokens` may be None."""

    index: int
    prompt: str
    id: str | int | None = None
    max_new_tokens: int | None = None
    error: str | None = None


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _content(words: str) -> dict:
    try:
        line = json.loads(words, object_pairs_hook=only_once)
    except (ValueError, RecursionError):
        raise ValueError("it is not valid JSON") from None
    if not isinstance(line, dict):
        raise ValueError('it is no object such as {"prompt": "text"}')
    return line


def _check(line: dict) -> None:
    unknown = next((name for name in line if name not in _FIELDS), None)
    if unknown is not None:
        raise ValueError(f"it has a field {unknown!r}; there are {', '.join(_FIELDS)}")
    if not isinstance(line.get("prompt"), str):
        raise ValueError("field prompt must be a text")
    if "id" in line and not isinstance(line["id"], str) and not _is_whole(line["id"]):
        raise ValueError("field id must be a text or a whole number")
    if "max_new_tokens" in line and not (_is_whole(line["max_new_tokens"]) and line["max_new_tokens"] >= 1):
        raise ValueError("field max_new_tokens must be a whole number of at least 1")


def _asked(index: int, number: int, words: str) -> Asked:
    name, line = None, {}
    try:
        line = _content(words)
        name = line.get("id") if isinstance(line.get("id"), str) or _is_whole(line.get("id")) else None
        _check(line)
    except ValueError as fault:
        return Asked(index, "", name, error=f"line {number}: {fault}")
    return Asked(index, line["prompt"], name, line.get("max_new_tokens"))


def read(path: str | Path) -> tuple[list[Asked], str]:
    """(what each line asks, empty lines left out; the sha256 of the content).

    Raises `FileNotFoundError` where there is no such file, `ValueError` where it is not UTF-8 or holds nothing.
    """
    text = read_text(str(path), "prompts file")
    lines = [(number, words) for number, words in enumerate(text.split("\n"), 1) if words.strip()]
    if not lines:
        raise ValueError(f"the prompts file {path} holds no line")
    asked = [_asked(index, number, words) for index, (number, words) in enumerate(lines)]
    return asked, hashlib.sha256(text.encode()).hexdigest()
