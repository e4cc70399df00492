"""Packed weights: held once while generate needs them, parameters again as soon as anybody asks."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import transformers
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LogitsProcessor, LogitsProcessorList

from fastllama.kernels import linear
from fastllama.kernels.linear import can_pack
from fastllama.model.released import is_released, logger
from tests.tiny import GREEDY, SAMPLED, VOCAB, generate, pair, prompt

NEW = 12


@pytest.fixture(autouse=True, scope="module")
def packs():
    if not can_pack(torch.zeros(4, 4)):
        pytest.skip("this torch packs nothing")


def released(model) -> set[str]:
    """Names of the modules whose weights are packed now."""
    return {name for name, module in model.named_modules() if is_released(module)}


def every(model) -> set[str]:
    """Names of the modules whose weights may be packed."""
    return {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}


def packed_pair(rows: int = 3, **changes):
    """(vanilla, ours), ours packed."""
    vanilla, ours = pair(**changes)
    ours.preallocate(rows, 64, compile="no", products="packed")
    assert released(ours)
    return vanilla, ours


def assert_same_text(vanilla, ours, inputs=None, **decoding):
    inputs = prompt("padded") if inputs is None else inputs
    decoding = {"max_new_tokens": NEW, **(decoding or GREEDY)}
    expected = generate(vanilla, inputs, **decoding)
    assert torch.equal(generate(ours, inputs, **decoding), expected)
    assert ours.path.startswith("preallocated")


def assert_same_values(found: dict, vanilla) -> None:
    expected = vanilla.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_generate_is_vanillas_and_leaves_the_weights_packed(rows, decoding):
    vanilla, ours = packed_pair(rows)
    inputs = {name: value[:rows] for name, value in prompt("padded").items()}
    weights = ours._engine.weights
    for _ in range(3):
        assert_same_text(vanilla, ours, inputs, **decoding)
        assert released(ours) == every(ours)
    assert ours._engine.weights is weights
    assert "products: 9 packed" in ours.path


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 32}], ids=str)
def test_other_shapes(changes):
    vanilla, ours = pair(**changes)
    with torch.no_grad():
        for name, parameter in vanilla.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    ours.load_state_dict(vanilla.state_dict())
    ours.preallocate(3, 64, products="packed")
    assert_same_text(vanilla, ours)
    assert released(ours) == every(ours)
    assert_same_values(ours.state_dict(), vanilla)


@pytest.mark.parametrize("fuse", ["all", "qkv", "no"])
def test_every_way_to_fuse(fuse):
    vanilla, ours = pair()
    ours.preallocate(3, 64, products="packed", fuse=fuse)
    assert_same_text(vanilla, ours)
    assert released(ours) == every(ours)
    assert_same_values(ours.state_dict(), vanilla)


def test_a_tied_head_stays_as_it_is():
    vanilla, ours = packed_pair(tie_word_embeddings=True)
    assert released(ours) == every(ours) - {"lm_head"}
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert released(ours)
    assert_same_text(vanilla, ours)
    assert_same_values(ours.state_dict(), vanilla)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_bf16_is_packed_and_comes_back_bit_for_bit():
    vanilla, ours = pair()
    vanilla.to(torch.bfloat16), ours.to(torch.bfloat16)
    if not can_pack(ours.lm_head.weight):
        pytest.skip("this CPU packs no bf16")
    ours.preallocate(3, 64, products="packed")
    generate(ours, prompt("padded"), max_new_tokens=4, **GREEDY)
    assert released(ours) == every(ours)
    assert_same_values(ours.state_dict(), vanilla)


def test_each_weight_is_held_once():
    _, ours = pair()
    generate(ours, prompt("padded"), max_new_tokens=2, **GREEDY)  # fused: the storages are the joint ones
    parameters = [ours.get_submodule(name).weight for name in every(ours)]
    storages = [StorageWeakRef(parameter.untyped_storage()) for parameter in parameters]
    parameters = [weakref.ref(parameter) for parameter in parameters]
    ours.preallocate(3, 64, products="packed")
    for _ in range(2):
        gc.collect()
        assert all(parameter() is None for parameter in parameters)
        assert all(storage.expired() for storage in storages)
        generate(ours, prompt("padded"), max_new_tokens=2, **GREEDY)


def test_packed_weights_go_when_parameters_are_back_and_when_the_model_goes():
    gc.collect()
    before = len(linear._packed)
    _, ours = packed_pair()
    assert len(linear._packed) == before + 9  # qkv, o, gate and up, down of two layers, and the head
    ours.state_dict()
    assert len(linear._packed) == before
    generate(ours, prompt("padded"), max_new_tokens=2, **GREEDY)
    assert len(linear._packed) == before + 9
    ours.free()
    assert len(linear._packed) == before
    ours.preallocate(1, 32, products="packed")
    del ours
    gc.collect()
    assert len(linear._packed) == before


# every way to ask


def _file(write, read):
    buffer = io.BytesIO()
    write(buffer)
    buffer.seek(0)
    return read(buffer)


def _saved(model, folder):
    model.save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder).state_dict()


def _looked_up(model, folder):
    return {f"{name}.weight": module.weight for name, module in model.named_modules() if "weight" in module._parameters}


ASKING = {
    "state_dict": lambda model, folder: model.state_dict(),
    "named_parameters": lambda model, folder: dict(model.named_parameters()),
    "module.weight": _looked_up,
    "one weight, then all": lambda model, folder: (model.lm_head.weight, model.state_dict())[-1],
    "deepcopy": lambda model, folder: copy.deepcopy(model).state_dict(),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)).state_dict(),
    "torch.save": lambda model, folder: _file(
        lambda file: torch.save(model, file), lambda file: torch.load(file, weights_only=False)
    ).state_dict(),
    "save_pretrained": _saved,
    "to": lambda model, folder: model.to("cpu").state_dict(),
    "free": lambda model, folder: (model.free(), model.state_dict())[-1],
    "double and back": lambda model, folder: model.double().float().state_dict(),
    "in inference mode": lambda model, folder: torch.inference_mode()(model.state_dict)(),
}


@pytest.mark.parametrize("how", ASKING)
def test_every_way_of_asking_brings_the_values_back(how, tmp_path):
    vanilla, ours = packed_pair()
    assert_same_text(vanilla, ours)
    names = [name for name, _ in vanilla.named_parameters()]
    assert_same_values(ASKING[how](ours, tmp_path), vanilla)
    assert not released(ours)
    assert [name for name, _ in ours.named_parameters()] == names
    assert all(type(parameter) is torch.nn.Parameter and parameter.is_leaf for parameter in ours.parameters())
    if how == "free":
        return
    assert_same_text(vanilla, ours)
    assert released(ours) == every(ours)


def test_a_copy_of_a_packed_model_stands_alone():
    vanilla, ours = packed_pair()
    other = copy.deepcopy(ours)
    assert_same_text(vanilla, ours)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_same_text(vanilla, ours)
    assert_same_values(ours.state_dict(), vanilla)


def test_forward_is_vanillas():
    vanilla, ours = packed_pair()
    inputs = prompt("padded")
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, vanilla(**inputs).logits)
    assert not released(ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_cast(dtype):
    vanilla, ours = packed_pair()
    assert_same_values(ours.to(dtype).state_dict(), vanilla.to(dtype))
    assert not released(ours)


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_dict_is_used(assign):
    _, ours = packed_pair()
    other, _ = pair(seed=1)
    ours.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=assign)
    assert_same_text(other, ours)
    assert released(ours) == every(ours)
    assert_same_values(ours.state_dict(), other)


def test_a_weight_that_is_set_is_used():
    vanilla, ours = packed_pair()
    for model in (vanilla, ours):
        torch.manual_seed(3)
        model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(torch.randn(64, 96) / 5)
    assert_same_text(vanilla, ours)


def test_resized_embeddings_are_used():
    vanilla, ours = packed_pair()
    inputs = prompt("padded")
    inputs["input_ids"] = inputs["input_ids"] % 100
    for model in (vanilla, ours):
        model.resize_token_embeddings(VOCAB // 2)
    assert_same_text(vanilla, ours, inputs)


def test_what_reads_no_weight_unpacks_nothing():
    _, ours = packed_pair()
    generate(ours, prompt("padded"), max_new_tokens=2, **GREEDY)
    ours.eval()
    ours.train(False)
    assert not ours.training
    assert list(ours.named_modules()) and list(ours.children()) and list(ours.named_buffers())
    assert ours.model.norm.weight.requires_grad and ours.model.embed_tokens.weight.requires_grad
    assert ours.get_input_embeddings() is ours.model.embed_tokens
    assert ours.get_output_embeddings() is ours.lm_head
    assert (ours.dtype, ours.device) == (torch.float32, torch.device("cpu"))
    assert "packed" in ours.path and ours.valid_past_index is not None
    assert released(ours) == every(ours)


def test_nothing_is_said_where_nothing_was_packed(monkeypatch):
    said = []
    monkeypatch.setattr(logger, "warning_once", said.append)
    _, ours = pair()
    ours.preallocate(1, 32, products="stock")
    ours.to("cpu")
    ours.free()
    assert said == []
    ours.preallocate(1, 32, products="packed")
    ours.state_dict()
    assert said


# what others hold


def test_what_others_hold_is_not_packed():
    vanilla, ours = pair()
    held = dict(ours.named_parameters())
    ours.preallocate(3, 64, products="packed")
    assert_same_text(vanilla, ours)
    assert not released(ours) and "packed" not in ours.path
    for name, parameter in ours.named_parameters():
        assert parameter is held[name], name


def test_one_of_fused_weights_may_be_held_alone():
    vanilla, ours = pair()
    held = ours.model.layers[0].self_attn.k_proj.weight
    ours.preallocate(3, 64, products="packed")
    gc.collect()
    assert ours.model.layers[0].self_attn.k_proj.weight is held
    assert_same_values(ours.state_dict(), vanilla)


WRITES = {
    "in place": lambda parameter: parameter.mul_(0.5),
    "part of it": lambda parameter: parameter[:3].zero_(),
    "copied into": lambda parameter: parameter.copy_(parameter.flip(0)),
    "through .data": lambda parameter: parameter.data.mul_(0.5),
}


@pytest.mark.parametrize("how", WRITES)
def test_a_write_to_a_held_parameter_is_seen_by_the_next_generate(how):
    vanilla, ours = pair()
    names = ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
    held = [ours.get_parameter(name) for name in names]
    before = generate(vanilla, prompt("padded"), max_new_tokens=NEW, **GREEDY)
    ours.preallocate(3, 64, products="packed")
    assert_same_text(vanilla, ours)
    assert not any(name.removesuffix(".weight") in released(ours) for name in names)
    assert released(ours)
    with torch.no_grad():
        for parameter in (*held, *(vanilla.get_parameter(name) for name in names)):
            WRITES[how](parameter)
    assert not torch.equal(generate(vanilla, prompt("padded"), max_new_tokens=NEW, **GREEDY), before)
    assert_same_text(vanilla, ours)
    assert_same_values(ours.state_dict(), vanilla)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("between", [False, True], ids=["after the step", "between backward and step"])
def test_training_goes_on(options, between):
    """What an optimizer holds is not packed; its parameters stay the model's, and each generate follows them."""
    vanilla, ours = pair()
    inputs = prompt("three")
    ours.preallocate(3, 64, products="packed")
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.02, **options) for model in (vanilla, ours)]
    for _ in range(3):
        for model in (vanilla, ours):
            model.train()
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            model.eval()
        if between:
            assert_same_text(vanilla, ours)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_same_text(vanilla, ours)
    assert not released(ours)
    (group,) = optimizers[1].param_groups
    assert all(a is b for a, b in zip(group["params"], ours.parameters(), strict=True))
    for a, b in zip(vanilla.parameters(), ours.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_gradients_survive():
    """Whoever updates without an optimizer holds no parameter between backward and the update."""
    vanilla, ours = pair()
    inputs = prompt("three")
    for model in (vanilla, ours):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    ours.preallocate(3, 64, products="packed")
    gc.collect()
    for (name, a), b in zip(vanilla.named_parameters(), ours.parameters(), strict=True):
        assert b.grad is not None and torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-6), name


def test_a_graph_that_is_alive_still_trains_the_model():
    """A loss computed before the weights were packed holds them where Python does not."""
    vanilla, ours = pair()
    inputs = prompt("three")
    losses = [model(**inputs, labels=inputs["input_ids"]).loss for model in (vanilla, ours)]
    ours.preallocate(3, 64, products="packed")
    assert_same_text(vanilla, ours)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(vanilla.named_parameters(), ours.parameters(), strict=True):
        assert b.grad is not None and torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-6), name


def test_weights_outlive_a_graph_that_held_them():
    vanilla, ours = pair()
    inputs = prompt("three")
    logits = ours(**inputs).logits
    ours.preallocate(3, 64, products="packed")
    ours.state_dict()
    del logits
    gc.collect()
    assert_same_values(ours.state_dict(), vanilla)
    assert_same_text(vanilla, ours)


def test_what_was_frozen_stays_frozen_and_names_stay_on_parameters():
    _, ours = pair()
    for layer in ours.model.layers:
        layer.self_attn.requires_grad_(False)
    ours.lm_head.weight.owner = "somebody"
    expected = [parameter.requires_grad for parameter in ours.parameters()]
    ours.preallocate(3, 64, products="packed")
    assert released(ours) == every(ours)
    assert [parameter.requires_grad for parameter in ours.parameters()] == expected
    assert ours.lm_head.weight.owner == "somebody"


def test_weights_that_came_back_in_inference_mode_can_be_trained():
    vanilla, ours = packed_pair()
    with torch.inference_mode():
        assert_same_text(vanilla, ours)
        ours(**prompt("one"))
    inputs = prompt("three")
    ours(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


def test_a_lora_adapter_loads_and_merges(tmp_path):
    peft = pytest.importorskip("peft")
    vanilla, ours = packed_pair()
    settings = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    adapted = peft.get_peft_model(vanilla, settings).eval()
    adapted.save_pretrained(tmp_path)
    before = generate(ours, prompt("padded"), max_new_tokens=NEW, **GREEDY)
    loaded = peft.PeftModel.from_pretrained(ours, tmp_path).eval()
    expected = generate(adapted, prompt("padded"), max_new_tokens=NEW, **GREEDY)
    assert not torch.equal(before, expected)
    assert torch.equal(generate(loaded, prompt("padded"), max_new_tokens=NEW, **GREEDY), expected)
    assert "4 by module" in ours.path and "packed" in ours.path
    merged_vanilla, merged = adapted.merge_and_unload(), loaded.merge_and_unload()
    assert merged is ours
    assert_same_text(merged_vanilla, ours)
    assert released(ours) == every(ours)
    for (name, a), b in zip(merged_vanilla.named_parameters(), ours.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


# asked for in the middle of things


class Touch(LogitsProcessor):
    """Runs the model's own forward on each call from the `first` on."""

    def __init__(self, model, first: int):
        self.model, self.first, self.calls = model, first, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls < self.first:
            return scores
        with torch.no_grad():
            return scores - 0.3 * self.model(input_ids=input_ids[:, :5]).logits[:, -1]


@pytest.mark.parametrize("first", [1, 4])
@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_processor_may_ask_in_the_middle_of_generate(first, decoding):
    gc.collect()  # what earlier models packed goes with them
    vanilla, ours = packed_pair()
    before = len(linear._packed)
    texts = [
        generate(
            model,
            prompt("padded"),
            logits_processor=LogitsProcessorList([Touch(model, first)]),
            max_new_tokens=NEW,
            **decoding,
        )
        for model in (vanilla, ours)
    ]
    assert torch.equal(*texts)
    assert not released(ours), "the parameters are back, and held once"
    gc.collect()
    assert len(linear._packed) == before - 9
    assert_same_text(vanilla, ours)
    assert released(ours) == every(ours)


@pytest.mark.parametrize("ask", [lambda model: model.state_dict(), lambda model: model.lm_head.weight])
def test_step_goes_on_after_somebody_asked(ask):
    vanilla, ours = packed_pair(1)
    ids = prompt("one")["input_ids"]
    ours.prefill(ids)
    for token in (5, 6, 7):
        ask(ours)
        assert not released(ours)
        ids = torch.cat((ids, torch.tensor([[token]])), 1)
        found = ours.step(ids[:, -1:])[:, -1]
        assert released(ours) == every(ours)
        with torch.no_grad():
            expected = vanilla(input_ids=ids).logits[:, -1]
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_generate_that_fails_leaves_a_whole_model():
    vanilla, ours = packed_pair()

    def fail(input_ids, scores):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        generate(ours, prompt("padded"), logits_processor=[fail], max_new_tokens=3, **GREEDY)
    assert_same_text(vanilla, ours)
    assert_same_values(ours.state_dict(), vanilla)
