"""Memory alone: predicted, measured once, kept by line, resumed, and shown as a table."""

import json
from pathlib import Path

import pytest

from fastllama.lab import __main__ as lab
from fastllama.lab.memory import memory, memory_table, peak, peak_only
from fastllama.lab.points import points_file
from fastllama.lab.points.point import Point
from fastllama.lab.points.workload import Workload
from fastllama.lab.sweeping import plan
from tests.command import read, run

ARGV = ["--model", "demo", "--dtype", "fp32", "--device", "cpu", "--prompt-length", "12", "--new-tokens", "1"]


@pytest.fixture
def measured(monkeypatch):
    """No child process: every peak is 500 MB, and whose was asked for."""
    asked = []

    def peaks(point, name):
        asked.append((point.model_name, name, point.positions))
        return memory.Peaks(500.0, 600.0, 1.0, 2.0)

    monkeypatch.setattr(memory, "peaks", peaks)
    monkeypatch.setattr(peak, "_demo_peaks", {})
    monkeypatch.setattr(peak_only, "_rehearsed", set())
    return asked


@pytest.mark.usefixtures("logs")
def test_a_point_is_run_once_and_a_sweep_resumes(measured, tmp_path, capsys):
    file = tmp_path / "memory.jsonl"
    argv = [*ARGV, "--preallocate", "--memory-only", "--sweep", "cache_length=100,200", "--json", file]
    assert run(*argv) == 0
    # The base once, loading and generating, a rehearsal with a short prompt once, each point once, and vanilla never.
    assert measured == [("demo", "ours", positions) for positions in (65, 13, 17, 100, 200)]
    entries = read(file)
    assert [entry["status"] for entry in entries] == ["memory"] * 2
    first = points_file.check(entries[0], "it")
    assert first["max_mem_mb"] == 500.0 and first["predicted_mb"] == pytest.approx(500, rel=0.01)
    assert sum(first["predicted_parts_mb"].values()) == pytest.approx(first["predicted_mb"])
    assert first["command"].endswith("--memory-only") and "load_s" not in first
    assert "predicted" in capsys.readouterr().err
    del measured[:]
    assert run(*argv) == 0 and run(*argv, "--retry-failed") == 0
    assert measured == [] and len(read(file)) == 2
    assert capsys.readouterr().err.count("already in") == 4
    # With times, it is another point.
    assert run(*ARGV, "--preallocate", "--sweep", "cache_length=100", "--json", file, "--dry-run") == 0
    assert "1 of 1 points to measure" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("logs")
def test_vanillas_static_cache_needs_no_rehearsal(measured, tmp_path):
    file = tmp_path / "memory.jsonl"
    assert run(*ARGV, "--static-cache", "--cache-length", "90", "--memory-only", "--json", file) == 0
    assert measured == [("demo", "static", positions) for positions in (65, 13, 90)]
    assert read(file)[0]["subject"] == "static"


def test_a_base_is_measured_with_the_points_own_prompt_and_loading_once(measured):
    for tokens in (12, 20, 12, 64, 9000):
        peak.measured_base(Point("demo", "fp32", "cpu", Workload(1, tokens, 1), True), "ours")
    assert [positions for _, _, positions in measured] == [65, 13, 21, 8192]


def test_it_does_not_go_with_times(capsys):
    assert run(*ARGV, "--memory-only", "--record", "a row") == 2
    assert "--memory-only measures no speed" in capsys.readouterr().err


def test_a_dry_run_names_the_subject_alone(measured, capsys):
    assert run(*ARGV, "--preallocate", "--memory-only", "--sweep", "cache_length=100,200", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "ours " in out and "vanilla " not in out and measured == []


@pytest.mark.parametrize("field", ["predicted_mb", "max_mem_mb"])
@pytest.mark.parametrize("value", [None, -1.0, float("nan"), "5", True])
def test_a_line_without_its_figures_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"it: field {field} is .* but must be"):
        points_file.check(entry(**{field: value}), "it")


# the table


def entry(prompt=8191, **changes) -> dict:
    switches = {"preallocate": True, "cache_k": None, "cache_v": None, "weights": None, "compile": "no"}
    values = {
        "schema": 1, "status": "memory", "reason": "only memory was measured", "subject": "ours",
        "model": "demo", "dtype": "bf16", "device": "cpu", "batch_size": 1, "prompt_length": prompt, "new_tokens": 1,
        "cache_length": prompt + 1, "seed": 0, "sampler": {}, "command": f"run {prompt}", "source_sha256": "0" * 64,
        "environment": {"cpu": "a", "threads": 1, "torch": "2"}, "predicted_mb": 1010.0, "max_mem_mb": 1000.0,
    }  # fmt: skip
    return values | changes | {"switches": switches | changes.get("switches", {})}


def test_the_table_has_a_row_a_length_and_a_column_a_contestant(tmp_path, capsys):
    int8 = {"cache_k": "int8", "cache_v": "int8"}
    lines = [
        entry(16383, max_mem_mb=2000.0, predicted_mb=1900.0),
        entry(switches=int8, max_mem_mb=1.0),
        entry(switches=int8, max_mem_mb=800.0, predicted_mb=808.0),
        entry(switches={"cache_k": "q8_0", "cache_v": "q4_0", "weights": "int8"}),
        entry(switches={"preallocate": False, "static_cache": True}),
    ]
    file = tmp_path / "memory.jsonl"
    for line in lines:
        points_file.append(file, line)
    assert lab.main(["memory-table", str(file)]) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in out.splitlines() if row.startswith("|")]
    assert rows[0] == [
        "context", "prompt", "vanilla StaticCache", "ours bf16", "ours int8", "ours q8_0/q4_0, int8 weights",
    ]  # fmt: skip
    same = "1,010 / 1,000 (+1.0%)"
    assert rows[2] == ["8,192", "8,191", same, "-", "808 / 800 (+1.0%)", same]
    assert rows[3] == ["16,384", "16,383", "-", "1,900 / 2,000 (-5.0%)", "-", "-"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "no line of a memory alone"),
        ([entry(), entry(model="other")], "the points are of 2 models, which are not one table: demo, other"),
        ([entry(), entry(environment={"cpu": "b", "threads": 1, "torch": "2"})], "of 2 machines"),
    ],
)
def test_what_is_no_table_is_one_sentence(lines, words):
    with pytest.raises(ValueError, match=words):
        memory_table.rows(lines)


def test_a_file_that_is_not_there(capsys, tmp_path):
    assert lab.main(["memory-table", str(tmp_path / "none.jsonl")]) == 2
    assert "there is no file of points" in capsys.readouterr().err


# the tables that ship


def make(word: str) -> plan.Plan:
    defaults = {"batch_size": [1], "prompt_length": [1000], "new_tokens": [200]}
    return plan.make({"device": "cpu"} if word != "memory-table-8b" else {}, [word], defaults, 10, 2)


def test_every_table_of_the_seed_ships():
    assert plan.SHIPPED.keys() == {
        "memory-table", "memory-table-8b", "memory-table-demo", "cache-size", "weights-table", "batch-table",
        "first-token",
    }  # fmt: skip


@pytest.mark.parametrize("word", sorted(plan.SHIPPED))
def test_every_table_parses_and_can_be_predicted(word, monkeypatch):
    monkeypatch.setattr(plan.checkpoint, "check_device", lambda name: name)
    monkeypatch.setattr(peak, "base_bytes", lambda: 300_000_000)
    made = make(word)
    assert made.left_out == [] and made.kind == word and made.file_name.startswith(f"{word}-")
    for each in made.points:
        for name in each.contestants:
            assert peak.predict(each, name).nbytes > 0
    assert len({each.name for each in made.planned}) == len(made.planned)


def test_the_memory_table_is_the_seeds_lengths_by_its_columns():
    found = {
        (point.positions, point.contestants[0], point.switches.get("cache_k")) for point in make("memory-table").points
    }
    who = [("ours", None), ("ours", "int8"), ("ours", "q4_0"), ("static", None)]
    assert found == {(2**power, *each) for power in range(13, 18) for each in who}


def test_the_dry_run_of_a_table(capsys, monkeypatch, tmp_path):
    assert (
        run("--sweep", "memory-table", "--device", "cpu", "--memory-only", "--dry-run", "--json", tmp_path / "x") == 0
    )
    assert "of 20 points to measure" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("case = 3", "case must be one or more tables [[case]] of options"),
        ("[case]\nbucket = 16", "case must be one or more tables [[case]] of options"),
        ("[[case]]\nbuckets = 16", "'buckets' is no option of a point"),
        ("[[case]]\nbucket = 3", "bucket=3 is not allowed"),
        ("bucket = 16\n[[case]]\nbucket = 32", "bucket is given twice"),
    ],
)
def test_wrong_cases_are_one_sentence(tmp_path, text, words):
    path = tmp_path / "sweep.toml"
    path.write_text("preallocate = true\n" + text)
    with pytest.raises(ValueError) as error:
        make(str(path))
    assert words in str(error.value)


def test_cases_go_with_every_point_of_the_product(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text("batch_size = [1, 2]\n[[case]]\npreallocate = true\nbucket = 64\n[[case]]\nstatic_cache = true\n")
    made = make(str(path))
    assert [each.name for each in made.planned] == [
        f"batch_size={rows},{case}" for rows in (1, 2) for case in ("preallocate=true,bucket=64", "static_cache=true")
    ]
    assert made.axes == ("batch_size", "preallocate", "bucket", "static_cache")


# the margin, of new processes

_LIVE = [
    Point("demo", "bf16", "cpu", Workload(1, 2999, 1), True, {"prefill_chunk": 512}, 60_000),
    Point("demo", "bf16", "cpu", Workload(1, 2999, 1), True, {"cache_k": "int8", "cache_v": "q4_0"}, 100_000),
    Point("demo", "fp32", "cpu", Workload(1, 999, 1), False, {"prefill_chunk": 512}, 20_000, static_cache=True),
]


@pytest.mark.usefixtures("forked")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks of anonymous memory are read from /proc")
@pytest.mark.parametrize("point", _LIVE, ids=lambda point: point.contestants[0] + point.switches.get("cache_k", ""))
def test_the_prediction_is_within_a_twentieth_of_the_measured_peak(point):
    found = peak_only.measure(point)
    assert found["predicted_parts_mb"]["cache"] > 40
    assert abs(peak_only.error(found)) <= peak.CHUNKED_MARGIN, json.dumps(found)
