"""On an NVIDIA GPU: contexts that move without synchronisation, and a cache on the CPU."""

import pytest
import torch
from torch._dynamo.utils import counters

from fastllama.decode.cache_name import CACHE_NAME
from tests.plain_context import grouped, rows_of, shifted
from tests.tiny import GREEDY, generate, pair, prompt

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
NEW = 40
CONTEXTS = {
    "shift": ({"context_shift": True, "keep": 4}, lambda model, ids: shifted(model, ids, NEW, 24, min(4, len(ids)))),
    "extend": ({"grp_attn_n": 4, "grp_attn_w": 8}, lambda model, ids: grouped(model, ids, NEW, 4, 8)),
}


@pytest.mark.parametrize("compile", ["no", "static", "dynamic"])
@pytest.mark.parametrize("format", [None, "q8_0"])
@pytest.mark.parametrize("name", CONTEXTS)
def test_text_is_that_of_the_plain_model(name, format, compile):
    switches, plain = CONTEXTS[name]
    vanilla, ours = pair(head_dim=32)
    expected = [plain(vanilla, ids)[0] for ids in rows_of(prompt("padded"))]
    ours.cuda().preallocate(3, 24 if name == "shift" else 64, bucket=16, compile=compile, cache_k=format, **switches)
    graphs = counters["stats"]["unique_graphs"]
    inputs = {key: value.cuda() for key, value in prompt("padded").items()}
    found = generate(ours, inputs, max_new_tokens=NEW, **GREEDY)[:, 14:].tolist()
    assert counters["stats"]["unique_graphs"] == graphs
    if format is None:
        assert found == expected


@pytest.mark.parametrize("name", CONTEXTS)
def test_moves_do_not_synchronise(name):
    _, ours = pair()
    ours.cuda().preallocate(2, 24 if name == "shift" else 64, compile="static", **CONTEXTS[name][0])
    ours.prefill(prompt("one")["input_ids"].cuda())
    token = torch.tensor([[7]], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(30):
            ours.step(token)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("switches", [{}, {"prefill_chunk": 16}, {"context_shift": True}, {"grp_attn_n": 2}], ids=str)
def test_a_cache_on_the_cpu_gives_the_same_text(switches, batch):
    vanilla, ours = pair()
    inputs = {key: value.cuda() for key, value in prompt(batch, 20).items()}
    expected = generate(vanilla.cuda(), inputs, max_new_tokens=NEW, **GREEDY)
    ours.cuda().preallocate(len(expected), 64, cache_device="cpu", **switches)
    out = generate(ours, inputs, max_new_tokens=NEW, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, expected) and "cache and attention on the CPU" in ours.path
    assert all(keys.device.type == "cpu" for keys in ours._engine.cache.keys)
    assert out[CACHE_NAME].layers[0].keys.device.type == "cuda"
    with pytest.raises(ValueError, match="a compiled step stays on one device"):
        ours.preallocate(1, 64, cache_device="cpu", compile="static")


def test_a_small_cache_on_the_cpu():
    _, ours = pair(head_dim=32)
    inputs = {key: value.cuda() for key, value in prompt("padded").items()}
    ours.cuda().preallocate(3, 64, cache_k="q8_0", cache_v="q8_0")
    expected = ours.prefill(**inputs)
    ours.preallocate(3, 64, cache_k="q8_0", cache_v="q8_0", cache_device="cpu")
    assert (ours.prefill(**inputs) - expected).abs().max() / expected.abs().max() < 0.02
