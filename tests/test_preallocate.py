"""preallocate, free and FastConfig: what they promise, what they refuse."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch._inductor import compile_fx

import fastllama
from fastllama.cache.budget import CacheShape
from fastllama.cache.float_cache import FloatCache, mask_for, write_tokens
from fastllama.model.compiled import Buckets, graphs
from tests.tiny import GREEDY, SAMPLED, generate, pair, prompt


@pytest.mark.parametrize("compile", ["no", "static", "whole"])
@pytest.mark.parametrize("rope", ["default", "dynamic"])
def test_no_recompilation_and_no_reallocation_in_20_calls(compile, rope, request):
    if compile == "whole":
        request.getfixturevalue("whole")
        compile = "static"
    vanilla, ours = pair(rope=rope)
    ours.preallocate(3, 96, compile=compile, bucket=16)  # six buckets, of which three are rehearsed
    compiled, reallocations = graphs(), ours._engine.reallocations
    cache = ours._engine.cache
    addresses = [tensor.data_ptr() for tensor in (*cache.keys, *cache.values, cache.mask_B11S)]
    stance = "fail_on_recompile" if compile == "static" else "default"
    with torch.compiler.set_stance(stance):
        for call in range(20):
            length, new = 3 + 4 * call, 1 + (call * 7) % 20
            inputs = prompt(("one", "padded", "three")[call % 3], max(length, 4), seed=call)
            decoding = SAMPLED if call % 2 else GREEDY
            found = generate(ours, inputs, max_new_tokens=min(new, 96 - length), **decoding)
            expected = generate(vanilla, inputs, max_new_tokens=min(new, 96 - length), **decoding)
            assert torch.equal(found, expected)
    assert graphs() == compiled
    assert ours._engine.reallocations == reallocations
    cache = ours._engine.cache
    assert addresses == [tensor.data_ptr() for tensor in (*cache.keys, *cache.values, cache.mask_B11S)]


@pytest.mark.usefixtures("whole")
@torch._dynamo.config.patch(recompile_limit=2)
def test_many_models_do_not_share_a_recompile_limit(monkeypatch):
    # What counts recompilations is what traces, and not the compiler behind it.
    monkeypatch.setattr(compile_fx, "compile_fx", lambda traced, inputs, **how: traced.forward)
    for seed in range(torch._dynamo.config.recompile_limit + 2):
        _, ours = pair(seed=seed, num_hidden_layers=1, vocab_size=16 + seed)
        ours.preallocate(1, 20, compile="static")
        ours.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, **GREEDY)


_TAKEN = """
import ctypes, sys, torch, transformers, fastllama
torch.set_num_threads(1)
def anonymous():
    ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps for later use is held by nobody
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
settings = transformers.LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=64, num_hidden_layers=8,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=16384)
model = fastllama.LlamaForCausalLM(settings).eval()
model.preallocate(1, 16)
model.free()
before = anonymous()
promised = model.preallocate(2, 8192)
taken = anonymous() - before
model.free()
print(promised, taken, anonymous() - before)
"""


@pytest.mark.usefixtures("forked")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_preallocate_says_what_it_takes_and_free_gives_it_back():
    done = subprocess.run([sys.executable, "-c", _TAKEN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    promised, taken, left = map(int, done.stdout.splitlines()[-1].split())
    assert promised > 200e6
    assert abs(taken - promised) <= 0.05 * promised
    assert left <= 0.05 * promised


def test_the_bytes_are_those_of_the_tensors():
    _, ours = pair()
    nbytes = ours.preallocate(3, 100)
    engine = ours._engine
    cache = engine.cache
    tensors = [*cache.keys, *cache.values, cache.mask_B11S, cache.valid_past_index]
    assert nbytes == sum(tensor.nbytes for tensor in tensors) + engine.rotary.nbytes
    assert nbytes == cache.shape.nbytes + engine.rotary.nbytes
    ours.free()
    assert ours.valid_past_index is None and engine.cache is None and engine.rotary is None


def test_what_does_not_fit_in_memory_is_refused_before_anything_is_taken():
    _, ours = pair()
    ours.preallocate(1, 32)
    cache = ours._engine.cache
    with pytest.raises(MemoryError, match=r"a cache of 1 x 99999999999 positions needs .* GB are free"):
        ours.preallocate(1, 99_999_999_999)
    assert ours._engine.cache is cache and ours._engine.explicit


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ({"batch_size": 0}, "batch_size=0 is not allowed; allowed: an integer >= 1"),
        ({"batch_size": -1}, "batch_size=-1 is not allowed"),
        ({"cache_length": 0}, "cache_length=0 is not allowed"),
        ({"cache_length": 2.5}, "cache_length=2.5 is not allowed"),
        ({"compile": "maybe"}, "compile='maybe' is not allowed; allowed: no, static, dynamic, fullgraph"),
        ({"bucket": 3}, "bucket=3 is not allowed; allowed: an integer >= 16"),
        ({"prefill_chunk": 0}, "prefill_chunk=0 is not allowed"),
        ({"fuse": True}, "fuse=True is not allowed; allowed: all, qkv, no"),
        ({"speed": 3}, "preallocate has no switch 'speed'; allowed: compile, bucket"),
        ({"config": fastllama.FastConfig(), "bucket": 32}, "either config or single switches"),
    ],
    ids=str,
)
def test_bad_values_are_named_and_leave_the_earlier_reservation(call, sentence):
    _, ours = pair()
    ours.preallocate(1, 32)
    cache = ours._engine.cache
    with pytest.raises(ValueError, match=sentence):
        ours.preallocate(**call)
    assert ours._engine.cache is cache


def test_fast_config_is_frozen_and_knows_its_aliases():
    config = fastllama.FastConfig(compile="fullgraph")
    assert config.compile == "static" and config == fastllama.FastConfig(compile="static")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.compile = "no"
    for field in dataclasses.fields(config):
        assert set(field.metadata) == {"help", "allowed", "lossless"}


def test_an_explicit_cache_is_fixed_and_says_so():
    vanilla, ours = pair()
    ours.preallocate(1, 30)
    inputs = prompt("one", 14)
    expected = generate(vanilla, inputs, max_new_tokens=17, **GREEDY)
    assert torch.equal(generate(ours, inputs, max_new_tokens=17, **GREEDY), expected)  # the last token is not stored
    with pytest.raises(ValueError, match="needs 1 x 31 cache positions and preallocate\\(\\) reserved 1 x 30"):
        generate(ours, inputs, max_new_tokens=18, **GREEDY)
    with pytest.raises(ValueError, match="needs 3 x 18 cache positions"):
        generate(ours, prompt("three"), max_new_tokens=5, **GREEDY)
    ours.free()
    assert generate(ours, prompt("three"), max_new_tokens=40, **GREEDY).shape == (3, 54)


def test_an_implicit_cache_grows_when_a_call_needs_more():
    vanilla, ours = pair()
    for batch, length, new in (("one", 10, 5), ("three", 10, 5), ("padded", 200, 100), ("one", 30, 5)):
        inputs = prompt(batch, length)
        expected = generate(vanilla, inputs, max_new_tokens=new, **GREEDY)
        assert torch.equal(generate(ours, inputs, max_new_tokens=new, **GREEDY), expected)
    assert ours._engine.reallocations == 4  # the last: three rows of cache are too many for one


def test_an_implicit_cache_does_not_reserve_a_whole_context():
    vanilla, ours = pair()
    eos = int(generate(vanilla, prompt("one"), max_new_tokens=8, **GREEDY)[0, -1])
    inputs, options = prompt("one"), {"max_length": 50_000, "eos_token_id": eos, "pad_token_id": 0, **GREEDY}
    assert torch.equal(generate(ours, inputs, **options), generate(vanilla, inputs, **options))
    assert ours._engine.cache.shape.cache_length <= 1280


def test_a_rehearsal_leaves_a_stateful_rotary_module_alone():
    vanilla, ours = pair(rope="dynamic")
    ours.preallocate(1, 96, compile="static")
    inputs = prompt("one", 40)  # beyond the 32 positions it was made for, and the first that it sees
    assert torch.equal(ours(**inputs).logits, vanilla(**inputs).logits)
    vanilla, ours = pair(rope="dynamic")
    ours.preallocate(1, 96, compile="static")
    expected = generate(vanilla, inputs, max_new_tokens=20, **GREEDY)
    assert torch.equal(generate(ours, inputs, max_new_tokens=20, **GREEDY), expected)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_an_overflow_does_not_reach_the_next_call(poison):
    vanilla, ours = pair()
    ours.preallocate(2, 64)
    generate(ours, prompt("one", 40), max_new_tokens=10, **GREEDY)
    for storage in (*ours._engine.cache.keys, *ours._engine.cache.values):
        storage[0, :, 20:49] = poison
    expected = generate(vanilla, prompt("one", 8), max_new_tokens=10, **GREEDY)
    assert torch.equal(generate(ours, prompt("one", 8), max_new_tokens=10, **GREEDY), expected)


@pytest.mark.parametrize("how", ["by layer", "of the whole step"])
def test_a_step_takes_ids_of_any_layout_without_compiling_again(how, request):
    if how != "by layer":
        request.getfixturevalue("whole")
    _, ours = pair()
    ours.preallocate(1, 64, compile="static")
    compiled = graphs()
    ids = prompt("one")["input_ids"]
    ours.prefill(ids)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(6):
            token = ours.step(ids[:, -1:])[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat((ids, token), 1)
        ours.step(ids[:, -1:].to(torch.int32))
        with torch.inference_mode():
            ours.step(torch.tensor([[5]]))
        ours.step(torch.tensor([[5, 6, 7]]))
    assert graphs() == compiled
    generate(ours, prompt("one"), max_new_tokens=2, **GREEDY)
    assert f"static compile {how}" in ours.path


def test_a_cast_model_asks_for_a_new_reservation():
    _, ours = pair()
    ours.preallocate(1, 32)
    ours.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"the model is now torch.bfloat16 .* call preallocate\(\) again"):
        generate(ours, prompt("one"), max_new_tokens=2, **GREEDY)
    ours.preallocate(1, 32)
    generate(ours, prompt("one"), max_new_tokens=2, **GREEDY)


def test_a_cache_longer_than_the_model_was_made_for_warns(caplog):
    _, ours = pair()
    fastllama.llama.logger.propagate = True
    import logging

    logging.getLogger("fastllama").addHandler(caplog.handler)
    try:
        ours.preallocate(1, 33)
    finally:
        logging.getLogger("fastllama").removeHandler(caplog.handler)
    assert "cache_length 33 is longer than max_position_embeddings 32" in caplog.text


def test_preallocate_refuses_a_model_that_must_run_the_parents_forward():
    _, ours = pair()
    ours.train()
    with pytest.raises(ValueError, match="preallocate cannot be honoured: the model is in training mode"):
        ours.preallocate(1, 32)


class TestCache:
    shape = CacheShape(2, 3, 2, 10, 4, torch.float32, torch.device("cpu"))

    def test_tokens_go_to_each_rows_own_position(self):
        cache = FloatCache(self.shape)
        index_BQ = torch.tensor([[0, 1], [4, 5], [9, 10]])
        new = torch.randn(3, 2, 2, 4)
        write_tokens(cache.keys[0], cache.rows_B1, index_BQ, new)
        for row in range(3):
            for token in range(2):
                assert torch.equal(cache.keys[0][row, :, index_BQ[row, token]], new[row, token])
        assert cache.keys[0].count_nonzero() == new.count_nonzero()
        assert cache.values[0].count_nonzero() == 0

    def test_the_mask_opens_what_is_written_and_closes_on_roll_back(self):
        cache = FloatCache(self.shape)
        cache.set_valid_past(torch.tensor([2, 5, 0]))
        index_BQ = cache.valid_past_index[:, None] + torch.arange(2)
        seen = mask_for(cache.mask_B11S, cache.rows_B1, index_BQ, cache.positions[:8])
        assert seen.shape == (3, 1, 2, 8)
        assert (seen == 0).sum(-1)[:, 0].tolist() == [[3, 4], [6, 7], [1, 2]]
        assert (cache.mask_B11S == 0).sum(-1).flatten().tolist() == [4, 7, 2]
        cache.set_valid_past(torch.tensor([3, 1, 0]))
        assert (cache.mask_B11S == 0).sum(-1).flatten().tolist() == [3, 1, 0]

    def test_buckets_cover_what_is_used(self):
        buckets = Buckets(torch.arange(108), 100, 32, marked=True)
        assert buckets.lengths() == [32, 64, 96, 100]
        assert [len(buckets.covering(used)) for used in (1, 32, 33, 64, 96, 97, 100)] == [32, 32, 64, 64, 96, 100, 100]
        assert Buckets(torch.arange(28), 20, 32, marked=True).lengths() == [20]
