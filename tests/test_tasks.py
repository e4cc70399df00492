"""Tasks: their prompts, table and file, the costs that foretell a gain, the picture, and the lines of the suite."""

import copy
import io
import json
from statistics import median

import pytest
import torch
from rich.console import Console

import fastllama
from fastllama.demo.names import demo_folder
from fastllama.lab import __main__ as lab_command
from fastllama.lab.measuring import contestant, vanilla
from fastllama.lab.pictures import plot_assisted
from fastllama.lab.points import points_file, workload
from fastllama.lab.records import digest
from fastllama.lab.suite import assisted_lines, suite_lines
from fastllama.lab.suite.line import judge
from fastllama.lab.tasks import cost, file, grounding, prompts, run, table
from tests import command

FAST = ("--preallocate", "--runs", "2", "--warmup", "0", "--dtype", "fp32")


def shown(group) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(group)
    return console.export_text()


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """The decode task of the demo with a draft, from its file."""
    path = tmp_path_factory.mktemp("task") / "decode.jsonl"
    draft = ("--draft", "demo-draft", "--draft-tokens", "3", "--draft-schedule", "constant")
    assert command.run("--task", "decode", *draft, *FAST, "--json", path) == 0
    return file.read(path)


# prompts


def test_decode_prompts_are_short_and_of_the_seeds_lengths(demo_tokenizer):
    found = prompts.examples("decode", demo_tokenizer)
    lengths = [example.length for example in found]
    assert len(found) == 10 and set(lengths) == set(range(5, 11)) and {example.new_tokens for example in found} == {30}
    texts = [demo_tokenizer.decode(example.prompt.input_ids[0], skip_special_tokens=True) for example in found]
    assert texts == list(prompts.DECODE) and len({example.name for example in found}) == 10


def test_benchmark_prompts_have_exactly_their_lengths(demo_tokenizer):
    found = prompts.examples("benchmark", demo_tokenizer)
    assert [example.length for example in found] == [256, 512, 1024, 1968]
    assert {example.new_tokens for example in found} == {60}
    assert all(bool(example.prompt.attention_mask.all()) for example in found)
    again = prompts.examples("benchmark", demo_tokenizer, seed=1)
    assert not found[0].prompt.input_ids.equal(again[0].prompt.input_ids)


def test_repeated_is_what_stands_in_runs_of_four():
    prompt = [1, 2, 3, 4, 5, 6]
    assert grounding.share(prompt, [1, 2, 3, 4]) == 1.0
    assert grounding.share(prompt, [9, 2, 3, 4, 5, 6, 9, 9, 3, 4]) == 0.5
    assert grounding.share(prompt, [1, 2, 3, 9, 4, 5, 6]) == 0.0
    assert grounding.share([1, 2], [1, 2]) == 0.0


@pytest.fixture(scope="module")
def demo(demo_tokenizer):
    """The demo, greedy."""
    model = fastllama.LlamaForCausalLM.from_pretrained(demo_folder("target"), dtype=torch.float32)
    vanilla.plain_greedy(model, workload.pad_id(demo_tokenizer))
    model.preallocate(1, 640, compile="native")
    return model


def test_lookup_prompts_are_answered_out_of_their_input(demo, demo_tokenizer):
    found = grounding.ranked(demo, demo_tokenizer, prompts.CHOSEN)
    assert [tuple(what) for _, *what in found] == list(prompts.CHOSEN)
    assert found[-1][0] > 0.25 and found[0][0] > 0.75
    assert set(prompts.CHOSEN) < set(grounding.candidates())
    usual = [("rename", "shlex", "quote"), ("name", "statistics", "_convert"), ("summary", "fractions", "_mul")]
    others = grounding.ranked(demo, demo_tokenizer, usual)
    assert len(others) == len(usual) and max(share for share, *_ in others) < found[-1][0]
    assert prompts.renamed("calendar", "iterweekdays") is None  # it has no parameter but self


@pytest.mark.full
def test_no_other_prompt_is_answered_more_out_of_its_input(demo, demo_tokenizer):
    found = grounding.ranked(demo, demo_tokenizer, grounding.candidates())
    assert [tuple(what) for _, *what in found[: len(prompts.CHOSEN)]] == list(prompts.CHOSEN)


def test_lookup_prompts_hold_what_is_to_be_repeated(demo_tokenizer):
    texts = prompts.lookup_texts()
    assert len(texts) == 10 and len({name.split()[0] for name in texts}) == 3
    for name, text in texts.items():
        source, _, begun = text.partition("\n\n\n# ")
        assert source.startswith(("def ", "@")) and begun.splitlines()[2:]
        if name.startswith("rename"):
            assert "item" in begun.split(":\n\n")[1]
        if name.startswith("name"):
            assert f"def new_{name.split()[1]}(" in begun
    found = prompts.examples("lookup", demo_tokenizer)
    assert all(150 < example.length < 500 for example in found)
    with pytest.raises(ValueError, match="no task 'chat'; there are decode, benchmark, lookup"):
        prompts.examples("chat", demo_tokenizer)


# lines, table and file


def test_a_line_for_each_example(lines):
    assert [line["number"] for line in lines] == list(range(1, 11)) and {line["examples"] for line in lines} == {10}
    for line in lines:
        found = line["assisted"]
        assert line["parity"] == found["parity"] == "exact" and line["hash"] == found["unassisted"]["hash"]
        assert line["cache_length"] == 40 and len(line["runs"]) == 2 == len(found["reports"])
        assert found["draft"] == "demo-draft" and found["draft_tokens"] == 3 and found["switched_off"] == 0
        assert found["mode"] == "draft" and found["tokens_per_target_forward"] >= 1
        assert line["costs"]["draft_step_s"] > 0 and {"1", "2", "5"} <= line["costs"]["verify_s"].keys()
        assert line["predicted_speedup"] == pytest.approx(cost.predicted(line))
    words = lines[0]["command"].split()
    assert words[2:4] == ["--task", "decode"] and "--prompt-length" not in words and "--draft" in words


def test_the_command_of_a_line_is_one_that_runs(lines):
    import run_llama

    options = run_llama._parse(lines[0]["command"].split()[2:])
    assert options.task == "decode" and options.draft == "demo-draft" and options.runs == 2


def test_the_table_has_a_row_per_example_and_totals_of_sums(lines):
    text = shown(table.of(lines))
    assert "task decode: demo fp32, draft demo-draft K 3 constant" in text and text.count("exact") == 10
    totals = table.totals(lines)
    assert totals["new_tokens"] == 300 and totals["prompt_length"] == sum(line["prompt_length"] for line in lines)
    seconds = sum(table.seconds(line["runs"]) for line in lines)
    assert totals["tok_per_s"] == pytest.approx(300 / seconds)
    plain = sum(table.seconds(line["assisted"]["unassisted"]["runs"]) for line in lines)
    assert totals["speedup_end_to_end"] == pytest.approx(plain / seconds)
    reports = [report for line in lines for report in line["assisted"]["reports"]]
    count = {name: sum(report[name] for report in reports) for name in reports[0] if name != "mode"}
    assert totals["acceptance"] == pytest.approx(count["accepted_tokens"] / count["draft_tokens"])
    assert totals["tokens_per_target_forward"] == pytest.approx(2 * 300 / count["target_forwards"])
    assert totals["draft_s"] == pytest.approx(sum(line["assisted"]["draft_s"] for line in lines))
    last = [row for row in text.splitlines() if row.strip().startswith("total")]
    assert len(last) == 1 and " 300 " in last[0] and "switched itself off 0 times" in text


def test_without_assistance_its_columns_are_dashes(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "DECODE", prompts.DECODE[:3])
    path = tmp_path / "plain.jsonl"
    assert command.run("--task", "decode", *FAST[:-2], "--json", path) == 0
    assert "unassisted, on cpu" in capsys.readouterr().out
    kept = file.read(path)
    assert all(line["assisted"] is None is line["predicted_speedup"] is line["costs"] for line in kept)
    assert table.cells(kept[0])[5:] == ["-"] * 5 == table.total_cells(kept)[5:]
    assert {line["parity"] for line in kept} == {"exact"}
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_assisted.assisted(kept, tmp_path / "a.svg")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda line: line.update(tok_per_s=1.0), "tok_per_s"),
        (lambda line: line.update(predicted_speedup=9.0), "predicted_speedup"),
        (lambda line: line.update(task="chat"), "field task"),
        (lambda line: line.update(more=1), "not one that the schema knows"),
        (lambda line: line["assisted"].update(draft_s=9.0), "assisted.draft_s"),
        (lambda line: line["costs"].update(step_s=-1.0), "costs.step_s"),
        (lambda line: line["costs"].update(verify_s={}), "costs.verify_s"),
        (lambda line: line.update(task_schema=3), "no line of a task"),
        (lambda line: line.update(cache_length=3), "too short"),
    ],
)
def test_a_line_that_cannot_be_trusted_is_refused(lines, change, says):
    wrong = copy.deepcopy(lines[0])
    change(wrong)
    with pytest.raises(ValueError, match=r"^here: ") as fault:
        file.check_line(digest.seal(wrong), "here")
    assert says in str(fault.value)
    file.check_line(lines[0], "here")


def test_the_foretold_gain_counts_whole_calls_on_both_sides(lines):
    """And of lines that earlier versions wrote, the passes alone of the assisted call."""
    line = copy.deepcopy(lines[0])
    reports = line["assisted"]["reports"]
    assert all(0 < report["draft_prefill_s"] < report["prefill_s"] for report in reports)
    plain, own = cost.prefills(line)
    firsts = [run["first_s"] for run in line["runs"]]
    assert own == median(firsts) + median(report["draft_prefill_s"] for report in reports)
    assert plain == median(run["first_s"] for run in line["assisted"]["unassisted"]["runs"])
    for report in reports:
        del report["draft_prefill_s"]
    assert cost.prefills(line) == (plain, line["assisted"]["prefill_s"])
    line["predicted_speedup"] = cost.predicted(line)
    file.check_line(digest.seal(line), "here")


def test_lines_of_the_first_schema_foretold_without_refused_steps(lines):
    """Files that an earlier version wrote are read as it meant them."""
    line = copy.deepcopy(lines[0])
    for report in line["assisted"]["reports"]:
        report["draft_forwards"] += 5
    line["task_schema"] = 1
    file.check_line(digest.seal(line), "here")
    line["task_schema"] = 2
    with pytest.raises(ValueError, match="predicted_speedup"):
        file.check_line(digest.seal(line), "here")
    line["predicted_speedup"] = cost.predicted(line)
    assert line["predicted_speedup"] < lines[0]["predicted_speedup"]
    file.check_line(digest.seal(line), "here")


def test_files_of_tasks_and_of_points_are_not_mixed(lines, tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    file.append(path, lines[0])
    with pytest.raises(ValueError, match="line 1"):
        points_file.read(path)
    path.write_text(json.dumps({**lines[0], "text_sample": "edited"}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: .*edited after it was written"):
        file.read(path)
    assert command.run("--task", "decode", *FAST, "--json", path) == 2
    assert "edited after" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no folder"):
        file.require(tmp_path / "none" / "x.jsonl")


# prediction


COSTS = {"step_s": 0.010, "draft_step_s": 0.001, "verify_s": {"1": 0.010, "3": 0.012, "5": 0.016}}


def test_costs_between_sizes_are_on_a_line():
    assert [cost.verify_s(COSTS, size) for size in (1, 2, 3, 4, 7)] == pytest.approx(
        [0.010, 0.011, 0.012, 0.014, 0.020]
    )
    assert cost.verify_s({"verify_s": {"1": 0.5}}, 4) == 0.5


def test_a_gain_follows_from_costs_and_acceptance():
    plain, assisted = cost.seconds(COSTS, 2, 0.5, 61, (0.1, 0.2))
    assert plain == pytest.approx(0.1 + 60 * 0.010)
    assert assisted == pytest.approx(0.2 + 30 * (2 * 0.001 + 0.012))  # 30 rounds of two tokens
    refused = cost.seconds(COSTS, 2, 0.5, 61, (0.1, 0.2), drafting=3.0)  # each round drew one more than it verified
    assert refused == (plain, pytest.approx(0.2 + 30 * (3 * 0.001 + 0.012)))
    nothing = cost.seconds(COSTS, 0, 0.0, 61, (0.1, 0.1))
    assert nothing[0] == pytest.approx(nothing[1])


# the picture


def test_the_picture_is_the_same_bytes_for_the_same_lines(lines, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "decode.jsonl"
    for line in lines:
        file.append(path, line)
    made = []
    for name in ("a.svg", "b.svg", "c.png", "d.png"):
        assert lab_command.main(["plot", "assisted", str(path), "-o", str(tmp_path / name)]) == 0
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1] and made[2] == made[3] and made[2].startswith(b"\x89PNG")
    assert "predicted from measured costs" in made[0].decode()
    assert lab_command.main(["plot", "assisted", str(tmp_path / "none.jsonl"), "-o", str(tmp_path / "a.svg")]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_the_picture_refuses_two_machines(lines, tmp_path):
    pytest.importorskip("matplotlib")
    other = copy.deepcopy(lines[0])
    other["environment"]["cpu"] = "Another CPU"
    with pytest.raises(ValueError, match="2 machines"):
        plot_assisted.assisted([lines[1], other], tmp_path / "a.svg")


# the suite's lines


def quick(name: str, **changes):
    line = next(line for line in assisted_lines.CPU if line.name == name)
    return line, assisted_lines._quick(**{"runs": 2, "warmup": 0, "compile": "no"} | changes)


def test_the_lines_are_in_the_suite():
    assert set(assisted_lines.CPU) <= set(suite_lines.CPU) and len(assisted_lines.CPU) == 8


def test_a_pair_is_measured_and_judged(monkeypatch):
    monkeypatch.setattr(prompts, "DECODE", prompts.DECODE[:4])
    line, case = quick("draft-demo")
    measured = line.measure(case, "cpu")
    assert judge(line.asked, measured)[1].keys() == {"of_predicted"} and measured.parity == "exact"
    assert len(measured.samples["examples"]) == 4 and len(measured.checks) == 8
    figures = measured.figures
    assert figures["of_predicted"] == pytest.approx(figures["speedup_end_to_end"] / figures["predicted_speedup"])
    json.dumps(measured.samples, allow_nan=False)


def test_the_worst_is_the_smallest_of_its_tasks(monkeypatch):
    monkeypatch.setattr(prompts, "DECODE", prompts.DECODE[:3])
    line, case = quick("assisted-worst", tasks=("decode",), runs=1)
    figures = line.measure(case, "cpu").figures
    assert figures["worst_speedup"] == min(figures["draft_decode"], figures["lookup_decode"])


def test_beside_transformers_own_assisted_generation(monkeypatch):
    monkeypatch.setattr(prompts, "DECODE", prompts.DECODE[:2])
    line, case = quick("assisted-transformers", runs=1)
    measured = line.measure(case, "cpu")
    assert measured.figures["times_transformers"] > 0 and measured.checks == [("fp32", "exact")] * 2


def test_contestants_of_a_task_share_one_model():
    task = run.plan("decode", {"preallocate": True, "prompt_lookup": 4, "dtype": "fp32"}, 1, 0)
    found = run.load(task)
    assert [each.name for each in found] == ["ours", "vanilla", "unassisted"] and found[0].model is found[2].model
    assert found[0].assistance == {"prompt_lookup_num_tokens": 4} and not found[2].assistance
    assert isinstance(found[0], contestant.Contestant)
    found[0].free()
