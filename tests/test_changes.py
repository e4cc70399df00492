"""The log, the README's figures, the pictures and the command line, rendered from made-up and from real records."""

import importlib.util
import json
import shlex
import subprocess
import sys

import pytest

from fastllama.lab import __main__ as command_line
from fastllama.lab.points import points_file
from fastllama.lab.records import changes, readme, record, sources, words
from fastllama.lab.suite import __main__ as suite
from tests.fake_records import COMMIT, fake_record, make_repository, point

OTHER = "fedcba9876543210fedcba9876543210fedcba98"


def stored(root, *records) -> list[dict]:
    for made in records:
        folder = root / "tb_logs" / made["id"]
        folder.mkdir(parents=True)
        words.dump_json(folder / "record.json", made)
    return record.read_all(root)


def rows_of(text: str) -> list[list[str]]:
    """Cells of every table line that links a record."""
    lines = [line for line in text.splitlines() if line.startswith("| [")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


# --- the repository's own


def test_the_repositorys_log_is_what_its_records_say():
    records = record.read_all()
    path = sources.ROOT / changes.NAME
    assert path.read_text(encoding="utf-8") == changes.render(records)


def test_the_repositorys_readme_is_what_its_records_say():
    text = (sources.ROOT / readme.NAME).read_text(encoding="utf-8")
    assert readme.render(text, record.read_all()) == text


def test_every_unmeasured_command_is_one_that_can_be_run():
    spec = importlib.util.spec_from_file_location("run_llama", sources.ROOT / "run_llama.py")
    run_llama = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run_llama)
    for entry in words.unmeasured():
        if entry["command"] == "pytest -m cuda":
            continue
        if entry["command"].startswith("python -m fastllama.lab.suite "):
            suite._parser().parse_args(shlex.split(entry["command"])[3:])
            continue
        if entry["command"].startswith("python -m fastllama.lab "):
            command_line.parse(shlex.split(entry["command"])[3:])
            continue
        several = "torchrun --nproc-per-node 2 "
        command = "python " * entry["command"].startswith(several) + entry["command"].removeprefix(several)
        program, script, *arguments = shlex.split(command)
        assert (program, script) == ("python", "run_llama.py")
        run_llama._parse(arguments)  # exits where the command line has no such option


# --- changes.md


def test_nothing_measured_yet(tmp_path):
    text = changes.render([], tmp_path)
    assert "No record yet." in text and "Not yet measured" not in text and "Cited" not in text


def test_rows_are_grouped_and_vanilla_leads(tmp_path):
    other_machine = {"cpu": "Example CPU", "threads": 4, "torch": "2.13.0"}
    records = stored(
        tmp_path,
        fake_record(1, "first", speed=30.0),
        fake_record(2, "small", model="demo", prompt_length=100),
        fake_record(3, "four threads", environment=other_machine),
        fake_record(4, "vanilla", speed=20.0, vanilla=None),
        fake_record(5, "second", speed=33.0),
    )
    text = changes.render(records, tmp_path)
    assert [row[0][1:4] for row in rows_of(text)] == ["004", "001", "005", "002", "003"]
    assert [row[-1] for row in rows_of(text)] == ["-", "+50.0 %", "+65.0 %", "-", "-"]  # 33 and 30 over 20: one commit
    assert text.count("\n## Example CPU, 2 threads, torch 2.13.0\n") == 1
    assert "\n### demo fp32, batch 1, prompt 100, 200 new tokens\n" in text
    row = rows_of(text)[1]
    assert row[1:4] == ["`0123456`", "first", "no"] and row[5] == "30.00 (29.70..30.30)"
    assert row[6:11] == ["1.50", "50 %", "400.0", "`0d6aa042`", "exact"]


def test_a_gain_that_the_rule_does_not_find_is_no_claim():
    before = fake_record(1, speed=40.0, spread=0.05)
    assert changes.gain(fake_record(2, speed=44.0, spread=0.05), before) == "~"
    assert changes.gain(fake_record(2, speed=42.0, spread=0.05), before) == "~"
    assert changes.gain(fake_record(2, speed=42.0, spread=0.01), fake_record(1, speed=40.0)) == "+5.0 %"
    assert changes.gain(fake_record(2, speed=36.0, spread=0.01), fake_record(1, speed=40.0)) == "-10.0 %"
    assert changes.gain(before, None) == "-"


def test_a_switch_that_was_tried_is_compared_with_its_commits_own_row(tmp_path):
    rows = [
        fake_record(1, speed=20.0, vanilla=None),
        fake_record(2, speed=30.0),
        fake_record(3, speed=36.0, commit=OTHER),
        fake_record(4, speed=18.0, commit=OTHER, switches={"fuse": "no"}),
    ]
    rows[0]["commit"] = "f" * 40
    assert [changes.compared_with(rows, index) for index in range(4)] == [None, rows[0], rows[1], rows[2]]
    gains = [row[11] for row in rows_of(changes.render(rows, tmp_path))]
    assert gains == ["-", "+50.0 %", "+20.0 %", "-50.0 %"]


def test_a_speed_up_that_the_rule_does_not_find_is_marked():
    assert changes.times_vanilla(fake_record(speed=22.0, spread=0.1)) == "1.10 ~"
    assert changes.times_vanilla(fake_record(speed=22.0, spread=0.01)) == "1.10"
    assert changes.times_vanilla(fake_record(vanilla=None)) == "1.00"


def test_rows_and_compare_say_the_same(tmp_path, lab):
    rows = [
        fake_record(1, speed=40.0),
        fake_record(2, speed=44.0, commit=OTHER),
        fake_record(3, speed=40.2, commit=OTHER),
    ]
    stored(tmp_path, *rows)
    for one, before in ((rows[1], rows[0]), (rows[2], rows[0])):
        said = lab("compare", before["id"], one["id"])[1]
        assert ("is faster than" in said) == (changes.gain(one, before) != "~")


def test_without_scipy_the_log_is_not_rendered_and_the_record_is_kept(tmp_path, monkeypatch):
    make_repository(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match=r"kept as .*001-.*record\.json.*pip install") as fault:
        record.save(point(), "first", root=tmp_path)
    assert len(record.read_all(tmp_path)) == 1 and "\n" not in str(fault.value)
    assert not (tmp_path / changes.NAME).exists()
    monkeypatch.undo()
    changes.write(record.read_all(tmp_path), tmp_path)
    assert "first" in (tmp_path / changes.NAME).read_text()


def test_predictions_stand_beside_the_row(tmp_path):
    records = stored(
        tmp_path,
        fake_record(1, "a"),
        {**fake_record(2, "b"), "prediction": "faster | by far", "prediction_committed": False},
        {**fake_record(3, "c"), "prediction": "no change", "prediction_committed": None},
    )
    text = changes.render(records, tmp_path)
    assert "| predicted |" in text
    assert "| faster \\| by far (not committed before the run) |" in text
    assert "| no change (not checked: no .git) |" in text
    assert "predicted |" not in changes.render(records[:1], tmp_path)


def test_words_are_shown_as_words(tmp_path):
    (tmp_path / "tb_logs").mkdir()
    row = {"what": "none", "compile": "no", "tok_per_s": 23.15, "max_mem_mb": 14776.09, "hash": "0d6aa042"}
    table = {"source": "a log", "machine": "m", "model": "n", "workload": "w", "note": "o", "rows": [row]}
    words.dump_json(tmp_path / "tb_logs" / "cited.json", [table])
    words.dump_json(tmp_path / "tb_logs" / "unmeasured.json", [{"what": "GPU", "command": "python run_llama.py"}])
    tried = {"what": "a way", "expected": "faster.", "found": "slower | by far."}
    words.dump_json(tmp_path / "tb_logs" / "tried.json", [tried])
    text = changes.render([], tmp_path)
    assert "- **a way.** Expected: faster. Found: slower \\| by far.\n" in text
    assert "### a log\n" in text and "| none | no | 23.150 | 14776.09 | 0d6aa042 |" in text
    assert "## Not yet measured\n\n- GPU:\n\n      python run_llama.py\n" in text


@pytest.mark.parametrize("name", ["cited", "tried", "unmeasured", "predictions"])
@pytest.mark.parametrize("content", ["", "7", '[{"what": 1}]', '{"a": 1}', "[3]"])
def test_bad_words_are_refused_by_name(tmp_path, name, content):
    (tmp_path / "tb_logs").mkdir()
    (tmp_path / "tb_logs" / f"{name}.json").write_text(content)
    with pytest.raises(ValueError, match=rf"{name}\.json"):
        getattr(words, name)(tmp_path)


def test_rendering_is_deterministic_and_keeps_the_table_whole(tmp_path):
    made = [fake_record(number, "with | a bar\nand a line", speed=30.0 + number) for number in (3, 1, 2)]
    records = stored(tmp_path, *made)
    assert [one["id"][:3] for one in records] == ["001", "002", "003"]
    text = changes.render(records, tmp_path)
    assert text == changes.render(record.read_all(tmp_path), tmp_path)
    assert {len(row) for row in rows_of(text)} == {12}
    assert "with \\| a bar and a line" in text


# --- README


MARKED = (
    "# x\n<!-- begin:switches -->\n<!-- end:switches -->\nmiddle\n<!-- begin:result -->old<!-- end:result -->\nend\n"
)


def test_the_readme_keeps_its_words_and_renders_twice_the_same(tmp_path):
    records = stored(tmp_path, fake_record(1), fake_record(2, "tiny", model="random:llama-160m", speed=60.0))
    once = readme.render(MARKED, records, tmp_path)
    assert readme.render(once, records, tmp_path) == once
    assert once.startswith("# x\n<!-- begin:switches -->\n| switch |") and "\nmiddle\n" in once
    assert once.endswith("<!-- end:result -->\nend\n") and "-->old" not in once
    result = once[once.index("begin:result") :]
    assert "demo fp32" in result and "random:llama-160m fp32" in result and "Example CPU" in result
    assert "| 2.00 |" in result and "| 3.00 |" in result


def test_the_result_is_the_newest_record_with_vanilla_beside_it():
    newer = fake_record(2, speed=44.0, commit=OTHER)
    tried = fake_record(3, speed=10.0, commit=OTHER, switches={"fuse": "no"})
    records = [fake_record(1, speed=30.0), newer, tried, fake_record(4, speed=20.0, vanilla=None)]
    text = readme.result(records)
    assert f"[002](tb_logs/002-{OTHER[:7]}/record.json)" in text and "001" not in text and "003" not in text
    assert "No record yet" in readme.result(records[3:])


def test_a_switchs_effect_needs_a_pair_that_differs_in_it_alone():
    def compiled(number, speed, **fields):
        return fake_record(number, speed=speed, switches={"compile": "static"}, **fields)

    plain = fake_record(1, speed=40.0)
    assert "+25.0 % decode speed" in readme.effect("compile", "no", [plain, compiled(2, 50.0)])
    assert "002-0123456 beside 001-0123456" in readme.effect("compile", "no", [plain, compiled(2, 50.0)])
    assert "-25.0 %" in readme.effect("compile", "no", [compiled(1, 30.0), fake_record(2, speed=40.0)])
    within = readme.effect("compile", "no", [plain, compiled(2, 40.1)])
    assert "no difference" in within and "%" not in within
    of_vanilla = [fake_record(1), fake_record(2, speed=50.0, switches={"compile": "static"})]
    for one in of_vanilla:
        one["switches"]["preallocate"] = False
    assert readme.effect("compile", "no", of_vanilla) == readme.NOT_MEASURED
    unpaired = [
        compiled(2, 50.0, commit=OTHER),
        compiled(2, 50.0, model="other"),
        compiled(2, 50.0, prompt_length=10),
        compiled(2, 50.0, cache_length=4096),
        compiled(2, 50.0, environment={"cpu": "Another", "threads": 2, "torch": "2.13.0"}),
        fake_record(2, speed=50.0, switches={"compile": "static", "fuse": "no"}),
    ]
    for other in unpaired:
        assert readme.effect("compile", "no", [plain, other]) == readme.NOT_MEASURED
    assert readme.effect("fuse", "all", [plain, compiled(2, 50.0)]) == readme.NOT_MEASURED


def test_the_effect_of_preallocating_is_against_vanilla_in_the_same_run():
    defaults = {"compile": "no"}
    text = readme.effect_of_preallocate([fake_record(1, speed=30.0)], defaults)
    assert "`on`: +50.0 % decode speed" in text and "beside vanilla" in text
    compiled = fake_record(2, switches={"compile": "static"})
    assert readme.effect_of_preallocate([compiled], defaults) == readme.NOT_MEASURED


def test_every_switch_is_in_the_table(tmp_path):
    from dataclasses import fields

    from fastllama.model.config import FastConfig

    text = readme.switches([], tmp_path)
    assert [line.split(" | ")[0] for line in text.splitlines()[3:]] == [f"| `{f.name}`" for f in fields(FastConfig)]
    # Each can be given on the command line, and what could not would say so.
    assert "| `compile` | `--compile` |" in text and "Python only" not in text
    assert readme._flag("default_fast") == "Python only"
    assert text.count(readme.NOT_MEASURED) == 1 + len(fields(FastConfig))


@pytest.mark.parametrize(
    "text",
    [
        "<!-- begin:speed --><!-- end:speed -->",
        "<!-- begin:result -->",
        "<!-- end:result -->",
        "<!-- begin:result --><!-- end:switches -->",
        "<!-- begin:result --><!-- begin:result --><!-- end:result -->",
    ],
)
def test_wrong_markers_are_refused(text):
    with pytest.raises(ValueError, match=r"README\.md"):
        readme.render(text, [])


# --- the command line


@pytest.fixture
def lab(tmp_path, capsys):
    """Run the command line on tmp_path; gives (exit code, standard output, standard error)."""

    def run(*arguments):
        code = command_line.main(["--root", str(tmp_path), *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_changes_are_written_and_checked(tmp_path, lab):
    assert lab("changes", "--check")[0] == 1
    assert not (tmp_path / "changes.md").exists()
    assert lab("changes")[0] == 0 and lab("changes", "--check")[0] == 0
    stored(tmp_path, fake_record())
    code, _, error = lab("changes", "--check")
    assert code == 1 and "out of date" in error
    assert lab("changes")[0] == 0 and lab("changes", "--check")[0] == 0


def test_the_readme_is_written_and_checked(tmp_path, lab):
    code, _, error = lab("readme")
    assert code == 2 and "README.md" in error
    (tmp_path / "README.md").write_text(MARKED)
    assert lab("readme", "--check")[0] == 1 and (tmp_path / "README.md").read_text() == MARKED
    assert lab("readme")[0] == 0 and lab("readme", "--check")[0] == 0


def test_predictions_boards_and_plots_from_the_command_line(tmp_path, lab):
    make_repository(tmp_path)
    assert lab("predict", "fused", "a tenth faster")[0] == 0
    assert json.loads((tmp_path / "tb_logs" / "predictions.json").read_text()) == {"fused": "a tenth faster"}
    assert lab("predict", "fused", "slower")[0] == 2
    path = record.save(point(), "fused", root=tmp_path)
    for events in path.parent.glob("events*"):
        events.unlink()
    assert lab("board")[0] == 0 and len(list(path.parent.glob("events*"))) == 1
    pytest.importorskip("matplotlib")
    assert lab("plot", "rows", "-o", tmp_path / "rows.svg")[0] == 0 and (tmp_path / "rows.svg").exists()
    for size in (1, 2):
        points_file.append(tmp_path / "s.jsonl", point(batch_size=size))
    assert lab("plot", "sweep", tmp_path / "s.jsonl", "-o", tmp_path / "s.png")[0] == 0
    assert (tmp_path / "s.png").exists()


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, lab):
    folder = tmp_path / "tb_logs" / f"001-{COMMIT[:7]}"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text("{")
    (tmp_path / "bad.jsonl").write_text("[]\n")
    for arguments in (
        ["changes"],
        ["changes", "--check"],
        ["board"],
        ["readme"],
        ["plot", "rows", "-o", tmp_path / "x.png"],
        ["plot", "sweep", tmp_path / "none.jsonl", "-o", tmp_path / "x.png"],
        ["plot", "sweep", tmp_path / "bad.jsonl", "-o", tmp_path / "x.png"],
    ):
        code, out, error = lab(*arguments)
        assert code == 2 and out == "" and error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(ValueError):
        command_line.main(["--root", str(tmp_path), "--debug", "changes"])
    with pytest.raises(SystemExit) as exit_:
        command_line.main(["nonsense"])
    assert exit_.value.code == 2


def test_the_module_runs_and_needs_no_matplotlib_to_start():
    code = """if True:
        import runpy, sys
        sys.argv[1:] = ["--help"]
        try:
            runpy.run_module("fastllama.lab", run_name="__main__")
        except SystemExit as exit_:
            sys.exit(exit_.code or 3 * ("matplotlib" in sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=sources.ROOT)
    assert done.returncode == 0 and b"predict" in done.stdout
