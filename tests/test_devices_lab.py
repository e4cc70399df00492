"""Several processes in the laboratory: prompts that they split, points that they measure together, one that dies."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from fastllama.lab.devices import world
from fastllama.lab.points.point import Point
from fastllama.lab.points.workload import Workload
from fastllama.lab.prompts import many, prompts_file
from fastllama.lab.prompts.results_file import Part, Results
from fastllama.lab.records import columns, schema
from tests import command, processes

SCRIPT = processes.ROOT / "run_llama.py"
HOW = ("--dtype", "fp32", "--device", "cpu", "--new-tokens", "8", "--slots", "2")
TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port")
ACCELERATE = ("accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
TIMEOUT_S = 900


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Eleven prompts, of which one cannot run."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [
        json.dumps({"prompt": "def main():" + " x" * (n % 4), "id": n, "max_new_tokens": 3 + n}) for n in range(10)
    ]
    file.write_text("\n".join([*lines[:4], "no json", *lines[4:]]) + "\n")
    return file


@pytest.fixture(scope="module")
def expected(prompts, tiny, tmp_path_factory):
    """The results of one process."""
    out = tmp_path_factory.mktemp("one") / "out.jsonl"
    assert command.run("--model", tiny, "--prompts", prompts, "--out", out, *HOW) == 0
    return out.read_bytes()


def launch(*words, **more) -> subprocess.CompletedProcess:
    """A launcher's run of run_llama.py."""
    environment = processes.environment(**more)
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)


def test_accelerate_splits_prompts_and_the_results_are_one_process_s(prompts, expected, tiny, tmp_path):
    out, port = tmp_path / "out.jsonl", processes.free_port()
    how = ("--multi_gpu", "--num_processes", 2, "--main_process_port", port)
    done = launch(*ACCELERATE, *how, SCRIPT, "--model", tiny, "--prompts", prompts, "--out", out, *HOW)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]  # no process left a file of its own
    assert done.stdout.count("11 prompts, 1 with an error;") == 1 and "in each of 2 processes" in done.stdout


def test_where_accelerate_starts_one_process_only_that_is_said(prompts, expected, tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.jsonl"
    # What `accelerate launch --cpu --num_processes 2` leaves to its one process.
    for name, value in (("ACCELERATE_USE_CPU", "True"), ("MASTER_PORT", "29500"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    assert command.run("--model", tiny, "--prompts", prompts, "--out", out, *HOW) == 0
    assert out.read_bytes() == expected
    assert "accelerate launch --cpu starts one process" in capsys.readouterr().err


@pytest.fixture
def begun(prompts, tiny, tmp_path):
    """(results file, what was asked) of a run of this file's prompts."""
    lines, sha256 = prompts_file.read(prompts)
    point = many.plan({"model": tiny, "dtype": "fp32", "device": "cpu"}, 2, 8)
    return tmp_path / "out.jsonl", {"prompts": sha256, **many.settings(point)}, len(lines)


def test_one_process_goes_on_where_several_were_interrupted(prompts, expected, begun, tiny, capsys):
    results = Results(*begun)
    lines = expected.decode().splitlines()
    for number, indices in ((0, (2, 0)), (1, (7,))):
        part = results.part(number)
        for index in indices:
            part.add(index, {name: value for name, value in json.loads(lines[index]).items() if name != "index"})
        part.close()
    with open(f"{results.partial}.1", "a") as file:
        file.write('{"index": 8, "te')  # cut off
    results.close()
    assert command.run("--model", tiny, "--prompts", prompts, "--out", begun[0], *HOW) == 0
    assert begun[0].read_bytes() == expected
    assert [path.name for path in begun[0].parent.iterdir()] == ["out.jsonl"]
    assert "3 of them done before" in capsys.readouterr().out


def test_another_number_of_processes_goes_on_where_some_were_interrupted(begun):
    results = Results(*begun)
    for number in range(3):
        part = results.part(number)
        part.add(number, {"text": f"of {number}"})
        part.close()
    results.close()
    results = Results(*begun)
    assert results.done == {0, 1, 2}
    for number in range(2):
        part = results.part(number)
        part.add(5 + number, {"text": f"of {number} again"})
        part.close()
    results.take_in()
    assert results.done == {0, 1, 2, 5, 6}
    assert [json.loads(results.lines[index])["text"] for index in (2, 6)] == ["of 2", "of 1 again"]
    results.close()
    assert [path.name for path in begun[0].parent.iterdir()] == [results.partial.name]


def test_what_another_run_s_process_left_is_refused(begun):
    results = Results(*begun)
    results.close()
    Part(results.partial, {**results.header, "seed": 7}, 0).close()
    with pytest.raises(ValueError, match=r"partial\.0 was begun with other seed"):
        Results(*begun)
    results.partial.unlink()
    with pytest.raises(ValueError, match=r"partial\.0 was begun with other seed"):
        Results(*begun)


def test_a_process_that_dies_ends_the_run_in_one_sentence(tiny, tmp_path):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    # Slot by slot there are results long before the end, which 4,000 prompts never reach.
    file.write_text("\n".join(json.dumps({"prompt": "def main():", "max_new_tokens": 8}) for _ in range(4000)))
    what = (SCRIPT, "--tensor-parallel", "--model", tiny, "--prompts", file, "--out", out)
    words = (*TORCHRUN, processes.free_port(), *what, *HOW)
    with subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        env=processes.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        partial = out.with_name("out.jsonl.partial")
        while run.poll() is None and not (partial.exists() and partial.read_bytes().count(b"\n") > 2):
            with suppress(subprocess.TimeoutExpired):
                run.wait(0.1)
        children = psutil.Process(run.pid).children()
        (victim,) = [child for child in children if child.environ().get("RANK") == "1"]
        victim.kill()
        _, said = run.communicate(timeout=TIMEOUT_S)
    assert run.returncode != 0
    assert said.count("error: another of the 2 processes of this run has ended or does not answer") == 1
    assert "process 0 ends too; results that were written are kept" in said
    assert "Traceback" not in said.partition("error: another")[2].partition("\n")[0]
    assert not out.exists() and partial.exists()


def test_what_one_process_or_several_cannot_do_is_refused(tiny, monkeypatch, capsys):
    assert command.run("--model", tiny, "--tensor-parallel", "--preallocate") == 2
    assert "start it with torchrun --nproc-per-node N run_llama.py --tensor-parallel" in capsys.readouterr().err
    for option in (("--sweep", "batch"), ("--profile",), ("--memory-only",)):
        assert command.run("--model", tiny, "--tensor-parallel", *option) == 2
        assert f"leave out {option[0]}" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert command.run("--model", tiny, "--preallocate") == 2
    assert "2 processes were started: give them --prompts and --out to split, or --tensor-parallel" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"switches": {"compile": "native"}}, "--compile native cannot be honoured beside --tensor-parallel"),
        ({"switches": {"products": "packed"}}, "--products packed cannot be honoured beside --tensor-parallel"),
        ({"switches": {"weights": "int8"}}, "--weights cannot be honoured beside --tensor-parallel"),
    ],
)
def test_a_point_of_several_processes_refuses_what_is_one_s(changes, said):
    with pytest.raises(ValueError, match=said):
        Point("demo", "fp32", "cpu", Workload(1, 8, 4), preallocate=True, world_size=2, **changes)


def test_alone_nothing_is_changed():
    assert world.ALONE.first and world.ALONE.of_first(5) == 5 and world.ALONE.of_all(5) == [5]
    point = Point("demo", "fp32", "cpu", Workload(1, 8, 4), preallocate=True)
    assert "world_size" not in point.identity() and point.command().startswith("python run_llama.py")


@pytest.fixture(scope="module")
def measured(tiny):
    """What each of two processes made of one point."""
    return processes.run("tests.measure_work", Path(tiny), (2,))[2]


def test_a_point_that_two_processes_measure_holds_them_and_their_memory(measured):
    first, second = measured
    assert first["hash"] == second["hash"] == first["reference_hash"] and first["parity"] == "exact"
    assert first["world_size"] == 2 and len(first["rank_mem_mb"]) == 2
    assert all(value > 50 for value in first["rank_mem_mb"]) and first["max_mem_mb"] == max(first["rank_mem_mb"])
    assert first["rank_mem_mb"] == second["rank_mem_mb"]
    assert "tensor parallel over 2 processes" in first["path"]
    assert first["baseline"]["path"] == "transformers, eager, tensor parallel over 2 processes"
    assert first["command"].startswith("torchrun --nproc-per-node 2 run_llama.py --tensor-parallel")
    schema.check_point(first, "the point")
    found = {column.name: column.value(first) for column in columns.of_points([first])}
    assert found["world_size"] == 2 and found["smallest_rank_mem_mb"] == min(first["rank_mem_mb"])


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"rank_mem_mb": [1.0]}, "field rank_mem_mb has 1 numbers and world_size is 2"),
        ({"rank_mem_mb": [1.0, 2.0]}, "but the largest of rank_mem_mb is 2.0"),
        ({"rank_mem_mb": [1.0, "2"]}, "field rank_mem_mb is .* but must be a list of at least one number"),
        ({"world_size": 0}, "field world_size is 0 but must be a whole number above zero"),
    ],
)
def test_a_point_with_wrong_ranks_is_refused(measured, changes, said):
    with pytest.raises(ValueError, match=said):
        schema.check_point({**measured[0], **changes}, "the point")
