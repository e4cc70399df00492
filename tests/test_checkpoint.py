"""Checkpoints: read as the parent reads them, written as the parent writes them."""

import gc
import json
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, pipeline

import fastllama
from tests.tiny import GREEDY, config, generate, pair, prompt


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", ["50KB", "5GB"])
def test_a_round_trip_is_bit_for_bit(tmp_path, kv_heads, tied, shards):
    vanilla, _ = pair(kv_heads, tie_word_embeddings=tied)
    vanilla.save_pretrained(tmp_path / "vanilla", max_shard_size=shards)
    assert (len(list((tmp_path / "vanilla").glob("*.safetensors"))) > 1) == (shards == "50KB")
    ours = fastllama.LlamaForCausalLM.from_pretrained(tmp_path / "vanilla").eval()
    found = generate(ours, prompt("padded"), max_new_tokens=8, **GREEDY)
    assert "fused qkv, gate+up" in ours.path
    assert torch.equal(found, generate(vanilla, prompt("padded"), max_new_tokens=8, **GREEDY))
    ours.save_pretrained(tmp_path / "ours", max_shard_size=shards)
    again, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected, state = vanilla.state_dict(), again.state_dict()
    assert list(expected) == list(state)
    for name, tensor in expected.items():
        assert torch.equal(tensor, state[name]), name
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    files = [sorted(path.name for path in (tmp_path / who).glob("*.safetensors")) for who in ("vanilla", "ours")]
    assert files[0] == files[1]


def test_names_of_modules_and_tensors_are_the_parents():
    vanilla, ours = pair()
    generate(ours, prompt("one"), max_new_tokens=2, **GREEDY)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in vanilla.named_modules()]
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in vanilla.named_parameters()]
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in vanilla.named_buffers()]
    vanilla.load_state_dict(ours.state_dict())


def test_fused_weights_are_held_once():
    _, ours = pair()
    before = sum(p.nbytes for p in ours.parameters())
    generate(ours, prompt("one"), max_new_tokens=2, **GREEDY)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in ours.parameters()}
    assert sum(storages.values()) == before
    attention = ours.model.layers[0].self_attn
    fused = ours._engine.weights.blocks[0].qkv.joint.weight
    assert fused.untyped_storage().data_ptr() == attention.q_proj.weight.untyped_storage().data_ptr()


def test_device_map_and_dtype_arguments(tmp_path):
    vanilla, _ = pair()
    vanilla.save_pretrained(tmp_path)
    for arguments in ({"device_map": "cpu"}, {"device_map": "auto"}, {"dtype": torch.bfloat16}, {"dtype": "auto"}):
        ours = fastllama.LlamaForCausalLM.from_pretrained(tmp_path, **arguments).eval()
        reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path, **arguments).eval()
        assert ours.dtype == reference.dtype
        for (name, a), (_, b) in zip(ours.named_parameters(), reference.named_parameters(), strict=True):
            assert torch.equal(a, b), name
        generate(ours, prompt("one"), max_new_tokens=4, **GREEDY)
        assert ours.path.startswith("preallocated"), arguments


_PEAK = """
import sys, threading
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
import torch, fastllama
torch.set_num_threads(1)
fastllama.LlamaForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)  # what the libraries hold for themselves
base, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch); watcher.start()
model = fastllama.LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[3])).eval()
model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=2, do_sample=False)
assert "fused qkv, gate+up" in model.path, model.path
done.set(); watcher.join()
print((peak - base) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.usefixtures("forked")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_and_fusing_take_at_most_1_15_times_the_weights(tmp_path, dtype):
    """Of anonymous memory, with the first generate (which fuses) included; bfloat16 is the stored dtype."""
    # Fixed costs (threads, workspaces) are a few MB, so the weights must be large beside them.
    settings = config(hidden_size=768, intermediate_size=2048, num_hidden_layers=20, vocab_size=8192)
    settings.num_attention_heads = settings.num_key_value_heads = 12
    settings.head_dim = 64
    transformers.LlamaForCausalLM(settings).to(torch.bfloat16).save_pretrained(tmp_path / "big")
    pair()[0].save_pretrained(tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path / "big"), str(tmp_path / "small"), dtype],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) <= 1.15


class TestRegister:
    @pytest.fixture
    def folder(self, tmp_path, demo_tokenizer):
        vanilla, _ = pair(vocab_size=4096)
        vanilla.save_pretrained(tmp_path)
        demo_tokenizer.save_pretrained(tmp_path)
        return tmp_path

    def test_transformers_builds_ours_until_it_is_undone(self, folder):
        parent = transformers.LlamaForCausalLM
        assert type(AutoModelForCausalLM.from_pretrained(folder)) is parent
        fastllama.register()
        try:
            fastllama.register()  # twice is once
            assert type(AutoModelForCausalLM.from_pretrained(folder)) is fastllama.LlamaForCausalLM
            assert transformers.LlamaForCausalLM is fastllama.LlamaForCausalLM
            written = pipeline("text-generation", model=str(folder), device="cpu")
            assert type(written.model) is fastllama.LlamaForCausalLM
            text = written("import os", max_new_tokens=4, do_sample=False)[0]["generated_text"]
            assert text.startswith("import os")
            assert written.model.path.startswith("preallocated")
        finally:
            fastllama.unregister()
        assert transformers.LlamaForCausalLM is parent
        assert type(AutoModelForCausalLM.from_pretrained(folder)) is parent
        assert type(AutoModelForCausalLM.from_config(LlamaConfig(**config().to_dict()))) is parent
        fastllama.unregister()  # twice is once

    def test_what_the_collector_no_longer_sees_is_replaced_too(self):
        gc.freeze()  # as a server does before it forks
        parent = transformers.LlamaForCausalLM
        fastllama.register()
        try:
            assert transformers.LlamaForCausalLM is fastllama.LlamaForCausalLM
        finally:
            fastllama.unregister()
        assert transformers.LlamaForCausalLM is parent
