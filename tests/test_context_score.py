"""The score of a shifted context: against counts and passes made by hand."""

import pytest
import torch
import torch.nn.functional as F

from fastllama.lab import __main__ as lab
from fastllama.lab.quality import context_score
from fastllama.lab.records import schema2
from tests.plain_context import shifted, turned
from tests.tiny import VOCAB, pair


def test_the_score_is_that_of_passes_over_what_is_left():
    vanilla, ours = pair()
    ours.preallocate(1, 16, context_shift=True, keep=3)
    ids = torch.randint(3, VOCAB, (60,), generator=torch.Generator().manual_seed(4)).tolist()
    found = context_score.score(ours, vanilla, ids, 1)
    _, logits, row = shifted(vanilla, ids[:8], 52, 16, 3, forced=ids[8:])
    same, divergence, held = [], [], ids[:8]
    for index in range(8, 59):
        if len(held) == 16:
            held = held[:3] + held[9:]
        held = [*held, ids[index]]
        if index < 16:
            continue
        with torch.no_grad():
            fresh = vanilla(torch.tensor([held])).logits[0, -1].log_softmax(-1)
        moved = logits[index - 7].log_softmax(-1)
        same.append(bool(fresh.argmax() == moved.argmax()))
        divergence.append(F.kl_div(moved, fresh, log_target=True, reduction="sum").item())
    assert found.shifts == row.shifts == 8 and found.shifted.positions == len(same) == 43
    assert found.shifted.top1_agreement == pytest.approx(sum(same) / len(same))
    assert found.shifted.mean_kl == pytest.approx(sum(divergence) / len(divergence), rel=1e-3)
    assert found.shifted.mean_kl > 1e-3  # what was dropped was seen
    assert 1e-9 < found.rotation_error < 1e-6


def test_what_turning_rounds_grows_with_what_stores_keys():
    keys = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(0))
    inv_freq = 10000 ** (-torch.arange(16) / 16)
    plain = context_score.rotation_error(keys, inv_freq, 100, None)
    half = context_score.rotation_error(keys.bfloat16(), inv_freq, 100, None)
    errors = [plain, half, context_score.rotation_error(keys, inv_freq, 100, "q4_0")]
    assert errors == sorted(errors) and errors[0] < 1e-6 and errors[2] > 0.01
    there = turned(turned(keys.bfloat16(), [100] * 20, inv_freq), [-100] * 20, inv_freq).double()
    expected = (there - keys.bfloat16().double()).norm() / keys.bfloat16().double().norm()
    assert half == pytest.approx(expected.item(), rel=0.02)


def test_the_command_says_what_it_found(capsys):
    assert lab.main(["context", "--tokens", "80", "--cache-length", "32", "--every", "4", "--keep", "2"]) == 0
    out = capsys.readouterr().out
    assert "top-1 agreement" in out and "32 positions, keep 2" in out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--tokens", "30", "--cache-length", "32"], "a text of 31 tokens does not fill a cache of 32 positions"),
        (["--every", "0"], "--every 0 is below 1"),
        (["--keep", "-5"], "keep=-5 is not allowed"),
        (["--model", "random:llama-160m"], "random weights, which say nothing about quality"),
        (["-ctk", "q3"], "cache_k='q3' is not allowed"),
    ],
    ids=str,
)
def test_what_cannot_be_scored_is_one_sentence(flags, sentence, capsys):
    assert lab.main(["context", *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_a_measured_point_says_how_often_it_shifted(light, logs, tmp_path, tiny):
    import json

    import run_llama

    flags = ["--model", str(tiny), "--preallocate", "--context-shift", "--keep", "-1", "--cache-length", "24", "--runs"]
    flags += ["1", "--warmup", "0", "--prompt-length", "12", "--new-tokens", "40", "--dtype", "fp32", "--device", "cpu"]
    assert run_llama.main([*flags, "--json", str(tmp_path / "x.jsonl")]) == 0
    made = json.loads((tmp_path / "x.jsonl").read_text())
    assert made["parity"] == "lossy" and "python -m fastllama.lab context" in made["not_scored"]
    assert made["path"].endswith("context shifted 5 times") and made["cache_length"] == 24
    assert "--context-shift --keep -1 " in made["command"] and "True" not in made["command"]
    schema2.check_point(made)


def test_eval_does_not_score_what_never_shifts(capsys):
    assert lab.main(["eval", "--context-shift", "true"]) == 2
    assert "python -m fastllama.lab context scores it" in capsys.readouterr().err
