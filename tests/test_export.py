"""Output formats: what each holds equals the points, with the same columns; a file is whole or what it was."""

import csv
import io
import json
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fastllama import FastConfig
from fastllama.lab import __main__ as command_line
from fastllama.lab.points import figures, points_file
from fastllama.lab.records import columns, export, formats, record, tables, words
from tests.fake_records import current, fake_record, point

SWEEP = [
    point(speed=40.0 * size / 3, batch_size=size, switches={"compile": mode}, seed=0)
    for size in (1, 2, 8)
    for mode in ("no", "static")
]
POINTS = [*map(current, SWEEP), point(vanilla=None), current(point(new_tokens=1, distinct_tokens=1))]


def plain(value, kind):
    """A csv cell as its column's kind; an empty one is null."""
    if value == "":
        return None
    if kind is bool:
        return {"true": True, "false": False}[value]
    return value if kind in (str, object) else kind(value)


def held(name: str, points: list[dict], folder: Path, table: str = "points") -> list[dict]:
    """The rows of a table, read back from a file of that format."""
    path = folder / f"out.{name}"
    export.write(points, name, path, table)
    made = tables.of(points)[table]
    if name == "json":
        return json.loads(path.read_text())[table]
    if name == "jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if name == "csv":
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        assert header == made.header
        kinds = [column.kind for column in made.columns]
        return [dict(zip(header, map(plain, row, kinds), strict=True)) for row in rows]
    database = sqlite3.connect(path)
    database.row_factory = sqlite3.Row
    rows = [dict(row) for row in database.execute(f"SELECT * FROM {table}")]
    database.close()
    flags = {column.name for column in made.columns if column.kind is bool}
    return [
        {key: bool(value) if key in flags and value is not None else value for key, value in row.items()}
        for row in rows
    ]


# --- round trips


@pytest.mark.parametrize("name", ["csv", "json", "jsonl", "sqlite"])
def test_what_a_format_holds_is_what_the_points_are(tmp_path, name):
    rows = held(name, POINTS, tmp_path)
    assert len(rows) == len(POINTS)
    for row, made in zip(rows, POINTS, strict=True):
        for field in ("model", "dtype", "batch_size", "prompt_length", "tok_per_s", "decode_tok_per_s", "ttft_ms"):
            assert row[field] == made[field] and type(row[field]) is type(made[field])
        for field in ("max_mem_mb", "hash", "parity", "speedup", "text_sample", "command", "compile_s"):
            assert row[field] == made[field]
        assert row["compile"] == made["switches"]["compile"] and row["preallocate"] is made["switches"]["preallocate"]
        assert row["cpu"] == made["environment"]["cpu"] and row["runs"] == len(made["runs"])
        assert row["vanilla_tok_per_s"] == (made["baseline"] or {"tok_per_s": None})["tok_per_s"]
        ends = figures.spread(made) or (None, None)
        assert (row["decode_tok_per_s_min"], row["decode_tok_per_s_max"]) == ends
    assert [row["point"] for row in rows] == list(range(1, len(POINTS) + 1))


def word(value) -> str | None:
    if value is None:
        return None
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("table", tables.NAMES)
def test_every_format_holds_the_same(tmp_path, table):
    wanted = tables.of(POINTS)[table].objects
    assert wanted
    for name in ("json", "jsonl", "sqlite"):
        assert held(name, POINTS, tmp_path, table) == wanted
    # An option's value may be of any kind, and is a word in csv.
    as_words = [{key: word(value) if key == "value" else value for key, value in row.items()} for row in wanted]
    assert held("csv", POINTS, tmp_path, table) == as_words


@pytest.mark.parametrize("name", ["csv", "sqlite"])
def test_the_raw_samples_are_there(tmp_path, name):
    rows = held(name, POINTS, tmp_path, "runs")
    for number, made in enumerate(POINTS, 1):
        for contestant, part in (("ours", made), ("vanilla", made["baseline"])):
            if made["baseline"] is None:
                contestant, part = "vanilla", made
            mine = [row for row in rows if (row["point"], row["contestant"]) == (number, contestant)]
            assert [{key: row[key] for key in ("total_s", "first_s")} for row in mine] == part["runs"]
            assert median(row["tok_per_s"] for row in mine) == pytest.approx(part["tok_per_s"])


@settings(max_examples=60, deadline=None)
@given(
    sample=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=40),
    load_s=st.floats(0, 1e300),
    bucket=st.none() | st.integers(0, 2**62) | st.booleans() | st.just("auto"),
)
def test_any_text_and_number_comes_back(tmp_path_factory, sample, load_s, bucket):
    made = current(point(text_sample=sample, load_s=load_s, switches={"bucket": bucket}))
    folder = tmp_path_factory.getbasetemp()
    wanted = tables.of([made])["points"].objects
    assert wanted[0]["text_sample"] == sample and wanted[0]["load_s"] == load_s and wanted[0]["bucket"] == bucket
    for name in ("csv", "json", "jsonl", "sqlite"):
        assert held(name, [made], folder) == wanted


def test_a_record_brings_its_own_fields(tmp_path):
    made = current(fake_record(7, "a change"))
    (row,) = held("csv", [made], tmp_path)
    for name in ("id", "what", "commit", "recorded_at", "source_sha256"):
        assert row[name] == made[name]
    assert json.loads(row["flags"]) == made["environment"]["flags"]
    assert json.loads(row["variables"]) == made["environment"]["variables"]
    (old,) = held("csv", [point()], tmp_path)
    assert old["id"] is None and old["flags"] is None and old.keys() == row.keys()


# --- columns


def test_there_is_a_column_for_every_switch_and_figure():
    names = tables.of([point()])["points"].header
    assert len(set(names)) == len(names)
    assert set(FastConfig.__dataclass_fields__) | {"preallocate"} <= set(names)
    assert set(figures.DERIVED) <= set(names)
    with_more = tables.of([point(switches={"draft": "x"})])["points"].header
    assert set(with_more) - set(names) == {"draft"}
    with pytest.raises(ValueError, match="switch seed"):
        tables.of([point(switches={"seed": 1})])


def test_units_are_in_the_names():
    for column in columns.of_points([point()]):
        if column.kind is float and column.group in ("memory", "time"):
            assert column.name.endswith(("_mb", "_s"))
        if column.kind is float and column.group in ("speed", "vanilla"):
            assert "tok_per_s" in column.name or "ttft_ms" in column.name or column.name.endswith("speedup")


def test_what_a_cell_cannot_hold_is_its_json(tmp_path):
    odd = {**point(switches={"bucket": {"b": [1]}}), "prompt_hash": ["x"]}
    for name in ("csv", "sqlite"):
        (row,) = held(name, [odd], tmp_path)
        assert row["bucket"] == '{"b": [1]}' and row["prompt_hash"] == '["x"]'
    with pytest.raises(ValueError, match="63 bits"):
        export.write([point(seed=2**70)], "sqlite", tmp_path / "big.sqlite")
    assert not list(tmp_path.glob("*big*"))


def test_a_point_that_was_not_measured_has_a_row_without_figures(tmp_path):
    names = (
        "model",
        "dtype",
        "device",
        "batch_size",
        "prompt_length",
        "new_tokens",
        "cache_length",
        "seed",
        "switches",
    )
    failed = {name: SWEEP[-1][name] for name in (*names, "environment", "command")}
    failed |= {"schema": 1, "status": "failed", "reason": "no memory", "batch_size": 64}
    for name in ("csv", "sqlite", "json"):
        *_, row = held(name, [*SWEEP, failed], tmp_path)
        assert (row["status"], row["reason"], row["batch_size"]) == ("failed", "no memory", 64)
        assert row["tok_per_s"] is row["vanilla_tok_per_s_max"] is None and row["runs"] == 0
        assert {row["point"] for row in held(name, [*SWEEP, failed], tmp_path, "runs")} == set(range(1, 7))
    rows = tables.of([*SWEEP, failed])["options"].objects
    assert [(row["points"], row["tok_per_s"]) for row in rows if row["value"] == 64] == [(1, None)]
    assert "no memory" in formats.to_markdown(tables.of([*SWEEP, failed]))


def test_options_of_the_sampler_are_columns_and_compared():
    drawn = [current(point(sampler={"temperature": value, "do_sample": True})) for value in (0.5, 1.0)]
    assert [row["temperature"] for row in tables.of(drawn)["points"].objects] == [0.5, 1.0]
    assert [row["option"] for row in tables.of(drawn)["options"].objects] == ["temperature", "temperature"]


# --- per option


def test_options_are_those_that_vary_with_medians_over_their_points():
    rows = tables.of(SWEEP)["options"].objects
    assert [(row["option"], row["value"], row["points"]) for row in rows] == [
        ("batch_size", 1, 2),
        ("batch_size", 2, 2),
        ("batch_size", 8, 2),
        ("compile", "no", 3),
        ("compile", "static", 3),
    ]
    for row in rows:
        members = [made for made in SWEEP if row["value"] in (made["batch_size"], made["switches"]["compile"])]
        for name in columns.COMPARED:
            values = [made[name] for made in members]
            assert (row[name], row[name + "_min"], row[name + "_max"]) == (median(values), min(values), max(values))
    assert tables.of(SWEEP[:1])["options"].rows == []


def test_a_cache_is_an_option_only_where_it_was_chosen():
    lengths = [point(prompt_length=size, cache_length=size + 200) for size in (100, 400)]
    assert [column.name for column in tables.varying(lengths)] == ["prompt_length"]
    chosen = [point(cache_length=size) for size in (1200, 4096)]
    assert [column.name for column in tables.varying(chosen)] == ["cache_length"]


def test_true_and_one_are_two_values():
    both = [point(switches={"draft": value}) for value in (True, 1)]
    assert len(tables.of(both)["options"].rows) == 2


# --- for people


def test_markdown_holds_every_column_and_value():
    made = tables.of(SWEEP)
    text = formats.to_markdown(made)
    for name in [*made["points"].header, *made["options"].header]:
        # The smallest and the largest are in the median's cell.
        assert re.search(rf"\| +{re.sub('_(min|max)$', '', name)} +\|", text)
    lines = text.splitlines()
    assert (
        "## per option" in lines and "## points: speed" in lines and f"## the same in all {len(SWEEP)} points" in lines
    )
    counts = [line.replace("\\|", "").count("|") for line in lines]
    for index, line in enumerate(lines):
        if line.startswith("|--") or line.startswith("| --"):
            assert counts[index - 1] == counts[index] == counts[index + 1]
    ends = figures.spread(SWEEP[0])
    assert f" {SWEEP[0]['decode_tok_per_s']:.2f} ({ends[0]:.2f}..{ends[1]:.2f}) |" in text


def test_a_bar_in_a_text_is_no_cell():
    text = formats.to_markdown(tables.of([point(text_sample="a | b\n c")]))
    assert "a \\| b c" in text


@pytest.mark.parametrize("points", [SWEEP, SWEEP[:1], []], ids=len)
def test_a_terminal_shows_tables(points):
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(formats.to_rich(tables.of(points)))
    text = console.export_text()
    assert f"the same in all {len(points)} points" in text and max(map(len, text.splitlines())) <= 100
    assert ("per option" in text) is (len(points) > 1)


# --- files


@pytest.mark.parametrize("name", formats.NAMES)
def test_an_existing_file_is_replaced_whole(tmp_path, name):
    path = tmp_path / "out"
    path.write_text("old")
    export.write(SWEEP, name, path)
    first = path.read_bytes()
    assert first != b"old"
    export.write(SWEEP, name, path)
    assert path.read_bytes() == first
    assert [found.name for found in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", formats.NAMES)
def test_what_fails_leaves_the_file_that_was_there(tmp_path, name, monkeypatch):
    path = tmp_path / "out"
    path.write_text("old")

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        export.write(SWEEP, name, path)
    assert path.read_text() == "old" and [found.name for found in tmp_path.iterdir()] == ["out"]


def test_where_nothing_can_be_written(tmp_path):
    source = tmp_path / "points.jsonl"
    with pytest.raises(ValueError, match="what is read"):
        export.check_output("csv", tmp_path / "x" / ".." / "points.jsonl", (source,))
    with pytest.raises(IsADirectoryError, match="is a folder"):
        export.check_output("csv", tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        export.check_output("csv", tmp_path / "none" / "a.csv")
    with pytest.raises(ValueError, match="--output FILE"):
        export.check_output("sqlite", None)


# --- the command line


def command(*argv) -> int:
    try:
        return command_line.main([str(word) for word in argv])
    except SystemExit as end:
        return end.code


@pytest.fixture
def swept(tmp_path):
    path = tmp_path / "sweep.jsonl"
    for made in POINTS:
        points_file.append(path, made)
    return path


def test_points_on_disk_are_exported(swept, tmp_path, capsys):
    out = tmp_path / "out.csv"
    assert command("export", swept, "--format", "csv", "-o", out) == 0
    assert f"{len(POINTS)} points" in capsys.readouterr().out
    assert out.read_bytes().decode() == formats.to_csv(tables.of(POINTS)["points"])
    assert command("export", swept, "--format", "csv", "--table", "options") == 0
    assert capsys.readouterr().out == formats.to_csv(tables.of(POINTS)["options"])
    assert command("export", swept, swept, "--format", "jsonl") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(POINTS)


def test_records_are_exported(tmp_path, capsys):
    for made in (fake_record(1, "one"), current(fake_record(2, "two"))):
        folder = tmp_path / "tb_logs" / made["id"]
        folder.mkdir(parents=True)
        words.dump_json(folder / "record.json", made)
    assert command("--root", tmp_path, "export", "--format", "json") == 0
    assert [row["what"] for row in json.loads(capsys.readouterr().out)["points"]] == ["one", "two"]
    assert command("export", folder / "record.json", "--format", "jsonl") == 0
    assert json.loads(capsys.readouterr().out)["what"] == "two"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["export", "--format", "xml"], "invalid choice: 'xml'"),
        (["export"], "--format"),
        (["export", "none.jsonl", "--format", "csv"], "there is no file none.jsonl"),
        (["export", "{swept}", "--format", "sqlite"], "--output FILE"),
        (["export", "{swept}", "--format", "csv", "-o", "{swept}"], "is what is read"),
        (["export", "{broken}", "--format", "csv", "-o", "{out}"], "broken.jsonl line 1"),
    ],
)
def test_bad_words_end_with_2_and_write_nothing(swept, tmp_path, capsys, argv, says):
    broken, out = tmp_path / "broken.jsonl", tmp_path / "out"
    broken.write_text(json.dumps({**POINTS[0], "tok_per_s": 1.0}) + "\n")
    before = swept.read_bytes()
    given = {"{swept}": swept, "{broken}": broken, "{out}": out}
    assert command(*(given.get(word, word) for word in argv)) == 2
    captured = capsys.readouterr()
    assert says in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert swept.read_bytes() == before and not out.exists()


@pytest.mark.usefixtures("forked")
def test_the_repositorys_records_are_exported(tmp_path):
    path = tmp_path / "all.sqlite"
    root = Path(command_line.__file__).parents[2]
    argv = [sys.executable, "-m", "fastllama.lab", "export", "--format", "sqlite", "-o", str(path)]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    database = sqlite3.connect(path)
    records = record.read_all()
    (count,), (best,) = (
        database.execute(f"SELECT {what} FROM points").fetchone() for what in ("count(*)", "max(decode_tok_per_s)")
    )
    assert count == len(records) and best == max(made["decode_tok_per_s"] for made in records)
    database.close()
