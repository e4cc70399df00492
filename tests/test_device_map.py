"""device_map: on one device the fast path runs; where accelerate moves weights, the parent's does, and says so."""

import logging

import pytest
import torch
import transformers

import fastllama
from tests import tiny

NEW = {"max_new_tokens": 8, **tiny.GREEDY}
LAST = ("model.norm", "model.rotary_emb", "lm_head")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mapped") / "model"
    tiny.pair()[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    vanilla = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    return tiny.generate(vanilla, tiny.prompt("padded"), **NEW)


def split(first, second) -> dict:
    """A layer here, a layer there."""
    places = {"model.embed_tokens": first, "model.layers.0": first, "model.layers.1": second}
    return places | dict.fromkeys(LAST, first)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "cpu", split("cpu", "cpu")])
def test_on_one_device_the_fast_path_runs(folder, expected, device_map):
    model = fastllama.LlamaForCausalLM.from_pretrained(folder, device_map=device_map).eval()
    assert torch.equal(tiny.generate(model, tiny.prompt("padded"), **NEW), expected)
    assert model.path.startswith("preallocated on first use"), model.path
    model.preallocate(3, 32)
    assert torch.equal(tiny.generate(model, tiny.prompt("padded"), **NEW), expected)


@pytest.mark.parametrize(
    "first, second, reason",
    [
        ("cpu", "disk", "the model is spread over several devices"),
        ("disk", "disk", "a module's forward was replaced"),  # by accelerate's, which fetches the weights
    ],
)
def test_what_is_offloaded_runs_the_parents_code_and_says_so_once(
    folder, expected, tmp_path, caplog, first, second, reason
):
    how = {"device_map": split(first, second), "offload_folder": tmp_path}
    model = fastllama.LlamaForCausalLM.from_pretrained(folder, **how).eval()
    transformers.utils.logging.get_logger("fastllama").warning_once.__func__.cache_clear()
    with caplog.at_level(logging.WARNING, "fastllama"):
        for _ in range(2):
            assert torch.equal(tiny.generate(model, tiny.prompt("padded"), **NEW), expected)
            assert model.path == f"parent: {reason}"
    said = [record.message for record in caplog.records if record.name == "fastllama"]
    assert said == [f"fastllama: generate runs transformers' own code: {reason}"]
    with pytest.raises(ValueError, match=f"preallocate cannot be honoured: {reason}"):
        model.preallocate(3, 32)
    with pytest.raises(ValueError, match=f"generate_many cannot run: {reason}"):
        model.generate_many([[5, 9]], **NEW)


def test_layers_on_two_devices_run_the_parents_code(folder, expected):
    """As far as a CPU allows: what accelerate leaves behind where it dispatched layers to two accelerators."""
    model = fastllama.LlamaForCausalLM.from_pretrained(folder).eval()
    model.preallocate(3, 32)
    model.hf_device_map = split(0, 1)
    assert torch.equal(tiny.generate(model, tiny.prompt("padded"), **NEW), expected)
    assert model.path == "parent: the model is spread over several devices"
