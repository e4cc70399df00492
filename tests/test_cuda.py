"""What only an NVIDIA GPU can show: captured graphs, no synchronisation, surplus steps taken back."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.tiny import GREEDY, SAMPLED, generate, pair, prompt

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
NEW = 24


def on_gpu(batch, **arguments):
    vanilla, ours = pair(**arguments)
    return vanilla.cuda(), ours.cuda(), {name: value.cuda() for name, value in prompt(batch).items()}


@pytest.mark.parametrize("compile", ["no", "static", "dynamic"])
@pytest.mark.parametrize("batch", ["one", "padded", "three"])
@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_ids_are_vanillas(compile, batch, decoding):
    vanilla, ours, inputs = on_gpu(batch)
    ours.preallocate(inputs["input_ids"].shape[0], 64, compile=compile, bucket=16)
    expected = generate(vanilla, inputs, max_new_tokens=NEW, **decoding)
    assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, **decoding), expected)


def test_eos_inside_and_random_state_after():
    vanilla, ours, inputs = on_gpu("one")
    ours.preallocate(1, 64, compile="static")
    width = inputs["input_ids"].shape[1]
    eos = int(generate(vanilla, inputs, max_new_tokens=NEW, **SAMPLED)[0, width + 6])
    options = {"max_new_tokens": NEW, "eos_token_id": eos, "pad_token_id": 0, **SAMPLED}
    expected = generate(vanilla, inputs, **options)
    state = torch.cuda.get_rng_state()
    assert torch.equal(generate(ours, inputs, **options), expected)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_every_bucket_is_captured_by_preallocate_and_nothing_later():
    _, ours, inputs = on_gpu("padded")
    ours.preallocate(3, 64, compile="static", bucket=16)
    captured, graphs = len(ours._engine._step.graphs), counters["stats"]["unique_graphs"]
    assert captured == 4
    for new in (3, 20, 50):
        generate(ours, inputs, max_new_tokens=new, **GREEDY)
    assert len(ours._engine._step.graphs) == captured
    assert counters["stats"]["unique_graphs"] == graphs


def test_steps_do_not_synchronise():
    _, ours, inputs = on_gpu("one")
    ours.preallocate(1, 64, compile="static")
    ours.prefill(**inputs)
    token = torch.tensor([[7]], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            token = ours.step(token)[:, -1].argmax(-1, keepdim=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_free_returns_the_memory():
    _, ours, _ = on_gpu("one")
    before = torch.cuda.memory_allocated()
    promised = ours.preallocate(2, 4096)
    assert abs(torch.cuda.memory_allocated() - before - promised) <= 0.05 * promised
    ours.free()
    assert torch.cuda.memory_allocated() - before <= 0.05 * promised


@pytest.mark.parametrize("compile", ["no", "static"])
@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("branches", [1, 4])
def test_a_draft_on_the_cpu_assists_a_target_here(compile, batch, branches):
    vanilla, ours, inputs = on_gpu(batch, max_position_embeddings=256)
    _, draft = pair(max_position_embeddings=256)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.05 * parameter.std().nan_to_num(0.0) * torch.randn_like(parameter)
    draft = draft.to(torch.bfloat16)  # as the seed's pair: a float target there, a bf16 draft here
    ours.preallocate(inputs["input_ids"].shape[0], 64, compile=compile, bucket=16)
    kind = {"assistant_model": draft, "num_assistant_tokens": 4, "assistant_confidence_threshold": 0.0}
    kind |= {"p_split": 0.02, "draft_branches": branches}
    expected = generate(vanilla, inputs, max_new_tokens=NEW, **GREEDY)
    assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, **kind, **GREEDY), expected)
    assert ours.assisted.mode == ("draft" if branches == 1 else "tree")
    assert ours.assisted.accepted_tokens > 0
    generate(ours, inputs, max_new_tokens=NEW, **kind, **SAMPLED)  # what was drawn there is compared here
    assert ours.assisted.new_tokens > 0
