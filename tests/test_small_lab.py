"""The laboratory with weights of few bits: ours is loaded small, vanilla as floats beside it, bytes are those held."""

import pytest
import torch

from fastllama import FastConfig
from fastllama.lab.measuring import ceiling, checkpoint, contestant, measure
from fastllama.lab.memory import memory, peak
from fastllama.lab.points.point import Point
from fastllama.lab.records import schema
from fastllama.lab.sweeping import estimate
from fastllama.lab.tracing.parts import Shape, shape_of
from fastllama.model.small_linear import SmallLinear, held_format, small_tensors
from tests import command, small
from tests.test_measure import a_point
from tests.tiny import GREEDY, generate, prompt

CPU = torch.device("cpu")
SMALL = ["--dtype", "fp32", "--device", "cpu", "--prompt-length", "12", "--new-tokens", "4", "--runs", "1"]


def small_point(model, weights="int8", **changes) -> Point:
    return a_point(model, switches={"weights": weights}, **changes)


def bytes_held(model) -> int:
    tensors = (*model.parameters(), *small_tensors(model))
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


@pytest.mark.parametrize("weights", ["int8", "int4-g64"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_bytes_of_a_configuration_are_those_of_the_loaded_model(weights, tied, tmp_path):
    folder = small.write(tmp_path, tie_word_embeddings=tied, attention_bias=True)
    found = checkpoint.find(folder, torch.float32)
    ours, _ = checkpoint.load(
        found, type(small.load(folder, weights)), torch.float32, CPU, fast=FastConfig(weights=weights)
    )
    assert found.weight_bytes(torch.float32, weights) == bytes_held(ours)
    assert found.weight_bytes(torch.bfloat16, None) == 2 * found.parameter_count


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_step_reads_the_small_bytes(tied, tmp_path):
    folder = small.write(tmp_path, tie_word_embeddings=tied)
    ours = small.load(folder, "int8")
    generate(ours, prompt("one"), max_new_tokens=2, **GREEDY)
    table = 0 if tied else ours.model.embed_tokens.weight.nbytes
    cache = 2 * (2 * 2 * 16) * 4 * (24 + 6 // 2)
    assert ceiling.step_bytes(ours, [24], 6) == bytes_held(ours) - table + cache


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_parts_of_a_pass_add_up_to_its_bytes(tied, weights, tmp_path):
    folder = small.write(tmp_path, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    ours = small.load(folder, weights)
    generate(ours, prompt("one"), max_new_tokens=2, **GREEDY)
    shape = shape_of(contestant.Contestant("ours", ours), [24], 6)
    assert sum(shape.weight_bytes.values()) == ceiling.step_bytes(ours, [0], 0)
    floats = Shape(shape.config, 4, (24,), 6, shape.separate)
    assert shape.prefill_flops() == floats.prefill_flops()
    assert shape.weight_bytes.keys() == floats.weight_bytes.keys()
    small_parts = {part for part, nbytes in shape.weight_bytes.items() if nbytes < floats.weight_bytes[part] / 2}
    assert small_parts == {"qkv", "o", "gate_up", "down", "head"}


def test_contestants_hold_what_they_multiply(tiny):
    point = small_point(tiny)
    found = checkpoint.find(tiny, torch.float32)
    ours, vanilla = contestant.load_all(point, found, 2)
    assert held_format(ours.model) == "int8" and not small_tensors(vanilla.model)
    assert vanilla.load_s is not None
    shared = contestant.load_all(a_point(tiny), found, 2)
    assert shared[1].load_s is None


def test_a_point_is_measured_and_its_bytes_are_ours(tiny, light):
    record = measure.measure(small_point(tiny))
    schema.check_point(record, "the point")
    assert "weights int8" in record["path"] and record["switches"]["weights"] == "int8"
    assert record["step_bytes"] < measure.measure(a_point(tiny))["step_bytes"] / 2
    assert record["reference_hash"] == measure.measure(a_point(tiny))["reference_hash"]


@pytest.mark.usefixtures("forked")
def test_peaks_are_of_the_small_model(tiny):
    assert memory.peaks(small_point(tiny), "ours").max_mem_mb > 20
    ours, vanilla = (
        peak.predict(small_point("inflated:tinyllama-1.1b", dtype="bf16"), name) for name in ("ours", "vanilla")
    )
    assert ours.weights == pytest.approx(vanilla.weights * 0.53, rel=0.03)
    int4 = peak.predict(small_point("inflated:tinyllama-1.1b", "int4", dtype="bf16"), "ours")
    assert int4.weights == pytest.approx(vanilla.weights * 0.33, rel=0.05)


def test_estimates_follow_the_bytes():
    rates = estimate.Rates(1e9, {"bf16": 1e15})
    points = [maker("inflated:tinyllama-1.1b", dtype="bf16") for maker in (a_point, small_point)]
    floats, few = (estimate.seconds(point, rates) for point in points)
    assert few < floats


def test_both_copies_must_fit(tiny, monkeypatch):
    point = small_point("inflated:tinyllama-1.1b", dtype="bf16")
    found = checkpoint.outline(point.model, point.torch_dtype)
    floats, few = found.weight_bytes(torch.bfloat16, None), found.weight_bytes(torch.bfloat16, "int8")
    monkeypatch.setattr(checkpoint, "available_bytes", lambda device: floats + few // 2)
    with pytest.raises(MemoryError, match=f"takes {(floats + few) / 1e9:.1f}"):
        checkpoint.require_room(found, point)
    checkpoint.require_room(found, a_point("inflated:tinyllama-1.1b", dtype="bf16"))
    needed = peak.fit(point).needed
    assert needed >= floats + few


def test_a_small_checkpoint_has_no_vanilla_to_be_compared_with(tmp_path):
    small.load(small.write(tmp_path / "float"), "int4").save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"holds its weights as int4-g32.*--weights int4-g32"):
        checkpoint.find(str(tmp_path / "small"), torch.float32)


# the command line


@pytest.mark.usefixtures("light", "logs")
def test_run_llama_takes_weights(tiny, capsys):
    assert command.run("--model", tiny, "--preallocate", "--weights", "int8", *SMALL) == 0
    assert "int8" in capsys.readouterr().out


@pytest.mark.usefixtures("light", "logs")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--weights", "int8"], "--weights needs --preallocate"),
        (["--preallocate", "--weights", "int3"], "weights='int3' is not allowed; allowed: None, int8, int4"),
        (["--preallocate", "--weights", "int4"], "has 48 columns, no multiple of 32"),
        (["--preallocate", "--weights", "float8"], "weights='float8' cannot be honoured: it is for GPUs"),
    ],
)
def test_what_cannot_be_is_one_sentence(words, says, tiny, capsys):
    assert command.run("--model", tiny, *words, *SMALL) == 2
    assert says in capsys.readouterr().err


def test_small_modules_say_what_they_are(tmp_path):
    ours = small.load(small.write(tmp_path), "int4")
    assert repr(ours.model.layers[0].mlp.up_proj) == "SmallLinear(64, 128, int4-g32)"
    assert isinstance(ours.lm_head, SmallLinear)
