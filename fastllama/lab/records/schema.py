"""What a measured point and a record are: one place that refuses what is neither.

A point is what lab/measuring/measure.py made; a record is a point with its id, words, commit and time. New ones follow
schema 2; schema 1 is still read.
"""

import json
from contextlib import contextmanager

from fastllama.lab.points import fields
from fastllama.lab.points.fields import or_null, show
from fastllama.lab.points.sampler import Sampler
from fastllama.lab.records import schema1, schema2
from fastllama.lab.records.schema1 import COMPILES, DTYPES, PARITIES

__all__ = ["COMPILES", "DTYPES", "PARITIES", "SCHEMA", "check_point", "check_record", "is_commit"]

SCHEMA = 2
_VERSIONS = {1: schema1, 2: schema2}
_commit = fields.matching(r"[0-9a-f]{40}", "the full sha of a commit")
_RECORD = {
    "id": fields.matching(r"[0-9]{3,6}-[0-9a-f]{7}", "<nnn>-<7 digits of the commit>"),
    "what": fields.name,
    "prediction": or_null(fields.name),
    "prediction_committed": or_null(fields.flag),
    "commit": _commit,
    "source_sha256": fields.sha256,
    "recorded_at": fields.time,
}


def is_commit(text) -> bool:
    """True if `text` is a full sha-1: 40 lower-case hexadecimal digits."""
    return _commit(text)


def _version(point) -> int:
    """The schema that a point says it follows."""
    if not isinstance(point, dict):
        raise ValueError(f"a measured point must be an object, not a {type(point).__name__}")
    version = point.get("schema")
    if not fields.count(version) or version not in _VERSIONS:
        raise ValueError(f"schema is {show(version)} but this version reads schema 1 and {SCHEMA}")
    if "sampler" in point:
        try:
            Sampler(**point["sampler"])
        except (TypeError, ValueError) as fault:
            raise ValueError(f"field sampler: {fault}") from None
    json.dumps(point, ensure_ascii=False).encode()  # text that UTF-8 cannot hold could be read and not shown
    return version


@contextmanager
def _faults_at(where):
    try:
        yield
    except (ValueError, OverflowError, RecursionError) as fault:
        raise ValueError(f"{where}: {fault}") from None


def check_point(point, where: str) -> dict:
    """The point itself if it follows its schema; else ValueError, one sentence that starts with `where`."""
    with _faults_at(where):
        _VERSIONS[_version(point)].check_point(point)
    return point


def check_record(record, where: str) -> dict:
    """As check_point, and the fields that recording adds."""
    with _faults_at(where):
        if _version(record) == 1:
            schema1.check_point(record)
            fields.check(record, _RECORD)
        else:
            schema2.check_point(record, _RECORD)
            if record["prediction"] is None and record["prediction_committed"] is not None:
                raise ValueError("field prediction_committed is set but there is no prediction")
        if record["id"].split("-")[1] != record["commit"][:7]:
            raise ValueError(f"id {record['id']} does not end in the start of its commit {record['commit']}")
    return record
