"""Forward passes: ours against vanilla's, and vanilla's through our class."""

import copy
import io

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.tiny import GREEDY, VOCAB, generate, pair, prompt


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("compile", ["no", "static"])
@pytest.mark.parametrize("batch", ["one", "padded", "three"])
def test_prefill_and_step_give_vanillas_logits(batch, compile):
    vanilla, ours = pair()
    inputs = prompt(batch)
    rows = inputs["input_ids"].shape[0]
    ours.preallocate(rows, 64, compile=compile)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    logits = ours.prefill(ids, mask)
    for _ in range(12):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            expected = vanilla(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        assert logits.shape == (rows, VOCAB)
        assert relative(logits, expected) < 1e-5
        token = expected.argmax(-1, keepdim=True)
        ids, mask = torch.cat((ids, token), 1), torch.cat((mask, torch.ones_like(token)), 1)
        logits = ours.step(token)[:, -1]


@pytest.mark.parametrize("batch", ["one", "padded"])
def test_a_step_of_several_tokens(batch):
    vanilla, ours = pair()
    inputs = prompt(batch)
    rows = inputs["input_ids"].shape[0]
    ours.prefill(**inputs)
    several = torch.randint(3, VOCAB, (rows, 5))
    found = ours.step(several)
    ids = torch.cat((inputs["input_ids"], several), 1)
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(several)), 1)
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = vanilla(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -5:]
    assert relative(found, expected) < 1e-5
    assert ours.valid_past_index.tolist() == mask.sum(1).tolist()


def test_step_refuses_what_it_cannot_continue():
    _, ours = pair()
    with pytest.raises(ValueError, match=r"call prefill\(\) first"):
        ours.step(torch.tensor([[5]]))
    ours.preallocate(2, 16)
    ours.prefill(torch.full((2, 10), 7))
    with pytest.raises(ValueError, match="3 rows and the prefill had 2"):
        ours.step(torch.full((3, 1), 7))
    for _ in range(6):
        ours.step(torch.full((2, 1), 7))
    with pytest.raises(ValueError, match="the preallocated cache of 16 positions is full"):
        ours.step(torch.full((2, 1), 7))
    with pytest.raises(ValueError, match="nothing but padding"):
        ours.prefill(torch.full((2, 4), 7), torch.tensor([[1] * 4, [0] * 4]))


def test_forward_is_the_parents_before_and_after_generation():
    vanilla, ours = pair()
    inputs = prompt("padded")
    generate(ours, inputs, max_new_tokens=4, **GREEDY)
    labels = inputs["input_ids"].clone()
    wanted = {"labels": labels, "output_hidden_states": True, "output_attentions": True}
    for model in (vanilla, ours):
        model.set_attn_implementation("eager")
    found, expected = ours(**inputs, **wanted), vanilla(**inputs, **wanted)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.logits, expected.logits)
    for a, b in zip(found.hidden_states + found.attentions, expected.hidden_states + expected.attentions, strict=True):
        assert torch.equal(a, b)
    found.loss.backward()
    expected.loss.backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), vanilla.named_parameters(), strict=True):
        assert a.grad is not None and torch.equal(a.grad, b.grad), name


def test_training_between_generations_is_seen_by_the_next():
    vanilla, ours = pair()
    inputs = prompt("padded")
    before = generate(ours, inputs, max_new_tokens=12, **GREEDY)
    for model in (vanilla, ours):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        model.train()
        for _ in range(2):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
    expected = generate(vanilla, inputs, max_new_tokens=12, **GREEDY)
    assert torch.equal(generate(ours, inputs, max_new_tokens=12, **GREEDY), expected)
    assert not torch.equal(before, expected)


def test_a_trainer_step(tmp_path):
    vanilla, ours = pair()
    generate(ours, prompt("one"), max_new_tokens=4, **GREEDY)  # so that it trains with fused weights
    rows = [{"input_ids": row, "labels": row} for row in prompt("three")["input_ids"]]
    for name, model in (("vanilla", vanilla), ("ours", ours)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=2,
            per_device_train_batch_size=3,
            learning_rate=0.01,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            seed=1,
        )
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        model.eval()
    for (name, a), (_, b) in zip(ours.named_parameters(), vanilla.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    expected = generate(vanilla, prompt("padded"), max_new_tokens=8, **GREEDY)
    assert torch.equal(generate(ours, prompt("padded"), max_new_tokens=8, **GREEDY), expected)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=str)
def test_a_lora_adapter_runs_trains_loads_and_merges(tmp_path, targets):
    peft = pytest.importorskip("peft")
    vanilla, ours = pair()
    inputs = prompt("padded")
    generate(ours, inputs, max_new_tokens=4, **GREEDY)
    settings = peft.LoraConfig(r=4, lora_alpha=64, target_modules=targets, task_type="CAUSAL_LM")
    outputs = []
    for model in (vanilla, ours):
        torch.manual_seed(3)
        adapted = peft.get_peft_model(model, settings)
        optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.05)
        adapted.train()
        for _ in range(3):
            adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.eval()
        texts = [generate(adapted, inputs, max_new_tokens=10, **GREEDY)]
        if model is vanilla:
            adapted.save_pretrained(tmp_path)
        if model is ours:
            words = (
                "14 by module + 1 stock"
                if targets == "all-linear"
                else "fused gate+up, products: 4 by module + 9 stock"
            )
            assert f"{words}, SDPA by kv group" in ours.path
        merged = adapted.merge_and_unload(safe_merge=True)
        texts.append(generate(merged, inputs, max_new_tokens=10, **GREEDY))
        if model is ours:
            assert ours.path.endswith("fused qkv, gate+up, products: 9 stock, SDPA by kv group")
        outputs.append(texts)
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)
    _, fresh = pair()
    plain = generate(fresh, inputs, max_new_tokens=10, **GREEDY)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    adapted_text = generate(loaded, inputs, max_new_tokens=10, **GREEDY)
    assert torch.equal(adapted_text, outputs[0][0])
    assert not torch.equal(adapted_text, plain)


REBOUND = {
    "deepcopy": copy.deepcopy,
    "double and back": lambda model: model.double().float(),
    "half and back": lambda model: model.half().float(),
    "half of it": lambda model: (model.model.double(), model.model.float(), model)[-1],
    "assigned state dict": lambda model: (
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
        model,
    )[-1],
    "pickled": lambda model: torch.load(_pickled(model), weights_only=False),
}


def _pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("how", REBOUND)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_are_rebound_are_fused_again(how, tied):
    vanilla, ours = pair(tie_word_embeddings=tied)
    inputs = prompt("padded")
    generate(ours, inputs, max_new_tokens=4, **GREEDY)
    other = REBOUND[how](ours)
    if how == "half and back":
        REBOUND[how](vanilla)
    with torch.no_grad():
        for model in (vanilla, other):
            for layer in model.model.layers:
                layer.self_attn.k_proj.weight.mul_(0.5)
                layer.mlp.up_proj.weight.mul_(1.5)
    expected = generate(vanilla, inputs, max_new_tokens=10, **GREEDY)
    assert torch.equal(generate(other, inputs, max_new_tokens=10, **GREEDY), expected)
    assert "fused qkv, gate+up" in other.path


def test_modules_that_were_replaced_are_used():
    """Norms, embeddings and heads too, although the fused weights are where they were."""
    vanilla, ours = pair()
    inputs = prompt("padded")
    before = generate(ours, inputs, max_new_tokens=10, **GREEDY)
    for model in (vanilla, ours):
        torch.manual_seed(4)
        norm = copy.deepcopy(model.model.norm)
        torch.nn.init.uniform_(norm.weight, 0.1, 2.0)
        model.model.norm = norm
        embedding = copy.deepcopy(model.get_input_embeddings())
        torch.nn.init.normal_(embedding.weight)
        model.set_input_embeddings(embedding)
    expected = generate(vanilla, inputs, max_new_tokens=10, **GREEDY)
    assert torch.equal(generate(ours, inputs, max_new_tokens=10, **GREEDY), expected)
    assert not torch.equal(before, expected)


def test_prompt_learning_runs_the_parents_code(tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    outputs = []
    for model in pair():
        torch.manual_seed(2)
        adapted = peft.get_peft_model(model, settings).eval()
        torch.nn.init.normal_(adapted.prompt_encoder.default.embedding.weight)
        outputs.append(generate(adapted, prompt("one"), max_new_tokens=8, **GREEDY))
    assert torch.equal(*outputs)
    assert model.path == "parent: prepare_inputs_for_generation was replaced"


def test_a_forward_replaced_on_an_inner_module_is_not_passed_over():
    vanilla, ours = pair()
    inputs = prompt("one")
    for model in (vanilla, ours):
        mlp = model.model.layers[0].mlp
        mlp.forward = lambda x: x * 2
    expected = generate(vanilla, inputs, max_new_tokens=8, **GREEDY)
    assert torch.equal(generate(ours, inputs, max_new_tokens=8, **GREEDY), expected)
    assert ours.path == "parent: a module's forward was replaced"
