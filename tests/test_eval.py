"""python -m fastllama.lab eval: what it prints and keeps, and what it refuses."""

import copy
import json

import pytest

from fastllama.lab import __main__ as command_line
from fastllama.lab.quality import evaluation, quality, score_file
from fastllama.lab.records import digest, readme
from tests.places import places, put


@pytest.fixture
def lab(capsys):
    """Run the command; gives (exit code, standard output, standard error)."""

    def run(*arguments):
        try:
            code = command_line.main(["eval", *map(str, arguments)])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


SMALL = ("--tokens", 400, "--window", 128)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """The demo in three dtypes."""
    file = tmp_path_factory.mktemp("scores") / "scores.jsonl"
    words = [*map(str, SMALL), "--dtype", "fp32,bf16", "--json", str(file)]
    assert command_line.main(["eval", *words]) == 0
    return score_file.read(file)


def test_fp32_costs_nothing_and_bf16_a_little(lines):
    exact, half = (line["score"] for line in lines)
    assert [line["dtype"] for line in lines] == ["fp32", "bf16"]
    assert exact["positions"] == half["positions"] == 400
    assert exact["mean_kl"] < 1e-6 and exact["top1_agreement"] == 1.0
    assert (
        exact["perplexity"] == pytest.approx(exact["reference_perplexity"], rel=1e-4) and 10 < exact["perplexity"] < 90
    )
    assert 1e-6 < half["mean_kl"] < 0.01 and half["p99_kl"] > half["mean_kl"] and 0.9 < half["top1_agreement"] <= 1.0
    assert half["reference_perplexity"] == exact["reference_perplexity"]
    assert lines[0]["greedy"] == {
        "prompts": 4,
        "prompt_length": 64,
        "new_tokens": 64,
        "same": 4,
        "first_divergence": None,
    }
    for line in lines:
        assert line["path"].startswith("preallocated") and line["against"] == "fp32" and line["reserved_bytes"] > 0
        assert line["text"]["tokens"] == 400 and line["text"]["window"] == 128
    assert lines[0]["command"] == (
        "python -m fastllama.lab eval --model demo --against fp32 --dtype fp32 --tokens 400 --window 128"
    )


def test_the_perplexity_is_vanillas_own(lines):
    import torch
    import transformers

    from fastllama import demo
    from fastllama.lab.measuring import checkpoint
    from fastllama.lab.quality import windows

    found = checkpoint.find("demo", torch.float32)
    model = transformers.LlamaForCausalLM.from_pretrained(demo.resolve("demo", torch.float32), dtype=torch.float32)
    text = windows.text(checkpoint.tokenizer(found), 400, 128)
    total = 0.0
    for window in text.windows:
        with torch.no_grad():
            logits = model.eval()(window.ids[None]).logits[0, window.first - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, window.targets, reduction="sum").item()
    assert lines[0]["score"]["reference_perplexity"] == pytest.approx(torch.tensor(total / 400).exp().item(), rel=1e-4)


def test_several_subjects_share_the_reference_and_a_file_is_scored(lab, tmp_path, monkeypatch):
    made = []
    right = quality.make_reference
    monkeypatch.setattr(quality, "make_reference", lambda *rest: made.append(1) or right(*rest))
    text, file = tmp_path / "own.txt", tmp_path / "scores.jsonl"
    text.write_text("def main():\n    return 1\n" * 3)
    words = ("--file", text, "--window", 32, "--compile", "no", "--json", file)
    code, out, _ = lab(*words, "--subject", "bucket=32", "--subject", "bucket=64,fuse=no", "--against", "ours")
    kept = score_file.read(file)
    assert code == 0 and len(kept) == 2 and len(made) == 1
    assert "against ours without switches" in out and "own.txt" in out
    assert [line["switches"]["fuse"] for line in kept] == ["all", "no"] and kept[0]["text"]["name"] == "own.txt"
    assert str(tmp_path) not in json.dumps(kept)
    assert all(line["score"]["mean_kl"] < 1e-6 and line["greedy"]["prompt_length"] <= 64 for line in kept)
    assert lab(*words, "--bucket", 128)[0] == 0 and len(score_file.read(file)) == 3  # lines are added


def test_a_compiled_step_takes_one_token():
    for compile, tokens in (("no", 16), ("native", 16), ("static", 1), ("dynamic", 1)):
        assert evaluation.Subject({"compile": compile, "dtype": "fp32"}).step_tokens == tokens


def test_subjects_are_the_product_of_lists_and_each_single_one():
    made = evaluation.subjects({"dtype": ["fp32,bf16"], "bucket": ["32", "64"]}, ["fuse=no", "fuse=qkv,compile=no"])
    assert len(made) == 8 and made[0].name == "dtype=fp32,bucket=32,fuse=no"
    assert made[1].switches == {"bucket": 32, "fuse": "qkv", "compile": "no"}
    assert [one.name for one in evaluation.subjects({}, [])] == ["ours"]
    assert [one.values for one in evaluation.subjects({"weights": ["none,int8,int8"]}, [])] == [
        {"weights": None},
        {"weights": "int8"},
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--weights", "int3"), "weights='int3' is not allowed; allowed: None, int8"),
        (("-ctk", "q9_9"), "cache_k='q9_9' is not allowed"),
        (("--dtype", "int8"), "dtype='int8' is not allowed"),
        (("--weights", ","), "weights has no value"),
        (("--window", 1), "--window 1 is not allowed: demo takes 2 to 4096 positions"),
        (("--window", 5000), "--window 5000 is not allowed"),
        (("--tokens", 1), "the held-out text has 102198 tokens: a score takes 2 to as many, not 1"),
        (("--model", "random:llama-160m"), "random weights, which say nothing about quality"),
        (("--model", "/nowhere"), "there is no model folder /nowhere"),
        (("--file", "/nowhere.txt"), "there is no file /nowhere.txt"),
        (("--against", "ours", "--dtype", "fp32,bf16"), "--against ours takes one --dtype"),
        (("--subject", "fast"), "--subject 'fast' is not name=value"),
        (("--subject", "speed=1"), "'speed' is no switch of a subject"),
        (("--subject", "bucket=32,bucket=64"), "gives bucket twice"),
        (("--bucket", 32, "--subject", "bucket=64"), "bucket is given both as a flag and in --subject"),
        (("--compile", "native", "--fuse", "no"), "cannot be honoured"),
        (("--device", "nonsense"), "device 'nonsense' cannot be used"),
        (("--json", "/nowhere/a.jsonl"), "there is no folder /nowhere"),
    ],
)
def test_bad_input_is_one_sentence(lab, words, message):
    code, out, error = lab(*words)
    assert code == 2 and out == "" and error.startswith("error: ") and message in error
    assert len(error.splitlines()) == 1


def test_a_file_that_is_too_short_is_refused(lab, tmp_path):
    for content, message in ((b"", "has 0 tokens, and a score needs at least 2"), (b"\xff\xfe", "is not UTF-8 text")):
        (tmp_path / "x.txt").write_bytes(content)
        code, _, error = lab("--file", tmp_path / "x.txt")
        assert code == 2 and message in error


def test_a_model_that_is_no_llama_is_refused(lab, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    code, _, error = lab("--model", tmp_path)
    assert code == 2 and "gpt2 checkpoint, and only Llama runs here" in error


def test_a_reference_that_does_not_fit_is_one_sentence(lab, monkeypatch):
    monkeypatch.setattr(quality, "available_bytes", lambda device: 10**6)
    code, _, error = lab(*SMALL)
    assert code == 2 and error.startswith("error: the reference takes") and "score fewer tokens" in error


# what is kept


def test_a_line_is_read_only_as_it_was_written(lines, tmp_path):
    whole = lines[0]
    for path in places(whole):
        made = copy.deepcopy(whole)
        put(made, path, "another")
        with pytest.raises(ValueError, match="the line: "):
            score_file.check_line(made, "the line")
    file = tmp_path / "scores.jsonl"
    file.write_text(json.dumps(whole) + "\n" + json.dumps(whole)[:-9] + "\n")
    with pytest.raises(ValueError, match=r"scores\.jsonl line 2: not valid JSON"):
        score_file.read(file)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("schema",), 2, "schema 1"),
        (("greedy", "same"), 3, "greedy.same"),
        (("greedy", "first_divergence"), {"row": 4, "position": 0, "margin": None}, "greedy"),
        (("score", "top1_agreement"), 1.5, "score.top1_agreement"),
        (("text", "tokens"), 0, "text.tokens"),
        (("against",), "fp8", "against"),
        (("added",), 1, "added is not one that the schema knows"),
        (("switch_defaults", "other"), 1, "switch_defaults"),
    ],
)
def test_a_line_that_contradicts_itself_is_refused_though_it_is_sealed(lines, path, value, named):
    made = copy.deepcopy(lines[0])
    put(made, path, value)
    with pytest.raises(ValueError, match=named):
        score_file.check_line(digest.seal(made), "the line")


def test_kept_scores_are_a_table_in_readme(lines, tmp_path):
    folder = tmp_path / score_file.FOLDER
    folder.mkdir(parents=True)
    for line in lines:
        score_file.append(folder / "demo.jsonl", line)
    text = readme.quality([], tmp_path)
    assert "[demo](tb_logs/quality/demo.jsonl): demo on cpu against vanilla transformers in fp32" in text
    assert text.count("\n| ") == 4 and "| bf16 |" in text and "| fp32 |" in text
