"""Files of points: what comes back, what an interruption leaves, and what is refused."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastllama.lab import lines
from fastllama.lab.points import points_file
from fastllama.lab.points.sampler import Sampler
from tests.fake_records import ENVIRONMENT, point


def unmeasured(status="failed", **fields) -> dict:
    figures = {"predicted_mb": 9e4, "free_mb": 2e4} if status == "skipped" else {}
    return {
        "schema": 1,
        "status": status,
        "reason": "it does not fit",
        "model": "demo",
        "dtype": "fp32",
        "device": "cpu",
        "batch_size": 64,
        "prompt_length": 1000,
        "new_tokens": 200,
        "cache_length": 1200,
        "seed": 0,
        "sampler": Sampler().arguments,
        "switches": {"preallocate": True, "compile": "no"},
        "command": "python run_llama.py",
        "source_sha256": "ab" * 32,
        "environment": dict(ENVIRONMENT),
        **figures,
        **fields,
    }


def test_points_come_back_from_lines(tmp_path):
    path = tmp_path / "sweep.jsonl"
    assert points_file.read(path) == []
    for size in (1, 2):
        points_file.append(path, point(batch_size=size))
    assert points_file.read(path) == [point(batch_size=1), point(batch_size=2)]


def test_a_line_cut_short_is_measured_again(tmp_path):
    path = tmp_path / "sweep.jsonl"
    points_file.append(path, point(batch_size=1))
    with open(path, "a") as file:
        file.write(json.dumps(point(batch_size=2))[:100])
    assert points_file.read(path) == [point(batch_size=1)]
    points_file.append(path, point(batch_size=2))
    assert [made["batch_size"] for made in points_file.read(path)] == [1, 2]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "sweep.jsonl"
    path.write_text(json.dumps(point(batch_size=1)))
    points_file.append(path, point(batch_size=2))
    assert [made["batch_size"] for made in points_file.read(path)] == [1, 2]


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "sweep.jsonl"
    good = json.dumps(point())
    for bad in ("{", json.dumps(point(tok_per_s=1.0)), "7"):
        path.write_text(f"{good}\n{bad}\n{good}\n")
        with pytest.raises(ValueError, match=r"sweep\.jsonl line 2: "):
            points_file.read(path)
    with pytest.raises(ValueError, match="sweep"):
        points_file.append(path, point(max_mem_mb=float("nan")))


def test_what_failed_or_was_skipped_is_kept_beside_what_was_measured(tmp_path):
    path = tmp_path / "sweep.jsonl"
    entries = [point(), unmeasured(), unmeasured("skipped"), point(batch_size=2)]
    for entry in entries:
        points_file.append(path, entry)
    assert points_file.read(path) == entries
    assert points_file.read_measured(path) == [entries[0], entries[3]]


@pytest.mark.parametrize("name", sorted(unmeasured("skipped").keys() - {"status"}))
def test_an_entry_without_a_field_is_refused_and_the_field_named(tmp_path, name):
    entry = unmeasured("skipped")
    del entry[name]
    with pytest.raises(ValueError, match=rf"a point for .*: field {name} is"):
        points_file.append(tmp_path / "sweep.jsonl", entry)
    assert not (tmp_path / "sweep.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("status", "measured"),
        ("status", None),
        ("schema", 2),
        ("schema", True),
        ("reason", " "),
        ("batch_size", 0),
        ("cache_length", True),
        ("seed", -1),
        ("sampler", {"temperature": 0}),
        ("sampler", {"heat": 1}),
        ("sampler", {"temperature": 10**400}),
        ("sampler", []),
        ("predicted_mb", float("nan")),
        ("free_mb", None),
    ],
)
def test_an_edited_entry_is_refused_and_the_field_named(tmp_path, name, value):
    path = tmp_path / "sweep.jsonl"
    path.write_text(json.dumps({**unmeasured("skipped"), name: value}) + "\n")
    with pytest.raises(ValueError, match=rf"sweep\.jsonl line 1: field {name}"):
        points_file.read(path)


def test_a_measured_points_sampler_is_checked(tmp_path):
    points_file.append(tmp_path / "s.jsonl", point(sampler=Sampler(do_sample=True).arguments))
    with pytest.raises(ValueError, match=r"field sampler: top_p=7\.0 is not allowed"):
        points_file.append(tmp_path / "s.jsonl", point(sampler={"top_p": 7}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(unmeasured("skipped"))),
    value=JSON,
    inner=st.none() | st.sampled_from(sorted(Sampler().arguments)),
    cut=st.none() | st.integers(0, 900),
)
def test_no_malformed_entry_raises_anything_but_value_error(tmp_path, name, value, inner, cut):
    entry = unmeasured("skipped")
    if inner is None:
        entry[name] = value
    else:
        entry["sampler"] = {inner: value}
    path = tmp_path / "sweep.jsonl"
    path.write_text(json.dumps(entry)[:cut] + "\n")
    try:
        for read in points_file.read(path):
            assert Sampler(**read["sampler"]) and read["reason"].strip() and read["batch_size"] >= 1
    except ValueError as error:
        assert str(path) in str(error)


def test_a_line_that_another_process_is_writing_is_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "sweep.jsonl"
    line = json.dumps(point(batch_size=1)) + "\n"
    path.write_text(line[:100])

    class Lock:
        """The other process ends its line before it lets go of the file."""

        LOCK_EX = 2

        @staticmethod
        def flock(file, how):
            with open(path, "a") as other:
                other.write(line[100:])

    monkeypatch.setattr(lines, "fcntl", Lock)
    points_file.append(path, point(batch_size=2))
    assert [entry["batch_size"] for entry in points_file.read(path)] == [1, 2]
