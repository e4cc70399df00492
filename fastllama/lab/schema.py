"""Schema 1 of a measured point and of a record: one place that refuses what is not one.

A point is what lab/measure.py made; a record is a point with its id, words, commit and source hash.
"""

import math
import re
from contextlib import contextmanager
from datetime import datetime

from fastllama.lab import figures

SCHEMA = 1
DTYPES = ("fp32", "bf16", "fp16")
COMPILES = ("no", "static", "dynamic", "fullgraph", "native")
PARITIES = ("exact", "tie", "half", "differs", "reference")

_HASH = re.compile(r"[0-9a-f]{8}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"[0-9]{3,6}-[0-9a-f]{7}")
_TIME = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", re.ASCII)
# A stored median may have been rounded to three decimals.
_RELATIVE, _ABSOLUTE = 1e-3, 6e-4


def is_commit(text) -> bool:
    """True if `text` is a full sha-1: 40 lower-case hexadecimal digits."""
    return isinstance(text, str) and _COMMIT.fullmatch(text) is not None


def _number(value) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 <= value <= 1e300  # false for NaN and infinity; an int too large for a float compares safely


def _count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _size(value) -> bool:
    return _count(value) and value > 0


def _text(value) -> bool:
    return isinstance(value, str)


def _name(value) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _word(*allowed):
    def check(value) -> bool:
        return isinstance(value, str) and value in allowed

    check.wanted = "one of " + ", ".join(allowed)
    return check


def _matching(pattern, wanted):
    def check(value) -> bool:
        return isinstance(value, str) and pattern.fullmatch(value) is not None

    check.wanted = wanted
    return check


def _or_null(check):
    def either(value) -> bool:
        return value is None or check(value)

    either.wanted = f"{check.wanted}, or null"
    return either


def _time(value) -> bool:
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        return False
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return True


def _object(value) -> bool:
    return isinstance(value, dict)


def _flag(value) -> bool:
    return isinstance(value, bool)


_number.wanted = "a finite number that is not negative"
_count.wanted = "a whole number that is not negative"
_size.wanted = "a whole number above zero"
_text.wanted = "a string"
_name.wanted = "a string that is not empty"
_time.wanted = "a UTC time such as 2026-01-31T12:00:00+00:00"
_object.wanted = "an object"
_flag.wanted = "true or false"
_hash = _matching(_HASH, "8 hexadecimal digits")

_MEASURED = {
    "path": _name,
    "tok_per_s": _number,
    "decode_tok_per_s": _or_null(_number),
    "row_tok_per_s": _or_null(_number),
    "ttft_ms": _number,
    "max_mem_mb": _or_null(_number),
    "max_reserved_mb": _or_null(_number),
    "load_s": _or_null(_number),
    "warmup_s": _or_null(_number),
    "hash": _hash,
}
_POINT = {
    "schema": _count,
    "model": _name,
    "dtype": _word(*DTYPES),
    "device": _name,
    "batch_size": _size,
    "prompt_length": _size,
    "new_tokens": _size,
    "cache_length": _or_null(_size),
    "seed": _count,
    "switches": _object,
    **_MEASURED,
    "compile_s": _or_null(_number),
    "reference_hash": _or_null(_hash),
    "parity": _word(*PARITIES),
    "first_divergence": _or_null(_object),
    "recompiles_after_warmup": _count,
    "baseline": _or_null(_object),
    "speedup": _number,
    "decode_speedup": _or_null(_number),
    "read_gb_per_s": _or_null(_number),
    "ceiling_gb_per_s": _or_null(_number),
    "ceiling_fraction": _or_null(_number),
    "distinct_tokens": _count,
    "text_sample": _text,
    "environment": _object,
    "command": _name,
}
_RECORD = {
    "id": _matching(_ID, "<nnn>-<7 digits of the commit>"),
    "what": _name,
    "prediction": _or_null(_name),
    "prediction_committed": _or_null(_flag),
    "commit": _matching(_COMMIT, "the full sha of a commit"),
    "source_sha256": _matching(_SHA256, "64 hexadecimal digits"),
    "recorded_at": _time,
}
_DIVERGENCE = {"row": _count, "position": _count, "margin": _or_null(_number)}
_ENVIRONMENT = {"cpu": _name, "threads": _size, "torch": _name}


def _show(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fields(value, table, prefix=""):
    for name, check in table.items():
        if name not in value:
            raise ValueError(f"field {prefix}{name} is missing")
        if not check(value[name]):
            raise ValueError(f"field {prefix}{name} is {_show(value[name])} but must be {check.wanted}")


def _runs(value, prefix=""):
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {prefix}runs must be a list of at least one sample")
    for index, run in enumerate(value):
        if not isinstance(run, dict):
            raise ValueError(f"field {prefix}runs[{index}] must be an object with total_s and first_s")
        _fields(run, {"total_s": _number, "first_s": _number}, f"{prefix}runs[{index}].")
        if not 1e-9 <= run["total_s"] < 1e9 or not run["first_s"] < 1e9:
            raise ValueError(f"field {prefix}runs[{index}] holds seconds that nothing takes")


def _agrees(name, stored, derived):
    same = derived is not None and stored is not None
    same = math.isclose(stored, derived, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE) if same else stored is derived
    if not same:
        raise ValueError(f"field {name} is {_show(stored)} but the record's own samples give {_show(derived)}")


def _medians(value, point, prefix=""):
    derived = figures.summary(value["runs"], point["batch_size"], point["new_tokens"])
    for name in figures.DERIVED:
        _agrees(prefix + name, value[name], derived[name])


def _ratio(above, below):
    return None if above is None or not below else above / below


def _parity(point):
    same = point["hash"] == point["reference_hash"]
    if point["parity"] == "exact" and not same:
        raise ValueError(f"parity is exact but hash {point['hash']} is not reference_hash {point['reference_hash']}")
    if point["parity"] in ("tie", "differs") and same:
        raise ValueError(f"parity is {point['parity']} but hash and reference_hash are both {point['hash']}")


def _point(point):
    if point.get("schema") != SCHEMA or not _count(point["schema"]):
        raise ValueError(f"schema is {_show(point.get('schema'))} but this version reads schema {SCHEMA}")
    _fields(point, _POINT)
    _fields(point["switches"], {"preallocate": _flag, "compile": _word(*COMPILES)}, "switches.")
    _fields(point["environment"], _ENVIRONMENT, "environment.")
    if point["device"] != "cpu":
        _fields(point["environment"], {"gpu": _name}, "environment.")
    if point["first_divergence"] is not None:
        _fields(point["first_divergence"], _DIVERGENCE, "first_divergence.")
    _runs(point.get("runs"))
    _medians(point, point)
    _parity(point)
    baseline = point["baseline"]
    if baseline is None:
        if point["parity"] != "reference":
            raise ValueError(f"parity is {point['parity']} but there is no baseline to compare with")
        _agrees("speedup", point["speedup"], 1.0)
        _agrees("decode_speedup", point["decode_speedup"], None if point["decode_tok_per_s"] is None else 1.0)
    else:
        _fields(baseline, _MEASURED, "baseline.")
        _runs(baseline.get("runs"), "baseline.")
        _medians(baseline, point, "baseline.")
        _agrees("speedup", point["speedup"], _ratio(point["tok_per_s"], baseline["tok_per_s"]))
        _agrees(
            "decode_speedup", point["decode_speedup"], _ratio(point["decode_tok_per_s"], baseline["decode_tok_per_s"])
        )
    _agrees("ceiling_fraction", point["ceiling_fraction"], _ratio(point["read_gb_per_s"], point["ceiling_gb_per_s"]))


@contextmanager
def _faults_at(where):
    try:
        yield
    except (ValueError, OverflowError, RecursionError) as fault:
        raise ValueError(f"{where}: {fault}") from None


def check_point(point, where: str) -> dict:
    """The point itself if it follows schema 1; else ValueError, one sentence that starts with `where`."""
    with _faults_at(where):
        if not isinstance(point, dict):
            raise ValueError(f"a measured point must be an object, not a {type(point).__name__}")
        _point(point)
    return point


def check_record(record, where: str) -> dict:
    """As check_point, and the fields that recording adds."""
    check_point(record, where)
    with _faults_at(where):
        _fields(record, _RECORD)
        if record["id"].split("-")[1] != record["commit"][:7]:
            raise ValueError(f"id {record['id']} does not end in the start of its commit {record['commit']}")
    return record
