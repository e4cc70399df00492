"""Many prompts in the laboratory: files of prompts and results, the parallel run, and the suite's lines."""

import itertools
import json

import pytest
import torch

import fastllama
from fastllama.lab import __main__
from fastllama.lab.measuring import checkpoint, vanilla
from fastllama.lab.points import workload
from fastllama.lab.prompts import many, parallel, parallel_texts, prompts_file, results_file
from fastllama.lab.prompts.results_file import Results
from fastllama.lab.suite import many_lines, suite_lines
from fastllama.lab.suite.line import judge
from fastllama.lab.suite.many_lines import ManyCase
from tests import command

LINES = [
    '{"prompt": "def main(args):", "id": "first"}',
    '{"prompt": "for name in self", "max_new_tokens": 3}',
    "no json",
    "",
    '{"prompt": 5, "id": 7}',
    '{"prompt": "x", "max_token": 5}',
    '{"prompt": "x", "max_new_tokens": 0}',
    '{"prompt": "import os\\nimport sys\\n"}',
    '["prompt"]',
    '{"prompt": "a", "prompt": "b"}',
    '{"prompt": "while True:"}',
]
ERRORS = {
    2: "line 3: it is not valid JSON",
    3: "line 5: field prompt must be a text",
    4: "line 6: it has a field 'max_token'; there are prompt, id, max_new_tokens",
    5: "line 7: field max_new_tokens must be a whole number of at least 1",
    7: 'line 9: it is no object such as {"prompt": "text"}',
    8: "line 10: it is not valid JSON",
}
HOW = ("--dtype", "fp32", "--device", "cpu", "--new-tokens", 8)


@pytest.fixture
def files(tmp_path):
    """(prompts, where results go)"""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(LINES) + "\n")
    return prompts, tmp_path / "out.jsonl"


@pytest.fixture(scope="module")
def demo():
    """(vanilla's demo, its tokenizer)"""
    found = checkpoint.find("demo", torch.float32)
    model, _ = checkpoint.load(found, vanilla.LlamaForCausalLM, torch.float32, torch.device("cpu"))
    tokenizer = checkpoint.tokenizer(found)
    vanilla.plain_greedy(model, workload.pad_id(tokenizer))
    return model, tokenizer


def generate(files, *more) -> int:
    prompts, out = files
    return command.run("--prompts", prompts, "--out", out, *HOW, *more)


def test_lines_and_what_is_wrong_with_them(files):
    asked, sha256 = prompts_file.read(files[0])
    assert [line.index for line in asked] == list(range(10)) and len(sha256) == 64
    assert {line.index: line.error for line in asked if line.error is not None} == ERRORS
    assert (asked[0].id, asked[3].id, asked[1].max_new_tokens, asked[6].prompt) == (
        "first",
        7,
        3,
        "import os\nimport sys\n",
    )


@pytest.mark.parametrize("slots", [1, 3])
def test_a_file_of_prompts_becomes_a_file_of_results(files, demo, capsys, slots):
    model, tokenizer = demo
    assert generate(files, "--slots", slots, "--compile", "native") == 0
    said = capsys.readouterr().out
    assert said.startswith("10 prompts, 6 with an error; 27 tokens in ") and f", {slots} slots)" in said
    results = command.read(files[1])
    assert [result["index"] for result in results] == list(range(10))
    assert {result["index"]: result["error"] for result in results if "error" in result} == ERRORS
    assert results[0]["id"] == "first" and results[3]["id"] == 7 and "id" not in results[1]
    for result, line in zip(results, prompts_file.read(files[0])[0], strict=True):
        if line.error is not None:
            assert (result["text"], result["new_tokens"], result["finish"]) == ("", 0, "error")
            continue
        limit = line.max_new_tokens or 8
        ids = tokenizer(line.prompt, return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=limit)[0, ids.shape[1] :]
        assert (result["text"], result["new_tokens"]) == (tokenizer.decode(new, skip_special_tokens=True), len(new))
        assert result["finish"] == "length"
    assert sorted(path.name for path in files[1].parent.iterdir()) == ["out.jsonl", "prompts.jsonl"]


def interrupted(monkeypatch, after: int, fault: BaseException):
    """Makes the writing of results fail once so many are there."""
    original = Results.add

    def add(self, index, result):
        if len(self.done) >= after:
            raise fault
        original(self, index, result)

    monkeypatch.setattr(Results, "add", add)


def test_a_run_that_was_interrupted_goes_on(files, monkeypatch, capsys):
    whole = files[0].parent / "whole.jsonl"
    assert command.run("--prompts", files[0], "--out", whole, *HOW) == 0
    with monkeypatch.context() as patch:
        interrupted(patch, 8, KeyboardInterrupt())
        assert generate(files, "--slots", 1) == 130
    partial = files[1].with_name("out.jsonl.partial")
    assert not files[1].exists() and len(partial.read_text().splitlines()) == 9
    with open(partial, "a") as file:
        file.write('{"index": 6, "te')  # cut off
    made = []
    original = fastllama.LlamaForCausalLM.generate_many

    def spy(self, prompts, **arguments):
        made.append(len(prompts))
        return original(self, prompts, **arguments)

    monkeypatch.setattr(fastllama.LlamaForCausalLM, "generate_many", spy)
    capsys.readouterr()
    assert generate(files) == 0
    assert made == [2] and "8 of them done before" in capsys.readouterr().out
    assert files[1].read_text() == whole.read_text() and not partial.exists()


def test_other_prompts_or_settings_are_refused(files, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupted(patch, 7, OSError("no space left"))
        assert generate(files) == 2
    assert capsys.readouterr().err == "error: no space left\n"
    for more, name in ((("--weights", "int8"), "switches"), (("--repetition-penalty", "1.2"), "sampler")):
        assert generate(files, *more) == 2
        assert f"out.jsonl.partial was begun with other {name} (" in capsys.readouterr().err
    assert command.run("--prompts", files[0], "--out", files[1], *HOW[:4], "--new-tokens", 9) == 2
    assert "begun with other new tokens (8, now 9): ask for the same" in capsys.readouterr().err
    files[0].write_text("\n".join(LINES[1:]))
    assert generate(files) == 2
    assert "begun with other prompts (" in capsys.readouterr().err
    files[1].with_name("out.jsonl.partial").write_text("{}\nnonsense\n")
    assert generate(files) == 2
    assert "is no file of results" in capsys.readouterr().err


def test_files_that_cannot_be_used_are_one_sentence(files, capsys):
    prompts, out = files
    (prompts.parent / "binary").write_bytes(b"\xff\xfe{")
    (prompts.parent / "empty").write_text("\n\n")
    cases = {
        "no/such": "there is no prompts file",
        "binary": "is not UTF-8 text",
        "empty": "holds no line",
    }
    for name, says in cases.items():
        assert command.run("--prompts", prompts.parent / name, "--out", out, *HOW) == 2
        assert says in capsys.readouterr().err
    assert command.run("--prompts", prompts, "--out", prompts.parent / "no" / "out", *HOW) == 2
    assert "there is no folder" in capsys.readouterr().err
    out.write_text("kept")
    assert generate(files) == 2
    assert "out.jsonl is there already" in capsys.readouterr().err and out.read_text() == "kept"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompts", "a"], "--prompts, --out and --slots go together"),
        (["--out", "a"], "--prompts, --out and --slots go together"),
        (["--slots", "2"], "--prompts, --out and --slots go together"),
        (["--prompts", "a", "--out", "b", "--batch-size", "4"], "leave out --batch-size"),
        (["--prompts", "a", "--out", "b", "--sweep", "batch"], "leave out --sweep"),
        (["--prompts", "a", "--out", "b", "--new-tokens", "4,5"], "takes one --new-tokens"),
        (["--prompts", "a", "--out", "b", "--slots", "0"], "0 is below 1"),
    ],
)
def test_flags_that_do_not_go_together(words, says, capsys):
    assert command.run(*words) == 2
    assert says in capsys.readouterr().err


def test_a_cut_off_header_is_nothing(tmp_path):
    path = tmp_path / "out.jsonl"
    path.with_name("out.jsonl.partial").write_text('{"form')
    results = Results(path, {"prompts": "x"}, 2)
    results.add(1, {"text": "b\u2028"})
    results.add(0, {"text": "a"})
    results.finish()
    assert [json.loads(line)["text"] for line in path.read_text().split("\n")[:-1]] == ["a", "b\u2028"]
    assert results_file._shown("x" * 99).endswith("...")


def test_a_missing_result_does_not_pass_as_whole(tmp_path):
    results = Results(tmp_path / "out.jsonl", {}, 2)
    results.add(0, {"text": ""})
    with pytest.raises(ValueError, match="prompt 1 has no result"):
        results.finish()


def test_a_prompt_longer_than_the_model_is_an_error(files):
    files[0].write_text('{"prompt": "' + "word " * 9000 + '"}\n{"prompt": "x"}\n')
    assert generate(files) == 0
    first, second = command.read(files[1])
    assert first["finish"] == "error" and "and preallocate() reserved" in first["error"]
    assert second["new_tokens"] == 8


# the parallel run


def test_requests_take_the_places_of_those_that_end(capsys, monkeypatch):
    kept = []
    original = parallel.table
    monkeypatch.setattr(parallel, "table", lambda *given: kept.append(given) or original(*given))
    words = ["parallel", "--dtype", "fp32", "-np", "3", "-ns", "18", "-n", "12", "--compile", "native"]
    assert __main__.main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "18 requests, 3 at a time, behind a system prompt of " in said and "tokens that is computed once" in said
    ((_, system, served, path),) = kept
    assert path.endswith("3 slots") and system > 200
    assert [one.new_tokens for one in served] == parallel.limits(18, 12, 0)
    assert [one.request for one in served] == list(range(18)) and {one.client for one in served} == {0, 1, 2}
    for client in range(3):
        turns = sorted((one.began_s, one.ended_s) for one in served if one.client == client)
        assert turns[0][0] == 0 and all(one[1] == other[0] for one, other in itertools.pairwise(turns))
    found = checkpoint.find("demo", torch.float32)
    tokenizer = checkpoint.tokenizer(found)
    model, _ = checkpoint.load(found, vanilla.LlamaForCausalLM, torch.float32, torch.device("cpu"))
    text = parallel_texts.SYSTEM + parallel_texts.REQUESTS[2]
    ids = tokenizer(parallel_texts.SYSTEM).input_ids
    ids += tokenizer(parallel_texts.REQUESTS[2], add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    new = model.generate(torch.tensor([ids]), max_new_tokens=served[2].new_tokens, do_sample=False)[0, len(ids) :]
    assert served[2].text == tokenizer.decode(new)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-np", "0.1"], "-np '0.1' is not allowed; allowed: a whole number >= 1"),
        (["-ns", "0"], "-ns '0' is not allowed"),
        (["-n", "x"], "-n 'x' is not allowed"),
        (["--system", "no/such"], "there is no system prompt no/such"),
        (["-ctk", "q9"], "cache_k='q9' is not allowed"),
        (["--model", "no such"], "there is no model folder no such"),
    ],
)
def test_what_the_parallel_run_refuses(words, says, capsys):
    assert __main__.main(["parallel", *words]) == 2
    assert says in capsys.readouterr().err


# the suite's lines


def test_the_lines_are_in_the_suite():
    assert set(many_lines.CPU) <= set(suite_lines.CPU) and [line.name for line in many_lines.CPU] == [
        "many-demo",
        "many-160m",
    ]


def test_prompts_and_limits_follow_from_the_seed(demo_tokenizer):
    case = ManyCase("demo", "fp32", prompts=12, prompt_length=40, new_tokens=30)
    prompts, limits = many_lines.asked(case, demo_tokenizer)
    assert (prompts, limits) == many_lines.asked(case, demo_tokenizer)
    assert all(16 <= len(ids) <= 40 for ids in prompts) and len({tuple(ids) for ids in prompts}) == 12
    assert all(16 <= limit <= 30 for limit in limits) and len(set(limits)) > 3
    assert many_lines.asked(ManyCase("demo", "fp32", prompts=12, seed=1), demo_tokenizer)[1] != limits


def test_the_three_are_measured_and_judged():
    line = many_lines.CPU[0]
    case = ManyCase("demo", "fp32", prompts=6, batch_size=3, prompt_length=24, new_tokens=18, runs=1, by_limit=True)
    measured = line.measure(case, "cpu")
    assert judge(line.asked, measured)[1].keys() == {"times_vanilla", "times_transformers"}
    assert measured.checks == [("fp32", "exact")] * 6
    assert measured.figures["transformers_equal_to_vanilla"] == 1
    assert measured.figures.keys() >= {"times_vanilla_by_limit", "ours_tok_per_s", "transformers_tok_per_s"}
    assert all(len(seconds) == 1 for seconds in measured.samples["total_s"].values())
    json.dumps(measured.samples, allow_nan=False)


def test_settings_are_what_the_text_depends_on():
    first = many.settings(many.plan({"dtype": "fp32"}, 2, 5))
    assert first == many.settings(many.plan({"dtype": "fp32"}, 9, 5))
    for other in ({"dtype": "bf16"}, {"dtype": "fp32", "cache_k": "q8_0"}, {"dtype": "fp32", "seed": 3}):
        assert many.settings(many.plan(other, 2, 5)) != first
