"""A disk that is full while something is written loses nothing that was on it, and says so in one sentence."""

import errno
import json
import os
import resource
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import fastllama
from fastllama.kernels import tune, whole_file
from fastllama.lab import lines
from fastllama.lab.pages import events
from fastllama.lab.pictures import canvas
from fastllama.lab.points import points_file
from fastllama.lab.prompts import results_file
from fastllama.lab.quality import score_file
from fastllama.lab.records import formats, words
from fastllama.lab.suite import suite_file
from fastllama.lab.tasks import file as task_file
from tests.command import run

HOW = ("--dtype", "fp32", "--device", "cpu")


@contextmanager
def room_for(nbytes: int):
    """No file grows beyond so many bytes: the system itself stops a write in the middle, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full(*given, **named):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# files that are whole or not there


def _picture(path: Path, version: int) -> None:
    pytest.importorskip("matplotlib")
    plt = canvas.pyplot()
    figure = plt.figure()
    figure.text(0.5, 0.5, f"version {version}")
    canvas.save(plt, figure, path)


def _database(path: Path, version: int) -> None:
    column = formats.Column("n", str, "all", str)
    formats.write_sqlite({"t": SimpleNamespace(columns=(column,), rows=[(f"{version} {'x' * 2000}",)])}, path)


def _events(path: Path, version: int) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.compat.proto.summary_pb2 import Summary

    value = Summary.Value(tag="x" * 3000, simple_value=version)
    events.write(path.parent, [Summary(value=[value])], 1, 5.0)


WRITERS = {
    "text.txt": lambda path, version: words.write_atomically(path, f"{version} {'x' * 3000}"),
    "record.json": lambda path, version: words.dump_json(path, {"version": version, "text": ["x" * 3000]}),
    "picture.png": _picture,
    "table.sqlite": _database,
    events.NAME: _events,
}
STOPS = {
    "in the middle": lambda patch: room_for(1000),
    "at the end": lambda patch: patch.setattr(whole_file.os, "fsync", full),
    "at the name": lambda patch: patch.setattr(whole_file.os, "replace", full),
}


def test_a_failure_names_the_file_once_and_is_not_its_own_cause(tmp_path):
    """What walks through causes would never end."""
    path, other = tmp_path / "a", tmp_path / "b"
    unnamed, elsewhere = OSError(errno.ENOSPC, "full"), OSError(errno.ENOSPC, "full", str(other))
    for fault, named in ((unnamed, path), (elsewhere, other)):
        with pytest.raises(OSError, match="full") as found:
            whole_file.raise_named(fault, path)
        assert found.value.filename == str(named) and found.value.__cause__ is not found.value
        assert (found.value is fault) == (fault is elsewhere)


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("name", WRITERS)
def test_the_old_file_stays(name, stop, tmp_path, monkeypatch):
    path, write = tmp_path / name, WRITERS[name]
    write(path, 1)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        limit = STOPS[stop](patch)
        with limit if limit is not None else monkeypatch.context(), pytest.raises(OSError) as fault:
            write(path, 2)
    assert str(path) in str(fault.value) and "unfinished" not in str(fault.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [name]
    write(path, 2)
    assert path.read_bytes() != before and os.listdir(tmp_path) == [name]


def test_measured_products_stay_known(tmp_path, monkeypatch):
    """What cannot be remembered is measured again; what is remembered stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tune._write({"a": {"stock": 1.0}})
    for stop in STOPS.values():
        with monkeypatch.context() as patch, stop(patch) or monkeypatch.context():
            tune._write({"b": {"stock": float("1" * 400)}, "c" * 3000: {}})
        assert tune._read() == {"a": {"stock": 1.0}}
    assert len(os.listdir(tune._path().parent)) == 1


def test_training_goes_on_from_its_last_state(tmp_path):
    torch = pytest.importorskip("torch")
    from fastllama.demo import steps

    steps.save(tmp_path / "target.pt", {"step": 1})
    with room_for(1000), pytest.raises((OSError, RuntimeError)):
        steps.save(tmp_path / "target.pt", {"step": 2, "model": torch.zeros(5000)})
    assert torch.load(tmp_path / "target.pt", weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path) == ["target.pt"]


# files of lines


def test_a_line_is_added_whole_or_not_at_all(tmp_path):
    path = tmp_path / "lines.jsonl"
    first, second = json.dumps({"a": "first"}), json.dumps({"b": "second é"})
    lines.append(path, first)
    held = path.read_bytes()
    for room in range(len(held), len(held) + len(second.encode()) + 1):
        with room_for(room), pytest.raises(OSError, match=str(path)):
            lines.append(path, second)
        assert path.read_bytes() == held
    lines.append(path, second)
    assert lines.read(path) == [first.encode(), second.encode()]


def test_a_line_that_is_not_on_disk_is_not_there(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    lines.append(path, '{"a": 1}')
    with monkeypatch.context() as patch, pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        patch.setattr(lines.os, "fsync", full)
        lines.append(path, '{"b": 2}')
    assert path.read_bytes() == b'{"a": 1}\n'


@pytest.mark.parametrize("module", [points_file, score_file, suite_file, task_file], ids=lambda each: each.__name__)
def test_a_line_that_was_cut_short_is_left_out_and_repaired(module, tmp_path, monkeypatch, caplog):
    """Every file of lines, wherever a kill or a power cut ended its last line."""
    check = "check" if hasattr(module, "check") and module in (points_file, suite_file) else "check_line"
    monkeypatch.setattr(module, check, lambda line, where: line)
    whole = [{"n": 1, "t": "x"}, {"n": 2, "t": "y"}]
    path = tmp_path / "file.jsonl"
    for line in whole:
        module.append(path, line)
    content = path.read_bytes()
    start = content.index(b"\n") + 1
    for end in range(start + 1, len(content)):
        path.write_bytes(content[:end])
        left = whole if end == len(content) - 1 else whole[:1]
        assert module.read(path) == left
        module.append(path, {"n": 3})
        assert module.read(path) == [*left, {"n": 3}]
    assert "cut short" in caplog.text


# commands


def stopped_at(monkeypatch, module, name: str, number: int) -> None:
    """The `number`-th writing of a module meets a full disk in the middle of its content."""
    real, calls = getattr(module, name), []

    def write(handle, content):
        calls.append(content)
        if len(calls) == number:
            os.write(handle, content[: len(content) // 2])
            full()
        real(handle, content)

    monkeypatch.setattr(module, name, write)


def test_a_file_of_results_goes_on(tmp_path, monkeypatch, capsys, tiny):
    prompts, out, right = (tmp_path / name for name in ("prompts.jsonl", "out.jsonl", "right.jsonl"))
    prompts.write_text("".join(json.dumps({"prompt": f"def f{n}():"}) + "\n" for n in range(5)))
    asked = ("--model", tiny, *HOW, "--new-tokens", 4, "--slots", 1, "--prompts", prompts)
    assert run(*asked, "--out", right) == 0
    partial = tmp_path / "out.jsonl.partial"
    with monkeypatch.context() as patch:
        stopped_at(patch, results_file, "write_all", 4)
        capsys.readouterr()
        assert run(*asked, "--out", out) == 2
    assert capsys.readouterr().err == f"error: [Errno 28] No space left on device: '{partial}'\n"
    whole = partial.read_bytes().split(b"\n")
    assert len(whole) == 5 and [json.loads(line)["index"] for line in whole[1:-1]] == [0, 1, 2]
    with monkeypatch.context() as patch:  # and full again while they are put in order
        patch.setattr(whole_file.os, "fsync", full)
        assert run(*asked, "--out", out) == 2
    assert not out.exists() and len(partial.read_bytes().split(b"\n")) == 7
    monkeypatch.setattr(fastllama.LlamaForCausalLM, "generate_many", lambda *how, **more: pytest.fail("done before"))
    assert run(*asked, "--out", out) == 0
    assert out.read_text() == right.read_text()
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "prompts.jsonl", "right.jsonl"]


@pytest.mark.usefixtures("light", "logs")
def test_a_sweep_goes_on(tmp_path, monkeypatch, capsys, tiny):
    file = tmp_path / "points.jsonl"
    asked = ("--model", tiny, *HOW, "--prompt-length", "12", "--new-tokens", "4", "--runs", "1", "--warmup", "0")
    asked += ("--sweep", "batch_size=1,2", "--json", file)
    with monkeypatch.context() as patch:
        stopped_at(patch, lines, "write_all", 2)
        assert run(*asked) == 2
    assert capsys.readouterr().err.endswith(f"error: [Errno 28] No space left on device: '{file}'\n")
    (kept,) = points_file.read_measured(file)
    assert file.read_bytes().endswith(b"\n") and kept["batch_size"] == 1
    assert run(*asked) == 0
    assert "already in" in capsys.readouterr().err
    assert points_file.read_measured(file)[0] == kept and len(points_file.read_measured(file)) == 2
