"""The command line, run in this process on a tiny checkpoint."""

import io
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))

import run_llama
from fastllama.lab.measuring import measure
from fastllama.lab.pages import table
from fastllama.lab.points import points_file
from fastllama.lab.points.point import Point
from fastllama.lab.points.workload import Workload
from fastllama.lab.records import export, formats, record, schema
from fastllama.lab.sweeping import sweep, sweep_table
from fastllama.lab.sweeping.plan import Plan, Planned
from tests.command import read, run

SMALL = ["--dtype", "fp32", "--device", "cpu", "--prompt-length", "12", "--new-tokens", "4", "--runs", "1"]


pytestmark = pytest.mark.usefixtures("light", "logs")


# what is measured


def test_ours_beside_vanilla(tiny, tmp_path, capsys):
    file = tmp_path / "points.jsonl"
    assert run("--model", tiny, *SMALL, "--preallocate", "--json", file) == 0
    (point,) = read(file)
    schema.check_point(point, "the point")
    assert point["parity"] == "exact" and point["switches"]["preallocate"] is True
    out, err = capsys.readouterr()
    for words in ("vanilla", "ours", "exact", point["hash"], "recompiles after warm-up: 0"):
        assert words in out
    # Three steps of a tiny model may take no longer than what passes between two calls: then there is no speed.
    assert ("of the ceiling" in out) == (point["ceiling_fraction"] is not None)
    assert "Traceback" not in err


def test_without_preallocate_vanilla_is_the_baseline(tiny, tmp_path, capsys):
    file = tmp_path / "points.jsonl"
    assert run("--model", tiny, *SMALL, "--json", file) == 0
    (point,) = read(file)
    assert point["parity"] == "reference" and point["baseline"] is None
    assert "ours" not in capsys.readouterr().out


def test_compile_without_preallocate_compiles_vanilla(tiny, tmp_path, monkeypatch):
    asked = []

    def compiled(function, **how):
        asked.append(how)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    file = tmp_path / "points.jsonl"
    for mode in ("fullgraph", "dynamic"):
        assert run("--model", tiny, *SMALL, "--compile", mode, "--json", file) == 0
    assert [(how["dynamic"], how["fullgraph"]) for how in asked] == [(False, True), (True, True)]
    static, dynamic = read(file)
    assert static["switches"] == {"preallocate": False, "compile": "static"}
    assert static["path"] == "transformers, static cache, compiled static"
    assert dynamic["baseline"]["path"] == "transformers, eager" and dynamic["parity"] == "exact"


def test_comma_lists_make_a_product(tiny, tmp_path, capsys):
    file = tmp_path / "points.jsonl"
    sizes = ["--batch-size", "1,2", "--prompt-length", "8,12", "--new-tokens", "2,3"]
    assert run("--model", tiny, *SMALL, *sizes, "--warmup", "0", "--json", file) == 0
    found = [(point["batch_size"], point["prompt_length"], point["new_tokens"]) for point in read(file)]
    assert found == [(b, p, n) for b in (1, 2) for p in (8, 12) for n in (2, 3)]
    assert "all points" in capsys.readouterr().out


def test_defaults_are_the_constants(monkeypatch):
    seen = []
    monkeypatch.setattr(run_llama, "_run", lambda options: seen.extend(run_llama._plan(options).points) or 0)
    monkeypatch.setattr(run_llama, "BATCH_SIZES", [3])
    assert run("--dtype", "fp32", "--device", "cpu") == 0
    assert [(point.workload, point.runs, point.warmup) for point in seen] == [(Workload(3, 1000, 200), 5, 2)]
    seen.clear()
    assert run("--dtype", "fp32", "--sweep", "batch") == 0
    assert [point.workload.batch_size for point in seen] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert {point.runs for point in seen} == {10}
    seen.clear()
    assert run("--dtype", "fp32", "--sweep", "length", "--batch-size", "1") == 0
    assert [point.workload.prompt_length for point in seen] == [100, 200, 400, 800, 1600]
    seen.clear()
    assert run("--dtype", "fp32", "--profile") == 0
    assert [(point.workload.new_tokens, point.runs) for point in seen] == [
        (10, 1),
    ]


def test_auto_dtype_asks_the_processor_and_the_size(monkeypatch, tiny):
    from fastllama.lab.measuring import checkpoint

    for has, name, dtype in (
        (True, tiny, "fp32"),
        (True, "random:llama-160m", "fp32"),
        (True, "inflated:tinyllama-1.1b", "bf16"),
        (False, "inflated:tinyllama-1.1b", "fp32"),
    ):
        monkeypatch.setattr(checkpoint, "has_bf16_products", lambda has=has: has)
        assert checkpoint.auto_dtype(name, "cpu") == dtype


def test_profile_leaves_a_trace(tiny, capsys):
    assert run("--model", tiny, "--device", "cpu", "--prompt-length", "12", "--preallocate", "--profile") == 0
    (path,) = run_llama.LOGS.glob(
        "traces/tiny-ours-no/tiny-ours-no-batch_size1-prompt_length12-new_tokens10.*.pt.trace.json"
    )
    trace = json.loads(path.read_text())
    assert any(event.get("name") == "aten::scaled_dot_product_attention" for event in trace["traceEvents"])
    assert "host_name" not in trace and trace["traceName"] == path.name
    out = capsys.readouterr().out
    assert "aten::" in out and "share" in out
    (kept,) = path.parent.glob("*.breakdown.json")
    broken_down = json.loads(kept.read_text())
    assert broken_down["decode"]["steps"] == 9 and broken_down["prompt_length"] == 12
    assert tiny not in kept.read_text()
    flat = " ".join(out.split())
    assert all(sentence in flat for sentence in broken_down["words"])
    by_part = {row["part"]: row for row in broken_down["decode"]["parts"]}
    # 2 layers of (4 + 2 + 2) heads of 8 by 32, in fp32
    assert by_part["qkv"]["calls"] == 2 and by_part["qkv"]["bytes"] == 2 * 64 * 32 * 4


SIZES = ["--batch-size", "1,2", "--prompt-length", "8,12", "--new-tokens", "3", "--warmup", "0"]


def test_one_point_of_several_is_profiled_by_name(tiny, capsys):
    argv = ["--model", tiny, "--dtype", "fp32", "--device", "cpu", *SIZES, "--profile"]
    assert run(*argv, "--profile-point", "prompt_length=8, batch_size=2") == 0
    (path,) = run_llama.LOGS.glob("traces/*/*.pt.trace.json")
    assert "-batch_size2-prompt_length8-new_tokens3." in path.name
    capsys.readouterr()
    for name in ("batch_size=2", "batch_size=3,prompt_length=8", "prompt_length=1"):
        assert run(*argv, "--profile-point", name) == 2
        assert f"there is no point '{name}'" in (said := one_sentence(capsys))
        assert "batch_size=1,prompt_length=8; " in said


def test_a_point_of_a_sweep_is_profiled_by_name(monkeypatch, tiny):
    from fastllama.lab.tracing import timeline, trace

    for flag, module in (("--profile", trace), ("--memory-profile", timeline)):
        seen = []
        monkeypatch.setattr(module, "run", lambda points, logs, console, seen=seen: seen.extend(points) or 0)
        argv = [
            "--model",
            tiny,
            "--dtype",
            "fp32",
            "--device",
            "cpu",
            "--prompt-length",
            "12",
            "--sweep",
            "batch",
            flag,
        ]
        assert run(*argv, "--profile-point", "batch_size=16") == 0
        assert [point.workload.batch_size for point in seen] == [16]


# sweeps


def test_an_interrupted_sweep_resumes(tiny, tmp_path, monkeypatch, capsys):
    argv = ["--model", tiny, *SMALL, "--sweep", "batch", "--batch-size", "1,2,3", "--warmup", "0"]
    real, measured = measure.measure, []

    def interrupted(point, progress):
        if point.workload.batch_size == 3 and not measured[2:]:
            measured.append("interrupted")
            raise KeyboardInterrupt
        measured.append(point.workload.batch_size)
        return real(point, progress)

    monkeypatch.setattr(measure, "measure", interrupted)
    assert run(*argv) == 130
    (file,) = run_llama.LOGS.glob("sweeps/*.jsonl")
    assert file.name == "batch-tiny-fp32-cpu-vanilla-no.jsonl"
    assert [point["batch_size"] for point in read(file)] == [1, 2]
    capsys.readouterr()
    assert run(*argv) == 0
    assert measured == [1, 2, "interrupted", 3]
    assert [point["batch_size"] for point in read(file)] == [1, 2, 3]
    err = capsys.readouterr().err
    assert err.count("already in") == 2 and f"already in {file}: batch_size=1\n" in err
    # Other switches, another seed or other sources are other points.
    assert run(*argv, "--seed", "1") == 0
    monkeypatch.setattr(record, "source_sha256", lambda: "0" * 64)
    assert run(*argv) == 0
    assert measured[4:] == [1, 2, 3, 1, 2, 3]


def test_a_point_that_fails_does_not_end_a_sweep(tiny, tmp_path, monkeypatch, capsys):
    real = measure.measure

    def measured(point, progress):
        if point.workload.batch_size == 2:
            raise MemoryError("batch 2 does not fit")
        return real(point, progress)

    monkeypatch.setattr(measure, "measure", measured)
    file = tmp_path / "points.jsonl"
    assert run("--model", tiny, *SMALL, "--batch-size", "1,2,3", "--warmup", "0", "--json", file) == 2
    assert [(point["batch_size"], point.get("status")) for point in read(file)] == [(1, None), (2, "failed"), (3, None)]
    assert "error: batch_size=2: batch 2 does not fit\n" in capsys.readouterr().err


def test_a_point_is_on_disk_before_the_next_begins(tiny, tmp_path, monkeypatch):
    real, file, lines = measure.measure, tmp_path / "points.jsonl", []

    def measured(point, progress):
        lines.append(len(read(file)) if file.exists() else 0)
        return real(point, progress)

    monkeypatch.setattr(measure, "measure", measured)
    assert run("--model", tiny, *SMALL, "--batch-size", "1,2,3", "--warmup", "0", "--json", file) == 0
    assert lines == [0, 1, 2]


# errors: one sentence, exit code 2


def one_sentence(capsys) -> str:
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert "Traceback" not in err and not out.strip()
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--compile", "maybe"], "invalid choice: 'maybe'"),
        (["--batch-size", "0"], "argument --batch-size: 0 is below 1"),
        (["--batch-size", "1,-4"], "-4 is below 1"),
        (["--prompt-length", "-1"], "argument --prompt-length"),
        (["--new-tokens", "many"], "'many' is not a whole number"),
        (["--cache-length", "0"], "argument --cache-length: 0 is below 1"),
        (["--runs", "0"], "argument --runs: 0 is below 1"),
        (["--nonsense"], "--nonsense"),
        (["--predict", "faster"], "--predict and --commit belong to --record"),
        (["--record", " "], "it is empty"),
        (["--profile", "--json", "x"], "--profile leaves a trace and no record"),
        (["--memory-profile", "--json", "x"], "--memory-profile leaves a timeline and no record"),
        (["--profile", "--memory-profile"], "run one after the other"),
        (["--profile-point", "batch_size=1"], "--profile-point belongs to --profile and --memory-profile"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--device", "meta"], "holds no numbers"),
        (["--bucket", "64"], "--bucket needs --preallocate"),
        (["--cache-length", "4000"], "--cache-length needs --preallocate"),
        (["--preallocate", "--bucket", "3"], "bucket=3 is not allowed"),
        (["--preallocate", "--cache-length", "10"], "a cache of 10 positions is too short for a prompt of 12"),
        (["--preallocate", "--batch-size", "1000000000"], "GB are free on cpu"),
        (["--prompt-file", "/nowhere/text"], "there is no prompt file /nowhere/text"),
    ],
)
def test_bad_options(tiny, argv, words, capsys, tmp_path):
    assert run("--model", tiny, *SMALL, *argv) == 2
    assert words in one_sentence(capsys)
    assert not run_llama.LOGS.exists()


def broken(tmp_path, tiny, what) -> str:
    folder = tmp_path / "broken"
    if what == "missing":
        return str(folder)
    folder.mkdir()
    for file in Path(tiny).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    if what == "corrupt":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
    elif what == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif what == "no config":
        (folder / "config.json").unlink()
    elif what == "no weights":
        (folder / "model.safetensors").unlink()
    elif what == "not json":
        (folder / "config.json").write_text("{")
    else:
        (folder / "config.json").write_text(json.dumps({**config, "model_type": what}))
    return str(folder)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", "there is no model folder"),
        ("corrupt", "are corrupt"),
        ("gpt2", "is a gpt2 checkpoint, and only Llama runs here"),
        ("nosuchtype", "is not a Llama checkpoint"),
        ("no tokenizer", "has no tokenizer"),
        ("no config", "error"),
        ("no weights", "cannot load"),
        ("not json", "error"),
    ],
)
@pytest.mark.parametrize("preallocate", [False, True])
def test_bad_checkpoints(tiny, tmp_path, what, words, preallocate, capsys):
    argv = ["--preallocate"] if preallocate else []
    file = tmp_path / "points.jsonl"
    assert run("--model", broken(tmp_path, tiny, what), *SMALL, *argv, "--json", file) == 2
    assert words in one_sentence(capsys)
    assert not file.exists()


def test_a_hub_out_of_reach(capsys, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://hub' to load the files.\nCheck your internet connection")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    assert run("--model", "somebody/some-llama", *SMALL) == 2
    assert one_sentence(capsys) == (
        "error: cannot load somebody/some-llama: We couldn't connect to 'https://hub' to load the files"
    )


def test_unknown_random_model(capsys):
    assert run("--model", "random:llama-9t", *SMALL) == 2
    assert "unknown model random:llama-9t" in one_sentence(capsys)


def test_a_short_prompt_file(tiny, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("hello")
    assert run("--model", tiny, *SMALL, "--prompt-file", tmp_path / "short.txt") == 2
    assert "and the prompt needs 12" in one_sentence(capsys)


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert run("--model", tmp_path / "nothing", *SMALL, "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_dirty_tree_is_refused_before_measuring(tiny, monkeypatch, capsys):
    def dirty(commit=None):
        raise ValueError(f"the working tree is dirty (commit {commit})")

    def never(*args):
        raise AssertionError("measured")

    monkeypatch.setattr(record, "check_recordable", dirty)
    monkeypatch.setattr(measure, "measure", never)
    assert run("--model", tiny, *SMALL, "--record", "a change", "--commit", "abc") == 2
    assert one_sentence(capsys) == "error: the working tree is dirty (commit abc)"


def test_record_is_given_the_point_and_the_words(tiny, monkeypatch, capsys):
    saved = []
    monkeypatch.setattr(record, "check_recordable", lambda commit=None: "f" * 40)
    monkeypatch.setattr(record, "save", lambda *given: saved.append(given) or Path("tb_logs/001/record.json"))
    assert run("--model", tiny, *SMALL, "--record", "a change", "--predict", "faster", "--preallocate") == 0
    ((point, *words),) = saved
    schema.check_point(point, "the point")
    assert words == ["a change", "faster", None]
    assert "recorded: tb_logs/001/record.json" in capsys.readouterr().out


def test_warnings(tiny, capsys, monkeypatch):
    monkeypatch.setattr(measure, "measure", lambda point, progress: pytest.fail("measured"))
    monkeypatch.setattr(sweep, "run", lambda *args, **kwargs: [])
    argv = ["--model", tiny, "--device", "cpu", "--new-tokens", "4"]
    assert run(*argv, "--dtype", "fp16", "--prompt-length", "12") == 0
    assert capsys.readouterr().err.startswith("warning: fp16 is slow on a CPU")
    assert run(*argv, "--dtype", "fp32", "--prompt-length", "600") == 0
    assert "604 positions are more than the 512" in capsys.readouterr().err
    assert run(*argv, "--dtype", "fp32", "--prompt-length", "12") == 0
    assert capsys.readouterr().err == ""


def test_help_needs_no_torch():
    code = (
        "import sys, run_llama\n"
        "try: run_llama.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(run_llama.__file__).parent, capture_output=True)
    assert done.returncode == 0, done.stderr


# the table


def a_record(tiny):
    return measure.measure(Point(tiny, "fp32", "cpu", Workload(2, 12, 4), preallocate=True, runs=2, warmup=0))


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits(tiny, width):
    from rich.console import Console

    point = a_record(tiny)
    for key in ("tok_per_s", "decode_tok_per_s"):
        point[key] = point["baseline"][key] = 12_345.0
    point["max_mem_mb"] = 101_325.0
    point.update(parity="differs", hash="0badc0de", first_divergence={"row": 1, "position": 2, "margin": 0.25})
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table.point_table(point, is_random=True))
    plan = Plan("", (), [Planned("batch_size=1024,prompt_length=100000", None)] * 2, [])
    console.print(sweep_table.summary(plan, [point, point]))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for words in ("0badc0de", "differs", "row 1, new token 2", "0.25", "random weights", "101,325", "12,345"):
        assert words in text


# other formats


@pytest.mark.parametrize("name", ["csv", "json", "jsonl", "md"])
def test_points_are_printed_in_a_format_and_nothing_else(tiny, tmp_path, capsys, name):
    file = tmp_path / "points.jsonl"
    assert run("--model", tiny, *SMALL, "--batch-size", "1,2", "--json", file, "--format", name) == 0
    out, err = capsys.readouterr()
    assert "all points" in err
    export.write(points_file.read(file), name)
    assert out == capsys.readouterr().out


def test_a_sweep_is_written_to_a_database(tiny, tmp_path, capsys):
    file, path = tmp_path / "points.jsonl", tmp_path / "points.sqlite"
    argv = ["--model", tiny, *SMALL, "--batch-size", "1,2", "--json", file, "--format", "sqlite", "--output", path]
    assert run(*argv) == 0
    assert "all points" in capsys.readouterr().out
    database = sqlite3.connect(path)
    rows = database.execute("SELECT batch_size, tok_per_s, hash FROM points").fetchall()
    assert rows == [(point["batch_size"], point["tok_per_s"], point["hash"]) for point in read(file)]
    assert database.execute("SELECT count(*) FROM runs").fetchone() == (2,)
    assert database.execute("SELECT option, value FROM options").fetchall() == [("batch_size", 1), ("batch_size", 2)]
    database.close()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--format", "xml"], "invalid choice: 'xml'"),
        (["--output", "a.csv"], "--output belongs to --format"),
        (["--format", "sqlite"], "--output FILE"),
        (["--format", "csv", "--output", "none/a.csv"], "there is no folder none"),
        (["--format", "csv", "--output", "a.jsonl", "--json", "a.jsonl"], "is what is read"),
        (["--format", "csv", "--profile"], "leave out"),
    ],
)
def test_a_format_that_cannot_be_written_is_refused_before_measuring(tiny, monkeypatch, capsys, argv, says):
    monkeypatch.setattr(measure, "measure", lambda *given: pytest.fail("measured"))
    assert run("--model", tiny, *SMALL, *argv) == 2
    assert says in one_sentence(capsys)


def test_the_command_line_knows_every_format():
    for name in formats.NAMES:
        assert run_llama._parse(["--format", name]).format == name
