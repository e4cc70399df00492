"""python -m fastllama.lab plan: what fits, in which order, and what is refused."""

import json
import re

import pytest
import torch

from fastllama import demo
from fastllama.demo import names
from fastllama.lab import __main__ as lab
from fastllama.lab.measuring import checkpoint
from fastllama.lab.memory import peak, planner
from fastllama.lab.quality import known_quality, score_file
from fastllama.lab.quality.known_quality import Known

GPU = ["plan", "--model", "random:llama-3.1-8b", "--device", "cuda", "--context", "131072", "--bandwidth", "2000"]
NOTHING = Known([])


@pytest.fixture(autouse=True)
def fixed(monkeypatch):
    """A base that is the same in every process, no device but a CPU, and nothing that is built."""
    monkeypatch.setattr(peak, "base_bytes", lambda: 400_000_000)

    def check(name):
        if name != "cpu":
            raise ValueError(f"device {name!r} cannot be used")
        return name

    monkeypatch.setattr(checkpoint, "check_device", check)
    monkeypatch.setattr(demo.names, "publish", lambda *given: pytest.fail("built"))
    monkeypatch.setattr(planner.Ceiling, "measure", lambda ceiling: 20.0)


def asked(model="random:llama-3.1-8b", device="cuda", rows=1, context=131072, memory=24 * 10**9) -> planner.Asked:
    config = names.configuration(model, torch.bfloat16)
    return planner.Asked(model, config, torch.bfloat16, torch.device(device), rows, context, memory, 0)


def made(of: planner.Asked, weights=(None, "int8", "int4-g64"), caches=tuple(planner._CACHES), known=NOTHING):
    found, refused = planner.combinations(of, list(weights), list(caches), known)
    assert refused == []
    return found


def test_sizes_are_the_specifications():
    by_name = {(one.weights, one.shape.cache_k, one.shape.cache_v): one for one in made(asked())}
    assert by_name[None, None, None].weight.total == pytest.approx(16.06e9, rel=1e-3)
    assert by_name[None, None, None].shape.nbytes == pytest.approx(17.18e9, rel=1e-3)
    # int4 weights and an int8 cache take at most 15.5 GB, and with a q4_0 cache about 11.
    assert by_name["int4-g64", "int8", "int8"].nbytes <= 15.5e9
    assert by_name["int4-g64", "q4_0", "q4_0"].nbytes == pytest.approx(11e9, rel=0.05)
    for one in by_name.values():
        assert one.nbytes == one.weight.total + one.shape.nbytes + one.tables + one.passing + one.base


def test_what_fits_is_all_that_does_the_most_exact_first():
    everything = made(asked())
    fit, best = planner.fitting(everything, 24 * 10**9)
    assert {one.name for one in fit} == {one.name for one in everything if one.nbytes <= 24 * 10**9}
    assert best is fit[0] and (best.weights, best.shape.cache_k, best.shape.cache_v) == ("int8", "q8_0", "q8_0")
    assert [one.exactness for one in fit] == sorted((one.exactness for one in fit), reverse=True)
    assert planner.fitting(everything, 80 * 10**9)[1].name == "weights none, keys none, values none"
    assert planner.fitting(everything, 10**9) == ([], None)
    tight = min(one.nbytes for one in everything)
    assert len(planner.fitting(everything, tight)[0]) >= 1 and planner.fitting(everything, tight - 1)[0] == []


def test_tokens_a_second_are_bandwidth_over_the_bytes_of_a_step():
    (one,) = made(asked(rows=4, context=1000), [None], [(None, None)])
    step = 15.01e9 + 4 * 1000 * 131072  # without the embedding; 32 layers of 2 x 8 x 128 halves a position
    assert one.tok_per_s(2e12) == pytest.approx(4 * 2e12 / step, rel=0.01)
    faster = made(asked(rows=4, context=1000), ["int8"], [("q4_0", "q4_0")])[0]
    assert faster.tok_per_s(2e12) > 1.8 * one.tok_per_s(2e12)


def test_rows_and_context_grow_the_cache():
    one, two = (made(asked(rows=rows, context=4096), [None], [(None, None)])[0].shape.nbytes for rows in (1, 8))
    assert two == 8 * one


def test_quality_is_looked_up_by_model_and_switches():
    lines = [
        {"model": model, "switches": {"weights": weights, "cache_k": None, "cache_v": None, "bucket": 256},
         "score": {"perplexity": perplexity, "reference_perplexity": 10.0, "mean_kl": 0.0125}}
        for model, weights, perplexity in (("demo", "int8", 10.1), ("own", "int8", 10.5), ("demo", "int4-g64", 11.0))
    ]  # fmt: skip
    known = Known(lines)
    int8, int4 = ({"weights": name, "cache_k": None, "cache_v": None} for name in ("int8", "int4-g64"))
    assert known_quality.words(known.of("own", int8)) == "own: +5.00% perplexity, KL 0.013"
    assert known_quality.words(known.of("random:llama-2-7b", int8)) == "demo: +1.00% perplexity, KL 0.013"
    assert known.of("own", int4).perplexity == 11.0
    assert known_quality.words(known.of("own", int8 | {"cache_k": "q8_0"})) == "not measured"


def test_a_line_that_is_no_score_is_one_sentence(tmp_path, capsys):
    folder = tmp_path / score_file.FOLDER
    folder.mkdir(parents=True)
    (folder / "scores.jsonl").write_text(json.dumps({"model": "demo"}) + "\n")
    assert lab.main(["--root", str(tmp_path), *GPU, "--memory", "24GB"]) == 2
    err = capsys.readouterr().err
    assert "scores.jsonl line 1: " in err and err.count("\n") == 1


def test_the_command_works_from_a_configuration_alone(tmp_path, capsys):
    assert lab.main(["--root", str(tmp_path), *GPU, "--memory", "24GB"]) == 0
    out = capsys.readouterr().out
    starred = [line.split() for line in out.splitlines() if line.strip().startswith("*")]
    assert starred[0][:5] == ["*", "int8", "q8_0", "8.56", "9.13"]
    assert "not measured" in " ".join(out.split()) and "2,000.0 GB/s over the bytes of a step" in out
    assert re.search(r"\d+ of \d+ combinations fit; the smallest of all \(.*\) needs", " ".join(out.split()))


def test_without_the_device_or_its_bandwidth_there_is_no_speed(tmp_path, capsys):
    argv = [word for word in GPU if word not in ("--bandwidth", "2000")]
    assert lab.main(["--root", str(tmp_path), *argv, "--memory", "16GiB"]) == 0
    assert "tok/s needs --bandwidth" in capsys.readouterr().out


def test_on_a_cpu_the_process_and_its_bandwidth_count(tmp_path, capsys):
    argv = ["--root", str(tmp_path), "plan", "--model", "inflated:llama-160m", "--device", "cpu", "--dtype", "bf16"]
    assert lab.main([*argv, "--memory", "2GB", "--context", "8192", "-ctk", "none,int8", "-ctv", "int8"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "tok/s: 20.0 GB/s" in out and "of 12 combinations fit" in out
    assert "8,192 positions are more than the 4,096 that the model was made for" in out


def test_where_nothing_fits_the_exit_code_says_so(tmp_path, capsys):
    assert lab.main(["--root", str(tmp_path), *GPU, "--memory", "5GB"]) == 1
    assert "0 of" in capsys.readouterr().out


def test_what_a_model_cannot_have_is_left_out_with_the_reason(tmp_path, capsys):
    argv = ["--root", str(tmp_path), "plan", "--device", "cpu", "--dtype", "fp32", "--memory", "10GB"]
    assert lab.main(argv) == 0
    assert "704 columns, no multiple of 256" in " ".join(capsys.readouterr().out.split())
    assert lab.main([*argv, "--weights", "int4-g256"]) == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--memory", "lots"], "--memory='lots' is not allowed; allowed: a size such as 24GB, 16GiB, 500MB"),
        (["--memory", "0GB"], "--memory='0GB' is not allowed"),
        (["--memory", "1GB", "--context", "0"], "--context '0' is not allowed; allowed: an integer >= 1"),
        (["--memory", "1GB", "--context", "8k"], "--context '8k' is not allowed"),
        (["--memory", "1GB", "--batch-size", "-1"], "--batch-size '-1' is not allowed"),
        (["--memory", "1GB", "--bandwidth", "fast"], "--bandwidth 'fast' is not allowed; allowed: GB/s above 0"),
        (["--memory", "1GB", "--device", "abacus"], "--device 'abacus' is no device"),
        (["--memory", "1GB", "--weights", "int3"], "weights='int3' is not allowed"),
        (["--memory", "1GB", "--cache-k", "q9"], "cache_k='q9' is not allowed"),
        (["--memory", "1GB", "--model", "random:none"], "unknown model random:none"),
        (["--memory", "1GB", "--model", "/nowhere/at-all"], "there is no model folder"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, argv, words):
    assert lab.main(["--root", str(tmp_path), "plan", "--dtype", "bf16", *argv]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
