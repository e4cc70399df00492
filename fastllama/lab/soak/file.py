"""The result of a soak as one sealed JSON object, to be kept as tb_logs/soak/NAME.json."""

from pathlib import Path

from fastllama.lab.points.fields import (
    Kind,
    check,
    name,
    number,
    object_,
    or_null,
    sha256,
    small_count,
    small_size,
    time,
    word,
)
from fastllama.lab.records import digest, words
from fastllama.lab.records.schema1 import DTYPES
from fastllama.lab.records.schema2 import check_environment

SCHEMA = 1


_figure = Kind(lambda value: isinstance(value, float) and abs(value) < 1e15, "a number")
_flag = Kind(lambda value: isinstance(value, bool), "true or false")
_list = Kind(lambda value: isinstance(value, list), "a list")
_RESULT = {
    "soak_schema": small_size,
    "model": name,
    "draft": or_null(name),
    "dtype": word(*DTYPES),
    "device": name,
    "generations": small_size,
    "seconds": number,
    "bound_mb": number,
    "bound_objects": small_count,
    "host_growth_mb": _figure,
    "device_growth_mb": or_null(_figure),
    "object_growth": _figure,
    "changed": or_null(name),
    "flat": _flag,
    "works": object_,
    "left_out": object_,
    "samples": _list,
    "environment": object_,
    "command": name,
    "source_sha256": sha256,
    "recorded_at": time,
    "digest": sha256,
}


def check_result(result, where: str) -> dict:
    """The result itself; `ValueError`, one sentence that starts with `where`, if it cannot be trusted."""
    try:
        if not isinstance(result, dict) or result.get("soak_schema") != SCHEMA:
            raise ValueError(f"it is no result of a soak of schema {SCHEMA}")
        check(result, _RESULT, closed=True)
        check_environment(result)
        digest.check(result)
    except (ValueError, OverflowError, RecursionError) as fault:
        raise ValueError(f"{where}: {fault}") from None
    return result


def write(path: Path, result: dict) -> None:
    """Whole or not at all. `ValueError` if it could not be read again, `OSError` where it cannot be written."""
    words.dump_json(path, check_result(result, f"a soak for {path}"))


def read(path: Path) -> dict:
    """A result. `ValueError` names the file and its fault."""
    return check_result(words.load_json(path), str(path))
