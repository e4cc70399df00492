"""The suite: its lines, how they are judged and kept, its command line, and what is drawn and rendered from it."""

import json
import re
import subprocess
from dataclasses import replace

import pytest
import torch

from fastllama.kernels import native
from fastllama.lab import __main__ as lab_command
from fastllama.lab.measuring import start
from fastllama.lab.pictures import curve
from fastllama.lab.records import readme, record, schema, suite_table
from fastllama.lab.suite import __main__ as suite
from fastllama.lab.suite import beside, rounds, small_rounds, suite_file, suite_lines
from fastllama.lab.suite.line import NOT_COMPARED, Bound, Case, Line, Measured, judge
from tests import forked
from tests.fake_records import COMMIT, fake_record, make_repository, point
from tests.test_measure import write_tiny

ASKED = (Bound("speed", ">=", 2), Bound("cost", "<=", 1.2))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


def found(speed=3.0, cost=1.0, verdict="exact", dtype="fp32") -> Measured:
    return Measured({"speed": speed, "cost": cost}, checks=[(dtype, verdict)])


def a_line(name="good", measured=None, fault=None, **changes) -> Line:
    def measure_it(case, device):
        if fault is not None:
            raise fault
        return measured or found()

    case = Case("demo", "fp32")
    return Line(name, "{model} {dtype}, {runs} runs", ASKED, measure_it, case, **{"quick": case, **changes})


# --- the lines


def test_the_lines_are_well_formed():
    for device, lines in suite_lines.LINES.items():
        names = [line.name for line in lines]
        assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w.-]+", name) for name in names)
        for line in lines:
            assert len({bound.figure for bound in line.asked}) == len(line.asked)
            for case in filter(None, (line.case, line.quick)):
                assert case.point(device).command()  # every size, dtype and switch is one that a point takes
                assert case.model in line.what(case) and "{" not in line.what(case)
            assert line.quick is None or line.quick.runs <= line.case.runs
    assert all(line.quick.model in ("demo", "inflated:llama-160m") for line in suite_lines.CPU if line.quick)


@pytest.mark.parametrize(
    ("measured", "reached", "each"),
    [
        (found(), True, {"speed": True, "cost": True}),
        (found(speed=2, cost=1.2), True, {"speed": True, "cost": True}),
        (found(speed=1.99), False, {"speed": False, "cost": True}),
        (found(cost=1.21), False, {"speed": True, "cost": False}),
        (found(speed=None), False, {"speed": False, "cost": True}),
        (Measured({}), False, {"speed": False, "cost": False}),
    ],
)
def test_bounds_decide(measured, reached, each):
    assert judge(ASKED, measured) == (reached, each)


@pytest.mark.parametrize(
    ("dtype", "verdict", "reached"),
    [
        ("fp32", "tie", True),
        ("fp32", "differs", False),
        ("fp32", "half", False),
        ("fp32", NOT_COMPARED, False),
        ("bf16", "half", True),
        ("fp16", NOT_COMPARED, True),
        ("bf16", "differs", False),
    ],
)
def test_parity_decides_too(dtype, verdict, reached):
    measured = found(verdict=verdict, dtype=dtype)
    assert judge(ASKED, measured) == (reached, {"speed": True, "cost": True})
    measured.checks.append(("fp32", "exact"))
    assert judge(ASKED, measured)[0] is reached and measured.parity == ("exact" if verdict == NOT_COMPARED else verdict)


def test_what_nothing_was_compared_for_is_not_reached_and_no_bound_is_no_claim():
    assert judge(ASKED, Measured({"speed": 3.0, "cost": 1.0}))[0] is False
    assert judge((), found()) == (None, {})
    with pytest.raises(ValueError, match=">= or <="):
        Bound("speed", ">", 2)


# --- measuring, on a tiny model


def case_of(tiny, **changes) -> Case:
    return replace(Case(tiny, "fp32", prompt_length=24, new_tokens=6, runs=2, compile="no"), **changes)


def test_figures_follow_from_their_points(tiny, light):
    case = case_of(tiny, batch_size=3)
    measured = beside.batch(case, "cpu")
    together, alone = measured.points
    schema.check_point(together, "the point")
    assert together["parity"] == "exact" and together["batch_size"] == 3 and measured.parity == "exact"
    assert alone["baseline"] is None and alone["parity"] == NOT_COMPARED and alone["batch_size"] == 1
    assert measured.figures["times_one_row"] == together["decode_tok_per_s"] / alone["decode_tok_per_s"]
    speed = beside.prefill(case_of(tiny, new_tokens=1), "cpu")
    assert speed.figures["ttft_speedup"] == speed.points[0]["baseline"]["ttft_ms"] / speed.points[0]["ttft_ms"]


def test_rows_take_turns_on_one_copy_of_the_weights(tiny, light):
    # A cache that is full in the middle of a round is begun anew.
    measured = rounds.rows(case_of(tiny, prompt_length=40, runs=5), "cpu")
    assert set(measured.figures) == {"step_ms", "rows_5", "rows_16", "verify_5", "verify_16"}
    taken = measured.samples["step_s"]
    assert len(taken) == 5 and all(len(times) == 5 and min(times) > 0 for times in taken.values())
    assert measured.checks == [("fp32", "exact")]
    with rounds.stable(case_of(tiny), "cpu") as held:
        first, second = (held.lane(name, 1, 20, 40) for name in ("first", "second"))
        addresses = [[weight.data_ptr() for weight in lane.model.parameters()] for lane in (first, second)]
        assert addresses[0] == addresses[1] and first.model is not second.model
        assert held.prompt(3, 20).lengths == [20, 20, 20]


def test_prompts_are_read_in_turns(tiny, light, monkeypatch):
    monkeypatch.setattr(small_rounds, "_SHORT", (4, 24))
    monkeypatch.setattr(small_rounds, "_WEIGHTS", ("int8",))  # its matrices are too narrow for groups
    measured = small_rounds.prompts(case_of(tiny, prompt_length=40, runs=3), "cpu")
    sizes = [f"{name}_{size}" for size in (4, 24, 40) for name in ("own", "int8")]
    taken = measured.samples["prefill_s"]
    assert list(taken) == sizes and all(len(times) == 3 and min(times) > 0 for times in taken.values())
    ratios = {name for name in measured.figures if name.endswith("_ratio")}
    assert ratios == {f"int8_prompt_{size}_ratio" for size in (4, 24, 40)}
    assert 0 < measured.figures["int8_logits_apart"] < 0.1
    assert measured.checks == [("fp32", "exact"), ("fp32", "lossy")]


def test_what_a_lane_gets_wrong_is_seen(tiny, monkeypatch):
    right = rounds.Contestant.generate

    def wrong(self, prompt, new_tokens):
        ids, seconds = right(self, prompt, new_tokens)
        return (ids + 1 if self.name == "ours" else ids), seconds

    monkeypatch.setattr(rounds.Contestant, "generate", wrong)
    with rounds.stable(case_of(tiny), "cpu") as held:
        assert held.check(held.lane("lane", 1, 20, 40)) == ("fp32", "differs")


def test_ratios_are_medians_of_rounds():
    assert rounds.ratio({"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 4.0]}, "a", "b") == 2.0


def test_context_and_reservation(tiny, light):
    case = case_of(tiny, prompt_length=300)
    measured = rounds.context(case, "cpu")
    figures = measured.figures
    # two layers, two heads, keys and values, eight dimensions of four bytes
    expected = 2 * 2 * 2 * 8 * 4 * (300 - 128) / (figures["ceiling_gb_per_s"] * 1e9)
    assert figures["expected_ms"] == pytest.approx(1000 * expected)
    assert figures["context_cost"] == pytest.approx(figures["added_ms"] / figures["expected_ms"])
    assert measured.parity == "exact"
    # one for each round
    assert {len(each) for each in (measured.samples["ceiling_gb_per_s"], *measured.samples["step_s"].values())} == {
        case.runs
    }
    assert rounds.reservation(case_of(tiny), "cpu").figures.keys() >= {"time_ratio"}
    assert rounds.rival(case_of(tiny, runs=2), "cpu").figures.keys() == {"time_ratio", "alone_ms", "beside_ms"}


def test_first_use_of_starts_that_were_made_up(tiny, monkeypatch):
    # The first two compile, with empty and with filled caches; the first start of each way is not counted.
    seconds = {"native": [9, 3, 2, 4], "static": [9, 9, 9, 4, 4, 4], "no": [9, 2, 2, 2]}
    seconds = {compile: iter(values) for compile, values in seconds.items()}
    asked, compiling = [], iter([10.0, 2.0])

    def made_up(name, task, folder):
        asked.append((name, task[3]))
        compile_s = next(compiling, 0.0)
        return {"compile_s": compile_s, "token": 7, "first_token_s": next(seconds[task[3]])}

    monkeypatch.setattr(start, "start", made_up)
    measured = start.first_use(case_of(tiny), "cpu", tiny)
    assert measured.figures["compile_ratio"] == 0.2 and measured.figures["first_token_ratio"] == 1.5
    assert measured.figures["static_first_token_ratio"] == 2.0
    assert asked == [("ours", "static")] * 2 + [("ours", "native"), ("ours", "static"), ("vanilla", "no")] * 4
    assert measured.parity == "exact"


@pytest.mark.parametrize(
    ("packs", "switches"), [(True, {"compile": "static", "products": "packed"}), (False, {"compile": "native"})]
)
def test_packed_products_are_asked_for_only_where_torch_packs_them(packs, switches, monkeypatch):
    monkeypatch.setattr("fastllama.lab.suite.line.can_pack", lambda weight: packs and weight.dtype == torch.bfloat16)
    assert Case("demo", "bf16", compile="static", products="packed").switches == switches
    assert Case("demo", "bf16", compile="static").switches == {"compile": "static"}


def test_a_start_is_a_process_of_its_own(tiny, tmp_path, monkeypatch):
    task = start._task(case_of(tiny), tiny, "cpu", "no")
    if native.load() is None:  # building it again would show nothing
        (tmp_path / "user" / "fastllama").mkdir(parents=True)
        (tmp_path / "user" / "fastllama" / "native").symlink_to(native.cache_folder() / "native")
    told = {name: start.start(name, task, tmp_path) for name in ("ours", "vanilla")}
    assert told["ours"]["token"] == told["vanilla"]["token"] and told["ours"]["compile_s"] > 0
    assert all(each["first_token_s"] > each["compile_s"] for each in told.values())
    monkeypatch.setattr(subprocess, "Popen", forked.Popen)  # that one fails however it starts
    with pytest.raises(RuntimeError, match=r"new process of ours failed: .*nowhere"):
        start.start("ours", [str(tmp_path / "nowhere"), *task[1:]], tmp_path)


# --- the command line


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Run the command line over made-up lines in a repository of its own; gives (exit code, output, errors)."""
    make_repository(tmp_path)

    def run(lines, *arguments):
        monkeypatch.setattr(suite, "LINES", {"cpu": tuple(lines), "gpu": tuple(lines)})
        code = suite.main([*map(str, arguments)], tmp_path)
        return code, *capsys.readouterr()

    return run


def files(root):
    return sorted((root / suite_file.FOLDER).glob("*"))


def test_a_run_is_printed_and_kept(bench, tmp_path):
    kept = [dict(point(), model="tiny")]
    lines = [a_line(), a_line("slow", found(speed=1.0)), a_line("none", Measured({"x": 1.0}, kept), quick=None)]
    lines[2] = replace(lines[2], asked=())
    code, out, error = bench(lines, "cpu")
    assert code == 0 and error == ""
    assert (
        "good: reached; speed 3.00 (asked >= 2)" in out and "slow: not reached" in out and "none: nothing asked" in out
    )
    (path,) = files(tmp_path)
    assert re.fullmatch(r"cpu-001-[0-9a-f]{7}\.jsonl", path.name)
    good, slow, none = suite_file.read(path)
    assert good["reached"] is True and slow["reached"] is False and none["reached"] is None
    assert slow["reached_by_figure"] == {"speed": False, "cost": True} and none["points"] == kept
    assert good["commit"][:7] in path.name and good["dirty"] is False
    assert good["source_sha256"] == record.source_sha256(tmp_path)
    assert good["what"] == "demo fp32, 5 runs" and good["command"] == "python -m fastllama.lab.suite cpu --only good"
    assert bench(lines, "cpu", "--quick", "--runs", 3)[0] == 0
    second = suite_file.read(files(tmp_path)[1])
    assert [one["line"] for one in second] == ["good", "slow"] and second[0]["what"] == "demo fp32, 3 runs"
    assert second[0]["command"].endswith("--only good --quick --runs 3") and second[0]["quick"] is True


@pytest.mark.parametrize(
    ("fault", "said"),
    [(MemoryError("12 GB are free"), "12 GB are free"), (KeyError("odd"), "KeyError: 'odd'")],
)
def test_a_line_that_fails_is_not_reached_and_the_others_run(bench, tmp_path, fault, said):
    unasked = replace(a_line("unasked", fault=fault), asked=())
    code, out, _ = bench([a_line("bad", fault=fault), unasked, a_line()], "cpu")
    assert code == 1 and f"bad: not measured: {said}" in out and "good: reached" in out
    bad, unasked, good = suite_file.read(files(tmp_path)[0])
    assert unasked["reached"] is False and unasked["not_measured"] == said
    assert bad["not_measured"] == said and bad["reached"] is False and bad["parity"] is None
    assert good["reached"] is True


def test_each_line_is_on_disk_before_the_next(bench, tmp_path):
    def interrupted(case, device):
        assert len(suite_file.read(files(tmp_path)[0])) == 1
        raise KeyboardInterrupt

    code, _, error = bench([a_line(), replace(a_line("last"), measure=interrupted)], "cpu")
    assert code == 130 and "interrupted" in error
    assert [one["line"] for one in suite_file.read(files(tmp_path)[0])] == ["good"]


def test_a_dirty_tree_is_said(bench, tmp_path):
    (tmp_path / "run_llama.py").write_text("changed = 1\n")
    code, out, _ = bench([a_line()], "cpu")
    (path,) = files(tmp_path)
    (kept,) = suite_file.read(path)
    assert code == 0 and path.name == "cpu-001-dirty.jsonl" and "dirty tree" in out
    assert kept["commit"] is None and kept["dirty"] is True


def test_sources_that_change_meanwhile_belong_to_no_commit(bench, tmp_path):
    def edit(case, device):
        (tmp_path / "run_llama.py").write_text("changed = 1\n")
        return found()

    bench([a_line(), replace(a_line("edits"), measure=edit)], "cpu")
    before, after = suite_file.read(files(tmp_path)[0])
    assert before["commit"] is not None and after["commit"] is None and after["dirty"] is True


def test_only_and_list(bench, tmp_path):
    lines = [a_line("one"), a_line("two"), a_line("three", quick=None)]
    code, out, _ = bench(lines, "cpu", "--list")
    assert code == 0 and out.count("\n") == 3 and "two: demo fp32, 5 runs; speed >= 2, cost <= 1.2" in out
    out = bench(lines, "gpu", "--quick", "--list")[1]
    assert out.count("\n") == 3 and out.endswith("left out of a quick run: three\n") and not files(tmp_path)
    assert bench(lines, "cpu", "--only", "three", "one")[0] == 0
    kept = suite_file.read(files(tmp_path)[0])
    assert [one["line"] for one in kept] == ["one", "three"] and all(one["selected"] for one in kept)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["tpu"],
        ["cpu", "--runs", "0"],
        ["cpu", "--runs", "x"],
        ["cpu", "--only"],
        ["cpu", "--only", "four"],
        ["cpu", "--quick", "--only", "three"],
        ["cpu", "--warm"],
        ["cpu", "--commit", "abc"],
        ["gpu"],
    ],
)
def test_wrong_arguments_are_one_sentence(bench, tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.setattr(suite.torch.cuda, "is_available", lambda: False)
    try:
        code, out, error = bench([a_line("one"), a_line("three", quick=None)], *arguments)
    except SystemExit as exit_:
        code, (out, error) = exit_.code, capsys.readouterr()
    assert code == 2 and out == "" and error.startswith("error: ") and error.count("\n") == 1
    assert not files(tmp_path)


# --- the file


def kept_line(**fields) -> dict:
    made = suite.measure_line(a_line(), Case("demo", "fp32"), "cpu")
    return {
        **made,
        "environment": {"cpu": "Example CPU", "threads": 2, "torch": "2.13.0"},
        "commit": COMMIT,
        "dirty": False,
        "source_sha256": "ab" * 32,
        "recorded_at": "2026-02-01T12:00:00+00:00",
        "quick": False,
        "selected": False,
        "command": "python -m fastllama.lab.suite cpu --only good",
        **fields,
    }


def test_a_file_grows_line_by_line(tmp_path):
    path = suite_file.create("cpu", COMMIT, tmp_path)
    for name in ("one", "two"):
        suite_file.append(path, kept_line(line=name))
    assert [one["line"] for one in suite_file.read(path)] == ["one", "two"]
    path.write_bytes(path.read_bytes() + b'{"schema": 1, "li')
    assert len(suite_file.read(path)) == 2  # the line that was cut short is left out
    assert suite_file.create("gpu", None, tmp_path).name == "gpu-002-dirty.jsonl"


@pytest.mark.parametrize(
    "fields",
    [
        {"schema": 2},
        {"measured": None},
        {"asked": [{"figure": "speed"}]},
        {"reached_by_figure": {"speed": False}},
        {"not_measured": "no memory"},
    ],
)
def test_what_is_no_record_is_refused(tmp_path, fields):
    path = suite_file.create("cpu", COMMIT, tmp_path)
    with pytest.raises(ValueError):
        suite_file.append(path, kept_line(**fields))
    assert path.read_bytes() == b""
    path.write_text(json.dumps(kept_line(**fields)) + "\n")
    with pytest.raises(ValueError, match="line 1"):
        suite_file.read(path)


# --- README and picture


def suite_of(root, *lines, device="cpu"):
    path = suite_file.create(device, COMMIT, root)
    for line in lines:
        suite_file.append(path, line)
    return path


def readme_link(path) -> str:
    return f"[{path.stem}](tb_logs/suite/{path.name})"


def test_the_readme_shows_the_newest_whole_run(tmp_path):
    assert "No whole run" in suite_table.table([], tmp_path)
    suite_of(tmp_path, kept_line(line="old"))
    failed = kept_line(line="big", reached=False, not_measured="too | large", parity=None, measured={})
    slow = kept_line(line="slow", reached=False, reached_by_figure={"speed": False, "cost": True})
    newest = suite_of(tmp_path, kept_line(), failed, slow)
    suite_of(tmp_path, kept_line(line="small", quick=True))
    suite_of(tmp_path, kept_line(line="single", selected=True, reached=False))
    alone = suite_of(tmp_path, kept_line(line="single", selected=True))
    text = readme.render("<!-- begin:suite -->\n<!-- end:suite -->\n", [], tmp_path)
    assert readme.render(text, [], tmp_path) == text
    assert "- Example CPU, 2 threads, torch 2.13.0: 2 of 4 lines reached" in text
    assert "| line | asked | Example CPU, 2 threads, torch 2.13.0 |" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    good = f"| `good`: demo fp32, 5 runs | speed >= 2<br>cost <= 1.2 | 3.00<br>1.00<br>exact, {readme_link(newest)} |"
    assert rows[0] == good
    assert f"| not measured: too \\| large<br>{readme_link(newest)} |" in rows[1]
    assert "| **3.00**<br>1.00<br>exact, " in rows[2] and len(rows) == 4
    assert rows[3].startswith("| `single`") and rows[3].endswith(f"<br>exact, {readme_link(alone)} |")
    # What no commit holds says so in its run's name.
    assert "-dirty](" not in text
    suite_file.append(suite_file.create("cpu", None, tmp_path), kept_line(commit=None, dirty=True))
    assert "-dirty](" in suite_table.table([], tmp_path)


def test_the_readme_has_a_column_for_each_machine(tmp_path):
    """What one measures replaces nothing of another's, and a line that was measured again replaces the older one."""
    suite_of(tmp_path, kept_line(), kept_line(line="other"))
    other = {**kept_line()["environment"], "cpu": "Other CPU"}
    missed = {"reached": False, "reached_by_figure": {"speed": False, "cost": True}}
    elsewhere = suite_of(tmp_path, kept_line(selected=True, environment=other, **missed))
    again = suite_of(tmp_path, kept_line(line="other", selected=True, asked=[], reached=None, reached_by_figure={}))
    text = suite_table.table([], tmp_path)
    assert "- Other CPU, 2 threads, torch 2.13.0: 0 of 1 lines reached" in text and ": 1 of 1 lines reached" in text
    first, second = [line for line in text.splitlines() if line.startswith("| `")]
    assert first.endswith(f" | **3.00**<br>1.00<br>exact, {readme_link(elsewhere)} |")
    assert second.endswith(f"| - | speed 3.00<br>cost 1.00<br>exact, {readme_link(again)} | - |")


def test_the_curve_takes_the_newest_of_each_model():
    old, new = fake_record(1, recorded_at="2026-01-01T12:00:00+00:00"), fake_record(2, commit="f" * 40)
    others = [
        fake_record(3, dtype="bf16"),
        fake_record(4, batch_size=4, model="rows"),
        fake_record(5, vanilla=None, model="vanilla"),
        fake_record(6, new_tokens=1, model="short"),
    ]
    assert curve.points([new, old, *others]) == [new, others[0]]
    later = point(speed=50.0)
    assert curve.points([old], [kept_line(points=[later])]) == [later]
    assert curve.points([new], [kept_line(points=[later], recorded_at="2025-01-01T00:00:00+00:00")]) == [new]
    assert curve.token_bytes(point(speed=40.0)) == pytest.approx(4.0e9 / 40)


def test_the_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    drawn = [point(), point(dtype="bf16", read_gb_per_s=7.0), point(model="other", ceiling_gb_per_s=40.0)]
    gpu = {"gpu": "Example GPU", "cpu": "Example CPU", "threads": 2, "torch": "2.13.0"}
    drawn.append(point(device="cuda", environment=gpu, ceiling_gb_per_s=900.0))
    for name in ("a.png", "a.svg"):
        first = curve.curve(drawn, tmp_path / name).read_bytes()
        assert len(first) > 10_000 and curve.curve(drawn, tmp_path / f"b{name}").read_bytes() == first
    text = (tmp_path / "a.svg").read_text()
    assert "other fp32" in text and "demo bf16" in text and "Example GPU" in text and "900 GB/s" in text
    with pytest.raises(ValueError, match="no curve"):
        curve.curve([], tmp_path / "none.png")


def test_the_curve_from_the_command_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = suite_of(tmp_path, kept_line(points=[point()]))
    common = ["--root", str(tmp_path), "plot", "curve", "-o", str(tmp_path / "curve.svg")]
    assert lab_command.main([*common, "--suite", str(path)]) == 0 and "demo" in (tmp_path / "curve.svg").read_text()
    assert lab_command.main(common) == 2  # no record at all
    assert lab_command.main([*common, "--suite", str(tmp_path / "none.jsonl")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
