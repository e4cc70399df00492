"""Malformed files: a reader takes exactly what is valid, or raises ValueError that names the file."""

import copy
import json
import logging
from statistics import median

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastllama.lab.points import points_file
from fastllama.lab.records import changes, digest, readme, record
from fastllama.lab.suite import suite_file
from tests.fake_records import current, fake_record, lossy_record, point
from tests.places import at, places

EXAMPLES = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
OLD, NEW, LOSSY = fake_record(), current(fake_record(parity="tie", reference_hash="00000000")), lossy_record()
POINTS = [current(point(batch_size=size, distinct_tokens=size)) for size in (1, 2, 3)]

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400)
JSON = st.recursive(
    SCALARS | st.sampled_from(["\ud800", 2**63, -0.0, 1e301, "0d6aa042", "exact", "2026-01-31T12:00:00+00:00"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def same(one, other) -> bool:
    """Equal as JSON: 1 is neither 1.0 nor true, and the order of keys does not count."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@st.composite
def edited(draw, made: dict):
    """`made` after up to three edits anywhere in it: retyped, taken out, added, renamed, exchanged, reordered."""
    made = copy.deepcopy(made)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(made))))
        holder, key = at(made, path[:-1]), path[-1]
        kind = draw(st.sampled_from(["value", "nudge", "remove", "add", "rename", "exchange", "reorder"]))
        if kind == "value":
            holder[key] = draw(JSON)
        elif kind == "nudge":
            value = holder[key]
            is_number = isinstance(value, (int, float)) and abs(value) < 1e300
            holder[key] = draw(st.sampled_from([value * 1.01, float(value), -value])) if is_number else str(value)
        elif kind == "remove":
            del holder[key]
        elif isinstance(holder, list):
            holder.reverse()
        elif kind == "add":
            holder[draw(st.text(max_size=8))] = draw(JSON)
        elif kind == "rename":
            holder[draw(st.text(max_size=8))] = holder.pop(key)
        elif kind == "exchange":
            other = draw(st.sampled_from(sorted(holder)))
            holder[key], holder[other] = holder[other], holder[key]
        else:
            items = draw(st.permutations(sorted(holder.items(), key=lambda item: item[0])))
            holder.clear()
            holder.update(items)
        if not made:
            break
    return made


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """`content` cut short, with a byte changed, or with a piece taken out, doubled or put in."""
    start = draw(st.integers(0, len(content) - 1))
    end = min(len(content), start + draw(st.integers(1, 60)))
    kind = draw(st.sampled_from(["cut", "flip", "out", "double", "insert"]))
    if kind == "cut":
        return content[:start]
    if kind == "flip":
        return content[:start] + bytes([content[start] ^ draw(st.integers(1, 255))]) + content[start + 1 :]
    if kind == "out":
        return content[:start] + content[end:]
    return content[:start] + (content[start:end] if kind == "double" else draw(st.binary(max_size=9))) + content[start:]


def placed(root, made: dict, content: bytes):
    path = root / made["id"] / "record.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def dumped(made: dict) -> bytes:
    return json.dumps(made, indent=2).encode()


@settings(EXAMPLES, max_examples=400)
@given(made=st.sampled_from([NEW, LOSSY]), data=st.data())
def test_a_record_is_taken_only_as_it_was_written(tmp_path, made, data):
    content = data.draw(edited(made).map(dumped) | damaged(dumped(made)))
    path = placed(tmp_path, made, content)
    try:
        read = record.read(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert same(read, made)


@settings(EXAMPLES, max_examples=400)
@given(whole=st.sampled_from([NEW, LOSSY]), data=st.data())
def test_an_edited_record_with_a_digest_of_its_own_is_valid_or_refused(tmp_path, whole, data):
    made = data.draw(edited(whole))
    try:
        path = placed(tmp_path, whole, dumped(digest.seal(made)))
    except ValueError:
        return  # NaN and infinity have no digest
    try:
        read = record.read(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        # What is taken says of itself what its samples say, and is fit to be shown.
        assert read.keys() - {"score", "not_scored"} == NEW.keys()
        assert read["environment"].keys() == NEW["environment"].keys()
        assert (read["parity"] == "lossy") == ("score" in read or "not_scored" in read)
        tokens = read["batch_size"] * read["new_tokens"]
        assert read["tok_per_s"] == pytest.approx(median(tokens / run["total_s"] for run in read["runs"]))
        changes.render([read], tmp_path).encode()
        readme.render("<!-- begin:lossy --><!-- end:lossy -->", [read], tmp_path).encode()


@settings(EXAMPLES, max_examples=300)
@given(content=edited(OLD).map(dumped) | damaged(dumped(OLD)))
def test_a_record_of_schema_1_is_fit_to_be_shown_or_refused(tmp_path, content):
    path = placed(tmp_path, OLD, content)
    try:
        read = record.read(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        changes.render([read], tmp_path).encode()


LINES = [json.dumps(made).encode() + b"\n" for made in POINTS]


@settings(EXAMPLES, max_examples=300)
@given(content=damaged(b"".join(LINES)))
def test_lines_are_taken_only_as_they_were_written(tmp_path, content):
    logging.disable(logging.WARNING)
    path = tmp_path / "points.jsonl"
    path.write_bytes(content)
    try:
        read = points_file.read(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    finally:
        logging.disable(logging.NOTSET)
    # Each is one that was written. A point may be gone (a whole line was cut out) or stand twice, but is never another.
    assert all(any(same(made, one) for one in POINTS) for made in read)
    if content.startswith(b"".join(LINES[:2])):
        assert same(read[:2], POINTS[:2])


@settings(EXAMPLES, max_examples=100)
@given(kept=st.integers(0, sum(map(len, LINES))))
def test_lines_that_are_whole_survive_a_cut(tmp_path, kept):
    logging.disable(logging.WARNING)
    path = tmp_path / "points.jsonl"
    path.write_bytes(b"".join(LINES)[:kept])
    whole = [number for number in range(3) if kept >= sum(map(len, LINES[: number + 1])) - 1]
    try:
        assert same(points_file.read(path), [POINTS[number] for number in whole])
    finally:
        logging.disable(logging.NOTSET)


@settings(EXAMPLES, max_examples=150)
@given(made=edited(POINTS[1]), order=st.permutations([0, 1, 2]))
def test_an_edited_line_is_refused_and_an_order_is_kept(tmp_path, made, order):
    path = tmp_path / "points.jsonl"
    lines = [POINTS[0], made, POINTS[2]]
    path.write_text("".join(json.dumps(lines[index]) + "\n" for index in order))
    try:
        read = points_file.read(path)
    except ValueError as error:
        assert f"{path} line {order.index(1) + 1}: " in str(error)
    else:
        assert same(read, [POINTS[index] for index in order])


@settings(EXAMPLES, max_examples=300)
@given(content=st.binary(max_size=64) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_content_raises_anything_but_value_error(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    for read in (record.read, points_file.read, suite_file.read):
        try:
            assert read(path) == []
        except ValueError as error:
            assert str(path) in str(error)
