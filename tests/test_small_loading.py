"""Loading quantises tensor by tensor; a small checkpoint loads as it is; what cannot be held is refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaForCausalLM as Vanilla
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import fastllama
from fastllama import FastConfig
from fastllama.demo.names import resolve
from fastllama.kernels.small_product import dequantise, quantise
from fastllama.kernels.small_weights import canonical
from fastllama.model.small_linear import SmallLinear
from tests import small
from tests.tiny import GREEDY, generate, prompt

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.write(tmp_path_factory.mktemp("float"), attention_bias=True)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return small.write(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def same(one, other) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name].float(), theirs[name].float())
        for name in ours
    )


def edited(source: str, target: Path, edit) -> str:
    """A copy of a checkpoint whose tensors `edit` has changed."""
    tensors = load_file(Path(source) / "model.safetensors")
    edit(tensors)
    target.mkdir()
    for name in ("config.json", "generation_config.json"):
        (target / name).write_text((Path(source) / name).read_text())
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return str(target)


# quantised while loading


@pytest.mark.parametrize("weights", ["int8", "int4", "int4-g64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_matrix_is_what_quantise_makes_of_the_checkpoints(weights, dtype, folder):
    ours, notes = small.load(folder, weights, dtype=dtype, output_loading_info=True)
    assert not any(notes.values())
    floats = Vanilla.from_pretrained(folder, dtype=dtype)
    for name, module in floats.named_modules():
        if isinstance(module, torch.nn.Linear):
            held = ours.get_submodule(name)
            assert type(held) is SmallLinear
            assert held.format == ("int8" if name == "lm_head" else canonical(weights))
            quants, scales = quantise(module.weight.data, held.format)
            assert torch.equal(held.weight, quants) and torch.equal(held.weight_scale, scales)
            assert module.bias is None or torch.equal(held.bias, module.bias)
    for name, parameter in floats.named_parameters():
        if "norm" in name or "embed" in name:
            assert torch.equal(ours.get_parameter(name), parameter)
    assert not ours.training and ours.dtype == dtype


def test_every_argument_of_from_pretrained_still_works(folder, tmp_path):
    reference = small.load(folder, "int8")
    shards = small.write(tmp_path / "root" / "inner", shard="40KB", attention_bias=True)
    assert len(list(Path(shards).glob("*.safetensors"))) > 3
    assert same(small.load(shards, "int8"), reference)
    assert same(small.load(tmp_path / "root", "int8", subfolder="inner"), reference)
    for device_map in ("cpu", {"": "cpu"}, {"": torch.device("cpu")}):
        assert same(small.load(folder, "int8", device_map=device_map), reference)
    state = Vanilla.from_pretrained(folder).state_dict()
    config = transformers.LlamaConfig.from_pretrained(folder)
    assert same(small.load(None, "int8", state_dict=state, config=config), reference)
    torch.save(state, tmp_path / "pytorch_model.bin")
    config.save_pretrained(tmp_path)
    assert same(small.load(tmp_path, "int8", use_safetensors=False), reference)
    half = small.load(folder, "int8", torch_dtype="bfloat16", attn_implementation="eager")
    assert half.dtype == torch.bfloat16 and half.config._attn_implementation == "eager"


def test_auto_classes_pass_fast_on(folder):
    fastllama.register()
    try:
        ours = transformers.AutoModelForCausalLM.from_pretrained(folder, fast=FastConfig(weights="int8"))
    finally:
        fastllama.unregister()
    assert same(ours, small.load(folder, "int8"))


def test_a_checkpoint_of_a_tied_model_may_hold_the_matrix_under_either_name(tied, tmp_path):
    reference = small.load(tied, "int4")
    name = "model.embed_tokens.weight"
    other = edited(tied, tmp_path / "other", lambda t: t.update({"lm_head.weight": t.pop(name)}))
    both = edited(tied, tmp_path / "both", lambda t: t.update({"lm_head.weight": t[name].clone()}))
    for place in (other, both):
        ours, notes = small.load(place, "int4", output_loading_info=True)
        assert same(ours, reference) and not notes["missing_keys"]
    two = edited(tied, tmp_path / "two", lambda t: t.update({"lm_head.weight": t[name] + 1}))
    with pytest.raises(ValueError, match=r"two different matrices.*model.embed_tokens.weight.*tie_word_embeddings"):
        small.load(two, "int4")


def test_loading_leaves_transformers_as_it_was(folder):
    configs, quantizers = dict(AUTO_QUANTIZATION_CONFIG_MAPPING), dict(AUTO_QUANTIZER_MAPPING)
    small.load(folder, "int8")
    with pytest.raises(ValueError):
        small.load(folder, "int4-g256")
    assert configs == AUTO_QUANTIZATION_CONFIG_MAPPING and quantizers == AUTO_QUANTIZER_MAPPING
    assert "fastllama" not in configs


# saved and loaded again


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("shard", ["10GB", "60KB"])
@pytest.mark.parametrize("which", ["folder", "tied"])
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a call"])
def test_a_saved_model_loads_bit_for_bit_without_requantising(
    weights, shard, which, ran, request, tmp_path, monkeypatch
):
    ours = small.load(request.getfixturevalue(which), weights)
    if ran:  # then parts of a fused weight are views of one storage
        generate(ours, prompt("one"), max_new_tokens=2, **GREEDY)
    ours.save_pretrained(tmp_path, max_shard_size=shard)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["quantization_config"] == {"quant_method": "fastllama", "weights": canonical(weights)}
    assert written["architectures"] == ["LlamaForCausalLM"]
    monkeypatch.setattr("fastllama.model.small_loading.quantise", None)
    again, notes = fastllama.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert same(again, ours) and not any(notes.values())
    assert same(small.load(tmp_path, weights), ours)
    tokens = generate(ours, prompt("padded"), max_new_tokens=6, **GREEDY)
    assert torch.equal(generate(again, prompt("padded"), max_new_tokens=6, **GREEDY), tokens)
    again.save_pretrained(tmp_path / "twice")
    assert same(fastllama.LlamaForCausalLM.from_pretrained(tmp_path / "twice"), ours)


def test_a_small_checkpoint_takes_another_dtype(folder, tmp_path):
    ours = small.load(folder, "int8")
    ours.save_pretrained(tmp_path)
    half = fastllama.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.model.norm.weight.dtype == torch.bfloat16
    assert torch.equal(half.lm_head.weight_scale, ours.lm_head.weight_scale)
    with pytest.raises(ValueError, match=r"weights='int4-g32'.*the checkpoint holds int8"):
        small.load(tmp_path, "int4")


@pytest.mark.parametrize("which", ["folder", "tied"])
def test_vanilla_refuses_a_small_checkpoint_and_invents_nothing(which, request, tmp_path):
    small.load(request.getfixturevalue(which), "int8").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        Vanilla.from_pretrained(tmp_path)


def test_a_float_model_saves_as_it_did(folder, tmp_path):
    fastllama.LlamaForCausalLM.from_pretrained(folder, fast=FastConfig(bucket=32)).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert same(Vanilla.from_pretrained(tmp_path), Vanilla.from_pretrained(folder))


# what is refused


def test_a_users_own_quantization_config_is_the_parents_business(folder):
    seen = transformers.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match=r"either quantization_config or weights='int8'"):
        small.load(folder, "int8", quantization_config=seen)
    for cls in (Vanilla, fastllama.LlamaForCausalLM):  # without bitsandbytes, the parent's own complaint
        with pytest.raises(Exception, match="bitsandbytes") as fault:
            cls.from_pretrained(folder, quantization_config=seen)
        assert not isinstance(fault.value, ValueError)


@pytest.mark.parametrize("fast", ["int8", {"weights": "int8"}, 8])
def test_fast_is_a_config(fast, folder):
    with pytest.raises(ValueError, match=r"fast=.* is not allowed; allowed: None or a FastConfig"):
        fastllama.LlamaForCausalLM.from_pretrained(folder, fast=fast)


@pytest.mark.parametrize(("weights", "matrix"), [("int4-g128", "q_proj"), ("int4-g256", "q_proj")])
def test_a_group_that_does_not_divide_is_refused_before_any_weight_is_read(weights, matrix, folder, monkeypatch):
    monkeypatch.setattr("fastllama.model.small_loading.quantise", None)
    with pytest.raises(ValueError, match=rf"weights='{weights}'.*layers.0.self_attn.{matrix} has 64 columns"):
        small.load(folder, weights)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}])
def test_float8_is_refused_on_a_cpu(device_map, folder):
    with pytest.raises(
        ValueError, match=r"weights='float8' cannot be honoured: it is for GPUs, and the model goes to cpu"
    ):
        small.load(folder, "float8", device_map=device_map)


BAD = {
    "nan": ("model.layers.1.mlp.down_proj.weight", float("nan"), "NaN or infinities"),
    "inf": ("lm_head.weight", float("-inf"), "NaN or infinities"),
    "large": ("model.layers.0.self_attn.o_proj.weight", 1e6, "too large for int4's float16 scales"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", ["folder", "tied"])
def test_numbers_that_cannot_be_held_are_refused_by_the_tensors_name(bad, which, request, tmp_path):
    name, value, words = BAD[bad]
    if which == "tied" and bad == "inf":
        name = "model.embed_tokens.weight"
    place = edited(request.getfixturevalue(which), tmp_path / "bad", lambda t: t[name].view(-1)[7].fill_(value))
    with pytest.raises(ValueError, match=f"{name} cannot be held as .*: .*{words}"):
        small.load(place, "int4")


def test_a_matrix_of_another_shape_is_refused_by_name(folder, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    place = edited(folder, tmp_path / "bad", lambda t: t.update({name: t[name][:100].clone()}))
    with pytest.raises(ValueError, match=rf"{name} is \(100, 64\) in the checkpoint and not \(128, 64\)"):
        small.load(place, "int8")


def test_scales_that_are_no_numbers_are_refused_by_name(folder, tmp_path):
    small.load(folder, "int4").save_pretrained(tmp_path / "small")
    name = "model.layers.1.self_attn.k_proj.weight_scale"
    place = edited(tmp_path / "small", tmp_path / "bad", lambda t: t[name].view(-1)[3].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"{name} holds NaN"):
        fastllama.LlamaForCausalLM.from_pretrained(place)


def test_an_unknown_format_in_a_checkpoint_is_refused(folder, tmp_path):
    small.load(folder, "int8").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["weights"] = "int3"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"weights='int3' is not allowed; allowed: int8"):
        fastllama.LlamaForCausalLM.from_pretrained(tmp_path)


# rows of zeros, denormals, one large number


@pytest.mark.parametrize("weights", ["int8", "int4", "int4-g64", "float8"])
@pytest.mark.parametrize("number", [0.0, 1e-45, 1e-40, 1e-30, 3e-8, 1e-7, 1e-3, 4e5])
def test_rows_of_zeros_denormals_and_outliers(weights, number):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 128, generator=generator)
    weight[3] = 0
    weight[5] = weight[5].sign() * number
    weight[6, 70] = number
    quants, scales = quantise(weight, weights)
    back = dequantise(quants, scales, weights, 20, 128, torch.float32)
    assert back.isfinite().all() and not back[3].any()
    # A number is off by half a step of its row or group at most (int4: a whole one at its clipped end), and float16
    # scales of int4 lose what lies below their own smallest step.
    group = {"int8": 128, "float8": 128, "int4": 32, "int4-g64": 64}[weights]
    most = weight.view(20, -1, group).abs().amax(-1, keepdim=True)
    share, floor = {"int8": (0.51 / 127, 1e-43), "float8": (0.07, 1e-43)}.get(weights, (0.13, 6e-7))
    assert ((back - weight).view(20, -1, group).abs() <= share * most + floor).all()


# memory

_CHILD = """
import sys, threading, time, torch
from pathlib import Path
import fastllama
from fastllama import FastConfig
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
torch.ones(64, 64) @ torch.ones(64, 64)
before, highest, done = anonymous(), 0, False
def watch():
    global highest
    while not done:
        highest = max(highest, anonymous())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
model = fastllama.LlamaForCausalLM.from_pretrained(sys.argv[1], fast=FastConfig(weights=sys.argv[2]))
done = True
watcher.join()
held = sum(tensor.nbytes for tensor in model.state_dict().values())
print(highest - before, held)
"""


@pytest.mark.usefixtures("forked")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("random:llama-160m", "int8"),
        ("random:llama-160m", "int4"),
        pytest.param("random:tinyllama-1.1b", "int4", marks=pytest.mark.full),
    ],
)
def test_loading_takes_the_small_model_and_two_layers_at_most(model, weights):
    place = resolve(model, torch.float32)
    config = transformers.LlamaConfig.from_pretrained(place)
    with torch.device("meta"):
        layer = sum(parameter.nbytes for parameter in Vanilla(config).float().model.layers[0].parameters())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", _CHILD, place, weights]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    peak, held = map(int, done.stdout.split())
    assert peak <= held + 2 * layer, f"{peak / 1e6:.0f} MB for {held / 1e6:.0f} MB and layers of {layer / 1e6:.0f} MB"
