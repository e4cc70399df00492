"""compare: records from their samples, commits measured in turns in work trees that are gone afterwards."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fastllama.lab import __main__ as command_line
from fastllama.lab.measuring import processes, statistics
from fastllama.lab.records import git, sources, words
from tests import fake_records
from tests.fake_records import COMMIT, fake_record, point
from tests.interruptions import heed

# Stands in for run_llama.py: notes that it ran, and hands out the next of the points committed beside it.
SCRIPT = """\
import json, os, subprocess, sys
from pathlib import Path
tree, arguments = Path(__file__).parent, sys.argv[1:]
log = Path(os.environ["COMPARE_LOG"])
side = json.loads((tree / "side.json").read_text())
with open(log, "a") as file:
    file.write(json.dumps({"name": side["name"], "tree": str(tree), "arguments": arguments}) + "\\n")
if side["fault"]:
    sys.exit(side["fault"])
if side["sleeps"]:
    child = subprocess.Popen(["sleep", "600"])
    Path(log.with_suffix(".pid")).write_text(str(child.pid))
    child.wait()
turn = sum(json.loads(line)["name"] == side["name"] for line in log.read_text().splitlines()) - 1
with open(arguments[arguments.index("--json") + 1], "w") as file:
    for made in side["turns"][turn]:
        file.write(json.dumps(made) + "\\n")
"""
ENDS = 0.99, 1.01, 1.0, 0.995, 1.005, 1.002, 0.998, 1.0


@pytest.fixture
def lab(tmp_path, capsys, monkeypatch):
    """Run the command line on tmp_path; gives (exit code, standard output, standard error)."""
    monkeypatch.setenv("COMPARE_LOG", str(tmp_path / "log.jsonl"))
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments):
        code = command_line.main(["--root", str(tmp_path / "repository"), *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def side(tmp_path):
    """Commit a run_llama.py that measures what it is told; gives the branch's name."""
    root = tmp_path / "repository"
    root.mkdir()
    fake_records.make_repository(root)
    (root / "run_llama.py").write_text(SCRIPT)

    def make(name: str, speed: float = 40.0, fault: str = "", sleeps: bool = False, points: int = 1, **fields) -> str:
        turns = [[point(speed * end, **fields)] * points for end in ENDS]
        told = {"name": name, "fault": fault, "sleeps": sleeps, "turns": turns}
        fake_records.git(root, "checkout", "-q", "-B", name, "main")
        (root / "side.json").write_text(json.dumps(told))
        (root / "run_llama.py").write_text(SCRIPT)
        fake_records.commit(root)
        return name

    return make


def logged(tmp_path: Path) -> list[dict]:
    path = tmp_path / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_no_tree_is_left(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    assert fake_records.git(root, "worktree", "list").count("\n") == 0
    assert fake_records.git(root, "worktree", "prune", "--dry-run", "--verbose") == ""
    assert not any(Path(run["tree"]).exists() for run in logged(tmp_path))


def stored(tmp_path: Path, *records: dict) -> list[str]:
    for made in records:
        folder = tmp_path / "repository" / "tb_logs" / made["id"]
        folder.mkdir(parents=True)
        words.dump_json(folder / "record.json", made)
    return [made["id"] for made in records]


# --- records


@pytest.mark.parametrize(
    ("speed", "allowed", "word", "code"),
    [
        (44.0, "3%", "faster than", 0),
        (40.1, "0%", "no different from", 0),
        (36.0, None, "slower than", 0),
        (36.0, "3%", "slower than", 1),
        (36.0, "3", "slower than", 1),
        (36.0, "12%", "slower than", 0),
    ],
)
def test_two_records(tmp_path, lab, speed, allowed, word, code):
    a, b = stored(tmp_path, fake_record(1, speed=40.0), fake_record(2, speed=speed))
    more = [] if allowed is None else ["--fail-if-slower", allowed]
    done, out, error = lab("compare", a, b, *more)
    assert (done, error) == (code, "")
    assert f"{b} is {word} {a} in decode speed: median ratio {speed / 40:.3f}" in out and "p = " in out
    assert "over that of the vanilla of the same run" in out


def test_a_noisy_loss_fails_nothing(tmp_path, lab):
    a, b = stored(tmp_path, fake_record(1, spread=0.2), fake_record(2, speed=36.0, spread=0.2))
    code, out, _ = lab("compare", a, b, "--fail-if-slower", "3%")
    assert code == 0 and "no different from" in out


def test_records_by_path_and_what_json_holds(tmp_path, lab):
    names = stored(tmp_path, fake_record(1, speed=40.0), fake_record(2, speed=36.0))
    folders = [tmp_path / "repository" / "tb_logs" / name for name in names]
    file = tmp_path / "result.json"
    code, _, _ = lab("compare", folders[0], folders[1] / "record.json", "--json", file, "--fail-if-slower", "3%")
    result = json.loads(file.read_text())
    assert code == 1 and result["failed"] and result["verdict"] == statistics.SLOWER
    assert [result["a"], result["b"]] == names and result["figure"] == "decode_tok_per_s"
    verdict = result["verdicts"]["decode_tok_per_s"]
    assert verdict["ratio"] == pytest.approx(0.9) and verdict["low"] < 0.9 < verdict["high"] < 1 and verdict["p"] < 0.05
    assert result["samples"]["a"]["runs"] == fake_record(1, speed=40.0)["runs"]


def test_the_figure_is_chosen(tmp_path, lab):
    a, b = stored(tmp_path, fake_record(1), fake_record(2, speed=44.0))
    assert "no different from" in lab("compare", a, b, "--figure", "ttft_ms")[1]
    one = stored(tmp_path, *(fake_record(number, new_tokens=1) for number in (3, 4)))
    assert "speed of the whole call" in lab("compare", *one)[1]
    code, _, error = lab("compare", *one, "--figure", "decode_tok_per_s")
    assert code == 2 and "nothing is decoded" in error


MACHINE = fake_records.ENVIRONMENT


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "other"}, "different workloads: model"),
        ({"dtype": "bf16"}, "different workloads: dtype"),
        ({"batch_size": 2}, "different workloads: batch_size"),
        ({"prompt_length": 10}, "different workloads: prompt_length"),
        ({"new_tokens": 100}, "different workloads: new_tokens"),
        ({"seed": 1}, "different workloads: seed"),
        ({"prompt_hash": "22222222"}, "different workloads: prompt_hash"),
        ({"environment": {**MACHINE, "cpu": "Another"}}, "different machines: cpu"),
        ({"environment": {**MACHINE, "threads": 4}}, "different machines: threads"),
        ({"environment": {**MACHINE, "torch": "2.15.0"}}, "different machines: torch"),
        ({"device": "cuda", "environment": {**MACHINE, "gpu": "One"}}, "different machines: device"),
        ({"parity": "differs", "hash": "11111111"}, "failed parity"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, lab, fields, said):
    names = stored(
        tmp_path, fake_record(1, prompt_hash="33333333"), fake_record(2, **{"prompt_hash": "33333333"} | fields)
    )
    for pair in (names, names[::-1]):
        code, out, error = lab("compare", *pair)
        assert code == 2 and out == "" and said in error and error.count("\n") == 1


def test_two_accelerators_are_two_machines(tmp_path, lab):
    made = [fake_record(n, device="cuda", environment={**MACHINE, "gpu": gpu}) for n, gpu in ((1, "One"), (2, "Two"))]
    assert "different machines: gpu" in lab("compare", *stored(tmp_path, *made))[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing", "main"],
        [f"001-{COMMIT[:7]}", "main"],
        [f"001-{COMMIT[:7]}", f"001-{COMMIT[:7]}", "--runs", "3"],
        [f"001-{COMMIT[:7]}", f"001-{COMMIT[:7]}", "--", "--dtype", "bf16"],
        ["main", "--output=x"],
        ["main", "main", "--", "--json", "x"],
        ["main", "main", "--", "--sweep=batch"],
    ],
)
def test_bad_names_and_switches_are_one_sentence(tmp_path, lab, side, arguments):
    side("a")
    stored(tmp_path, fake_record(1))
    try:
        code, out, error = lab("compare", *arguments)
    except SystemExit as exit_:  # argparse's own
        code, out, error = exit_.code, "", "error: usage\n"
    assert code == 2 and out == "" and error.startswith("error: ") and error.count("\n") == 1
    assert logged(tmp_path) == []


@pytest.mark.parametrize("arguments", [["--fail-if-slower", "x"], ["--fail-if-slower", "-1%"], ["--runs", "1"]])
def test_bad_numbers_are_refused(lab, arguments):
    with pytest.raises(SystemExit) as exit_:
        lab("compare", "a", "b", *arguments)
    assert exit_.value.code == 2


def test_a_corrupt_record_is_refused_by_name(tmp_path, lab):
    names = stored(tmp_path, fake_record(1), fake_record(2))
    (tmp_path / "repository" / "tb_logs" / names[1] / "record.json").write_text("{")
    code, _, error = lab("compare", *names)
    assert code == 2 and names[1] in error


# --- commits


def test_two_branches_take_turns_in_trees_of_their_own(tmp_path, lab, side):
    a, b = side("a", 40.0), side("b", 36.0)
    code, out, error = lab("compare", a, b, "--runs", "7", "--fail-if-slower", "3%", "--", "--new-tokens", "200")
    assert code == 1, error
    ran = logged(tmp_path)
    assert [run["name"] for run in ran] == ["a", "b"] * 7
    assert len({run["tree"] for run in ran}) == 2
    assert f"b ({git.commit_of(tmp_path / 'repository', 'b')[:7]}) is slower than a (" in out
    assert "7 pairs of processes in turns" in out and "demo fp32, batch 1" in out and "Example CPU" in out
    start = len(processes.WORKLOAD)
    assert ran[0]["arguments"][:start] == processes.WORKLOAD
    assert ran[0]["arguments"][start : start + 2] == ["--new-tokens", "200"]  # behind the defaults, so that it counts
    assert_no_tree_is_left(tmp_path)


def test_equal_commits_do_not_differ_and_samples_are_kept(tmp_path, lab, side):
    side("a")
    file = tmp_path / "result.json"
    code, out, _ = lab("compare", "a", "a~0", "--runs", "4", "--json", file, "--fail-if-slower", "0%")
    result = json.loads(file.read_text())
    assert code == 0 and "no different from" in out and result["verdict"] == statistics.NO_DIFFERENCE
    assert [len(result["samples"][one]) for one in "ab"] == [4, 4] and len(result["samples"]["a"][0]["runs"]) == 3


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"fault": "error: no such switch"}, "could not be measured: no such switch"),
        ({"points": 2}, "measured 2 points"),
        ({"points": 0}, "measured 0 points"),
        ({"model": "other"}, "different workloads: model"),
        ({"environment": {**MACHINE, "threads": 4}}, "different machines: threads"),
        ({"parity": "differs", "hash": "11111111"}, "failed parity"),
        ({"source_sha256": "ab" * 32}, "measured other sources"),
    ],
)
def test_a_commit_that_cannot_be_compared_leaves_no_tree(tmp_path, lab, side, made, said):
    code, out, error = lab("compare", side("a"), side("b", **made), "--runs", "2")
    assert code == 2 and out == "" and said in error and error.startswith("error: ") and error.count("\n") == 1
    assert [run["name"] for run in logged(tmp_path)] == ["a", "b"]  # and the second pair never began
    assert_no_tree_is_left(tmp_path)


def test_a_commit_without_run_llama_is_refused(tmp_path, lab, side):
    root = tmp_path / "repository"
    side("a")
    fake_records.git(root, "rm", "-q", "run_llama.py")
    fake_records.commit(root)
    code, _, error = lab("compare", "a", "main", "--runs", "2")
    assert code == 2 and "has no run_llama.py" in error
    assert_no_tree_is_left(tmp_path)


def test_what_is_not_committed_is_said_to_be_left_out(tmp_path, lab, side):
    side("a")
    (tmp_path / "repository" / "run_llama.py").write_text(SCRIPT + "# not committed\n")
    code, _, error = lab("compare", "a", "HEAD", "--runs", "2")
    assert code == 0 and "not committed" in error


def test_without_scipy_nothing_is_measured(tmp_path, lab, side, monkeypatch):
    side("a")
    monkeypatch.setitem(sys.modules, "scipy", None)
    code, _, error = lab("compare", "a", "a")
    assert code == 2 and "pip install" in error and logged(tmp_path) == []


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_neither_tree_nor_process(tmp_path, side, how):
    side("a", sleeps=True)
    environment = {**os.environ, "PYTHONPATH": str(sources.ROOT), "COMPARE_LOG": str(tmp_path / "log.jsonl")}
    command = [sys.executable, "-m", "fastllama.lab", "--root", str(tmp_path / "repository"), "compare", "a", "a"]
    running = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed
    )
    noted = tmp_path / "log.pid"
    try:
        while running.poll() is None and not (noted.exists() and noted.read_text()):
            time.sleep(0.05)
        running.send_signal(how)
        error = running.communicate()[1]
    finally:
        running.kill()
    assert running.returncode == 130 and "interrupted" in error and "Traceback" not in error
    assert_no_tree_is_left(tmp_path)
    pid = int(noted.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.full
def test_the_repositorys_own_run_llama_is_measured_from_a_commit(tmp_path):
    root = tmp_path / "repository"
    shutil.copytree(sources.ROOT / "fastllama", root / "fastllama", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_llama.py", "setup.py"):
        shutil.copy(sources.ROOT / name, root)
    fake_records.git(tmp_path, "init", "-q", "-b", "main", str(root))
    commit = fake_records.commit(root)
    switches = ["--runs", "1", "--warmup", "0", "--prompt-length", "16", "--new-tokens", "4"]
    with git.worktrees(root, [commit]) as (tree,):  # one of a pair: the other would be the same again
        a = processes._point(tree, commit, switches)
    assert a["source_sha256"] == git.source_sha256_of_commit(commit, root)
    assert a["parity"] == "exact" and a["new_tokens"] == 4 and len(a["runs"]) == 1
    assert git.commit_of(root, "main") == commit and git.commit_of(root, "nothing") is None
