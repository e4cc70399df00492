"""A sweep: what is kept when, what an interruption leaves, and what a second run does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import run_llama
from fastllama import demo
from fastllama.lab.measuring import checkpoint, measure
from fastllama.lab.memory import peak
from fastllama.lab.points import points_file
from fastllama.lab.records import record
from fastllama.lab.sweeping import dry_run, estimate
from tests.command import read, run

SMALL = ["--dtype", "fp32", "--device", "cpu", "--prompt-length", "12", "--new-tokens", "4", "--runs", "1"]
SMALL += ["--warmup", "0"]


pytestmark = pytest.mark.usefixtures("light", "logs")


# what is measured


def test_switches_and_sampler_options_are_swept_and_recorded(tiny, tmp_path, capsys):
    file = tmp_path / "points.jsonl"
    argv = ["--model", tiny, *SMALL, "--preallocate", "--do-sample", "--json", file]
    assert run(*argv, "--sweep", "bucket=16,256", "--sweep", "temperature=0.5,1.0") == 0
    points = points_file.read_measured(file)
    found = [(kept["switches"]["bucket"], kept["sampler"]["temperature"]) for kept in points]
    assert found == [(16, 0.5), (16, 1.0), (256, 0.5), (256, 1.0)]
    assert {kept["parity"] for kept in points} == {"exact"}
    assert points[0]["hash"] == points[2]["hash"] != points[1]["hash"] == points[3]["hash"]
    assert "--do-sample --temperature 0.5" in points[0]["command"] and "--bucket 16" in points[0]["command"]
    assert "bucket=16,temperature=0.5" in capsys.readouterr().out


def test_a_value_that_is_not_allowed_ends_it_before_any_work(tiny, monkeypatch, capsys):
    monkeypatch.setattr(measure, "measure", lambda *given: pytest.fail("measured"))
    assert run("--model", tiny, *SMALL, "--preallocate", "--sweep", "bucket=64,3") == 2
    assert capsys.readouterr().err == "error: bucket='3' is not allowed; allowed: an integer >= 16\n"
    assert not run_llama.LOGS.exists()


# what goes wrong


@pytest.fixture
def broken(monkeypatch):
    """Batch 2 raises whatever is put here; a list of the batch sizes that were begun."""
    real, fault, begun = measure.measure, [], []

    def measured(point, progress):
        begun.append(point.workload.batch_size)
        if point.workload.batch_size == 2 and fault:
            raise fault[0]
        return real(point, progress)

    monkeypatch.setattr(measure, "measure", measured)
    return fault, begun


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (MemoryError("batch 2 does not fit in memory"), "batch 2 does not fit in memory"),
        (RuntimeError("shapes 3 and 4"), "RuntimeError: shapes 3 and 4"),
        (KeyError("x"), "KeyError: 'x'"),
    ],
)
def test_a_point_that_fails_is_kept_with_its_reason_and_the_sweep_goes_on(tiny, broken, fault, reason, capsys):
    faults, begun = broken
    faults.append(fault)
    argv = ["--model", tiny, *SMALL, "--sweep", "batch_size=1,2,3"]
    assert run(*argv) == 2
    (file,) = run_llama.LOGS.glob("sweeps/*.jsonl")
    one, failed, three = points_file.read(file)
    assert (one["batch_size"], three["batch_size"]) == (1, 3)
    assert (failed["status"], failed["batch_size"], failed["reason"]) == ("failed", 2, reason)
    assert failed["source_sha256"] == record.source_sha256() and "--batch-size 2" in failed["command"]
    out, err = capsys.readouterr()
    assert f"error: batch_size=2: {reason}\n" in err and "failed" in out
    # It stays as it is, until it shall be tried again.
    assert run(*argv) == 2 and begun == [1, 2, 3]
    assert f"batch_size=2 (failed: {reason}; --retry-failed tries again)" in capsys.readouterr().err
    faults.clear()
    assert run(*argv, "--retry-failed") == 0 and begun == [1, 2, 3, 2]
    assert run(*argv) == 0 and begun == [1, 2, 3, 2]
    assert [points_file.is_measured(entry) for entry in points_file.read(file)] == [True, False, True, True]


def test_a_point_that_cannot_fit_is_skipped_with_the_figures(tiny, broken, monkeypatch, capsys):
    _, begun = broken
    # More than this process may hold by now, whatever ran in it before; less than the second point needs.
    free = {"bytes": 4_500_000_000}
    monkeypatch.setattr(peak, "available_bytes", lambda device: free["bytes"])
    argv = ["--model", tiny, *SMALL, "--preallocate", "--sweep", "cache_length=none,20000000"]
    assert run(*argv) == 0 and len(begun) == 1
    (file,) = run_llama.LOGS.glob("sweeps/*.jsonl")
    _, skipped = points_file.read(file)
    assert skipped["status"] == "skipped" and skipped["cache_length"] == 20_000_000 and skipped["free_mb"] == 4500.0
    # Two layers, two kv heads of eight, keys and values, four bytes: more than 5 GB.
    assert skipped["predicted_mb"] > 5000
    err = capsys.readouterr().err
    assert "skipped: cache_length=20000000: batch 1 and 20000000 positions are predicted to need" in err
    assert "4.5 GB are free on cpu" in err
    assert run(*argv[:-1], "cache_length=20000000,30000000") == 2  # nothing was measured
    assert len(begun) == 1
    file.write_text("\n".join(file.read_text().splitlines()[:2]) + "\n")
    # Judged again each time, and not written again.
    assert run(*argv) == 0 and len(begun) == 1 and len(read(file)) == 2
    free["bytes"] = 10**12
    monkeypatch.setattr(measure, "measure", lambda point, progress: begun.append(point) or pytest.fail("as it should"))
    with pytest.raises(pytest.fail.Exception):
        run(*argv)
    assert begun[-1].cache_length == 20_000_000


def test_a_sweep_of_one_point_keeps_its_failure_and_no_path(tiny, broken):
    broken[0].append(ValueError(f"the checkpoint {tiny} lacks 1 tensors"))
    assert run("--model", tiny, *SMALL, "--sweep", "batch_size=2") == 2
    (file,) = run_llama.LOGS.glob("sweeps/*.jsonl")
    (failed,) = points_file.read(file)
    assert failed["reason"] == "the checkpoint tiny lacks 1 tensors" and str(tiny) not in file.read_text()


def test_a_single_point_that_cannot_fit_is_an_error(tiny, broken, monkeypatch, capsys):
    monkeypatch.setattr(peak, "available_bytes", lambda device: 1000)
    assert run("--model", tiny, *SMALL) == 2 and broken[1] == []
    assert "error: tiny cannot run: batch 1 and 16 positions are predicted to need" in capsys.readouterr().err


# interruptions


def test_another_machines_points_are_not_this_ones(tiny, broken, monkeypatch):
    argv = ["--model", tiny, *SMALL, "--sweep", "batch_size=1,3"]
    assert run(*argv) == 0 and run(*argv) == 0 and broken[1] == [1, 3]
    (file,) = run_llama.LOGS.glob("sweeps/*.jsonl")
    moved = [{**entry, "environment": {**entry["environment"], "cpu": "Another CPU"}} for entry in read(file)]
    file.unlink()
    monkeypatch.setattr(points_file, "check", lambda entry, where: entry)
    for entry in moved:
        points_file.append(file, entry)
    assert run(*argv) == 0 and broken[1] == [1, 3, 1, 3]


_PROGRAM = """
import sys, time
import run_llama
from fastllama.lab.measuring import ceiling
from fastllama.lab.measuring import measure
from fastllama.lab.memory import memory
from fastllama.lab.points import points_file
from pathlib import Path

memory.peaks = lambda point, name: memory.Peaks(10.0, 20.0, 0.5)
measure.Ceiling = lambda device: ceiling.Ceiling(device, 2**20)
run_llama.LOGS = Path(sys.argv[1])
stop_at, torn, append = int(sys.argv[2]), sys.argv[3] == "torn", points_file.append

def stop():
    print("stopped", flush=True)
    time.sleep(600)

def slow_append(path, entry):
    if torn and entry["batch_size"] == stop_at:
        with open(path, "a") as file:
            file.write(repr(entry)[:200])
        stop()
    append(path, entry)

def slow_measure(point, progress, real=measure.measure):
    if not torn and point.workload.batch_size == stop_at:
        progress("stopping")
        stop()
    return real(point, progress)

points_file.append, measure.measure = slow_append, slow_measure
sys.exit(run_llama.main(sys.argv[4:]))
"""


def start(logs, stop_at, how, argv) -> subprocess.Popen:
    search = os.pathsep.join(filter(None, [str(Path(run_llama.__file__).parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", _PROGRAM, str(logs), str(stop_at), how, *argv]
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": search}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(child, logs, holds) -> Path:
    """The file of the sweep, as soon as `holds` of its bytes."""
    for _ in range(60_000):
        for file in logs.glob("sweeps/*.jsonl"):
            if holds(file.read_bytes()):
                return file
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.01)
    raise AssertionError("the sweep wrote nothing")


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("how", ["between lines", "torn"])
def test_kill_9_in_the_middle_of_a_sweep_loses_nothing(tiny, tmp_path, how, broken, capsys, caplog):
    """A real process, killed while it measures its third point, or with half of that point's line written."""
    argv = ["--model", tiny, *SMALL, "--sweep", "batch_size=1,2,3,4"]
    child = start(run_llama.LOGS, 3, how, argv)
    try:
        # Two whole lines; in the torn case a part of the third as well.
        file = wait_for(
            child, run_llama.LOGS, lambda text: text.count(b"\n") == 2 and (how != "torn" or not text.endswith(b"\n"))
        )
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait(60) == -signal.SIGKILL
    finally:
        child.kill()
        child.communicate()
    left = file.read_bytes()
    whole, _, tail = left.rpartition(b"\n")
    assert bool(tail) == (how == "torn")
    assert run(*argv) == 0
    # The two that were measured are there to the byte and were not measured again; the others are there once.
    assert broken[1] == [3, 4]
    assert file.read_bytes().startswith(whole + b"\n")
    assert [entry["batch_size"] for entry in points_file.read_measured(file)] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("already in") == 2
    assert ("cut short" in caplog.text) == (how == "torn")


# a dry run


def test_a_dry_run_names_the_points_and_loads_nothing(tiny, monkeypatch, capsys, tmp_path):
    argv = ["--model", tiny, *SMALL, "--preallocate", "--sweep", "batch_size=1,2,3", "--sweep", "cache_length=none,9"]
    file = tmp_path / "points.jsonl"
    assert run(*argv[:-4], "--sweep", "batch_size=2", "--json", file) == 0
    capsys.readouterr()
    for module, name in ((checkpoint, "load"), (measure, "measure"), (demo.names, "publish")):
        monkeypatch.setattr(module, name, lambda *given: pytest.fail("worked"))
    assert run(*argv, "--json", file, "--dry-run") == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in row.strip("│").split("│")] for row in out.splitlines() if row.startswith("│")]
    assert {name: state for name, state, *_ in rows} == {
        "batch_size=1,cache_length=none": "to do",
        "batch_size=2,cache_length=none": "measured",
        "batch_size=3,cache_length=none": "to do",
        **{f"batch_size={size},cache_length=9": "left out" for size in (1, 2, 3)},
    }
    assert "ours " in rows[0][3] and "vanilla " in rows[0][3] and rows[0][2].endswith(" s")
    assert "2 of 3 points to measure, about" in " ".join(out.split())
    assert "left out: batch_size=1,cache_length=9: a cache of 9 positions is too short" in " ".join(out.split())
    assert not run_llama.LOGS.exists()


def test_a_dry_run_of_a_model_that_would_be_built(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(peak, "available_bytes", lambda device: 20 * 10**9)
    argv = ["--model", "inflated:llama-2-7b", "--dtype", "fp32", "--device", "cpu", "--dry-run"]
    assert run(*argv) == 0
    assert dry_run.NO_ROOM in capsys.readouterr().out
    assert not list(tmp_path.glob("fastllama/inflated*"))


def test_the_estimate_grows_with_the_work(tiny):
    rates = estimate.Rates(1e10, {"fp32": 1e11})
    plan = run_llama._plan(run_llama._parse(["--dtype", "fp32", "--device", "cpu", "--sweep", "new_tokens=100,1000"]))
    short, long = (estimate.seconds(point, rates) for point in plan.points)
    base = estimate.seconds(plan.points[0], estimate.Rates(1e30, {"fp32": 1e30}))
    assert long - base > 5 * (short - base) > 0
    assert [estimate.words(value) for value in (12.3, 720, 12_600)] == ["12 s", "12 min", "3.5 h"]
