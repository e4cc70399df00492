"""compile="native": the decode step as one C++ call, against vanilla's forward and the Python step it stands for."""

import subprocess
import sys

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import fastllama
from fastllama.kernels import native
from fastllama.lab.measuring.parity import teacher_forced_rms
from tests.tiny import GREEDY, SAMPLED, VOCAB, config, generate, pair, prompt

NEW = 16


@pytest.fixture(autouse=True, scope="module")
def built():
    if native.load() is not None:
        pytest.skip(native.load())


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def native_pair(rows: int = 3, length: int = 64, **changes):
    """(vanilla, ours), every bias random, ours on the native step."""
    vanilla, ours = pair(**changes)
    with torch.no_grad():
        for name, parameter in vanilla.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    ours.load_state_dict(vanilla.state_dict())
    ours.preallocate(rows, length, compile="native")
    return vanilla, ours


def assert_same_text(vanilla, ours, inputs=None, path="preallocated, native step, ", **decoding):
    inputs = prompt("padded") if inputs is None else inputs
    decoding = {"max_new_tokens": NEW, **(decoding or GREEDY)}
    expected = generate(vanilla, inputs, **decoding)
    assert torch.equal(generate(ours, inputs, **decoding), expected)
    assert ours.path.startswith(path)


def stepped(model, inputs: dict, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits [B, sum of counts, V] of random tokens appended `counts` at a time, ids, mask)."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    tokens = torch.randint(3, VOCAB, (ids.shape[0], sum(counts)), generator=torch.Generator().manual_seed(2))
    model.prefill(ids, mask)
    logits = torch.cat([model.step(part) for part in tokens.split(counts, dim=1)], 1)
    return logits, torch.cat((ids, tokens), 1), torch.cat((mask, torch.ones_like(tokens)), 1)


def vanilla_logits(vanilla, ids, mask, last: int) -> torch.Tensor:
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return vanilla(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -last:]


def assert_same_logits(vanilla, ours, inputs: dict, counts: list[int], bound: float = 1e-5) -> None:
    found, ids, mask = stepped(ours, inputs, counts)
    assert ours._engine._native is not None
    assert relative(found, vanilla_logits(vanilla, ids, mask, sum(counts))) < bound
    assert ours.valid_past_index[: len(ids)].tolist() == mask.sum(1).tolist()


# logits


@pytest.mark.parametrize("batch", ["one", "padded", "three"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 96, 128])
def test_logits_are_vanillas_and_the_python_steps(head_dim, kv_heads, batch):
    inputs = prompt(batch)
    rows = inputs["input_ids"].shape[0]
    # The wider a head, the larger its scores: narrower weights keep the softmax as smooth.
    changes = {"kv_heads": kv_heads, "head_dim": head_dim, "initializer_range": 0.3 * (16 / head_dim) ** 0.25}
    vanilla, ours = native_pair(rows, **changes)
    assert_same_logits(vanilla, ours, inputs, [1] * 8)
    found = stepped(ours, inputs, [1] * 8)[0]
    ours.preallocate(rows, 64, compile="no", products="stock")
    assert relative(found, stepped(ours, inputs, [1] * 8)[0]) < 1e-5


@pytest.mark.parametrize("counts", [[5], [1, 5, 1, 2], [2] * 4, [3, 1, 4]], ids=str)
@pytest.mark.parametrize("batch", ["one", "padded", "three"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_steps_of_several_tokens(kv_heads, batch, counts):
    inputs = prompt(batch)
    vanilla, ours = native_pair(inputs["input_ids"].shape[0], kv_heads=kv_heads)
    assert_same_logits(vanilla, ours, inputs, counts)


@pytest.mark.parametrize("counts", [[16], [1, 17, 1], [16, 17, 16]], ids=str)
def test_more_tokens_than_one_call_takes_go_through_python_in_between(counts):
    vanilla, ours = native_pair(1)
    assert_same_logits(vanilla, ours, prompt("one"), counts)


@pytest.mark.parametrize("counts", [[1] * 6, [4, 1, 4]], ids=str)
def test_rows_that_are_idle_change_nothing(counts):
    vanilla, ours = native_pair(4)
    for batch in ("three", "one", "padded"):
        assert_same_logits(vanilla, ours, prompt(batch), counts)


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True}])
def test_biases_and_tied_embeddings(changes):
    vanilla, ours = native_pair(**changes)
    assert_same_logits(vanilla, ours, prompt("padded"), [1, 1, 5, 1])
    assert_same_text(vanilla, ours)


@pytest.mark.parametrize("sizes", [(48, 80, 3, 1), (72, 100, 9, 3), (40, 33, 2, 2)], ids=str)
def test_sizes_that_are_no_multiples_of_a_vector(sizes):
    hidden, intermediate, heads, kv_heads = sizes
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "kv_heads", "vocab_size", "head_dim")
    vanilla, ours = native_pair(**dict(zip(names, (hidden, intermediate, heads, kv_heads, 391, 16), strict=True)))
    for batch in ("one", "padded"):
        assert_same_logits(vanilla, ours, prompt(batch), [1, 2, 5, 1])


@pytest.mark.parametrize("rope", ["default", "llama3", "linear", "yarn"])
@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
def test_every_rope(rope, threads):
    vanilla, ours = native_pair(rope=rope)
    assert_same_logits(vanilla, ours, prompt("padded", 28), [1] * 8 + [3])
    assert_same_text(vanilla, ours)


# long contexts: the cache is filled with random numbers, which costs no prefill


def filled(model, lengths: list[int]) -> torch.Tensor:
    """Logits of one and then of five tokens after a cache of random numbers, `lengths` positions a row."""
    engine, generator = model._engine, torch.Generator().manual_seed(8)
    engine.refresh(model)
    engine.begin(len(lengths))
    for storage in (*engine.cache.keys, *engine.cache.values):
        storage.copy_(torch.randn(storage.shape, generator=generator))
    engine.cache.set_valid_past(torch.tensor(lengths))
    engine._used = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), 6), generator=generator)
    return torch.cat((model.step(ids[:, :1]), model.step(ids[:, 1:])), 1)


BORDERS = [1, 58, 59, 60, 62, 63, 64, 65, 122, 126, 127, 128, 129]
LONG = [255, 256, 257, 505, 506, 507, 511, 512, 513, 1030]


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_contexts_across_the_borders_of_blocks_and_shares(kv_heads, threads):
    lengths = [[length] for length in BORDERS + LONG]
    _, ours = native_pair(1, 1100, kv_heads=kv_heads)
    found = [filled(ours, each) for each in lengths]
    ours.preallocate(1, 1100, compile="no", products="stock")
    for length, each in zip(lengths, found, strict=True):
        assert relative(each, filled(ours, length)) < 1e-5, length


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("lengths", [[1, 64, 1030], [700, 3, 128], [512, 513, 255]], ids=str)
def test_rows_of_very_different_lengths(lengths, threads):
    _, ours = native_pair(3, 1100, kv_heads=1)
    found = filled(ours, lengths)
    ours.preallocate(3, 1100, compile="no", products="stock")
    assert relative(found, filled(ours, lengths)) < 1e-5


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129])
def test_prompts_across_the_borders_of_blocks(length):
    vanilla, ours = native_pair(3, 160)
    assert_same_logits(vanilla, ours, prompt("padded", length - 1), [1, 1, 5, 1, 1])


def test_the_number_of_threads_may_change_between_steps():
    vanilla, ours = native_pair(1, 700, kv_heads=1)
    inputs = prompt("one", 600)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    ours.prefill(ids, mask)
    before = torch.get_num_threads()
    try:
        for count in (1, 3, 2, 1):
            torch.set_num_threads(count)
            ids, mask = torch.cat((ids, ids[:, :1]), 1), torch.cat((mask, mask[:, :1]), 1)
            assert relative(ours.step(ids[:, -1:]), vanilla_logits(vanilla, ids, mask, 1)) < 1e-5
    finally:
        torch.set_num_threads(before)


_MANY_THREADS = """
import torch
from tests.test_native_step import filled, native_pair, relative
_, ours = native_pair(1, 26000, kv_heads=1, num_hidden_layers=1)
torch.set_num_threads(1)
expected = filled(ours, [25900])
torch.set_num_threads(100)
found = filled(ours, [25900])
assert relative(found, expected) < 1e-5, relative(found, expected)
"""


@pytest.mark.usefixtures("forked")
def test_more_threads_than_64_share_a_long_context():
    """In a process of its own: writing past the end of an array may end one."""
    done = subprocess.run([sys.executable, "-c", _MANY_THREADS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-500:]}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("changes", [{}, {"kv_heads": 1, "head_dim": 96}, {"attention_bias": True}], ids=str)
def test_half_precision_is_no_further_from_fp32_than_vanilla(changes, batch, dtype):
    """The weights are half-precision numbers in both, so that only the computing differs."""
    wide, ours = pair(initializer_range=0.1, **changes)
    wide.to(dtype).float(), ours.to(dtype)
    theirs, _ = pair(initializer_range=0.1, **changes)
    theirs.to(dtype)
    inputs = prompt(batch)
    ours.preallocate(inputs["input_ids"].shape[0], 128, compile="native")
    found, ids, mask = stepped(ours, inputs, [1] * 100)
    assert ours._engine._native is not None and found.dtype == dtype
    logits = [vanilla_logits(model, ids, mask, 100).flatten(0, 1) for model in (theirs, wide)]
    assert teacher_forced_rms(found.flatten(0, 1), *logits) <= 1.1


@pytest.mark.parametrize("counts", [[8] * 12, [4, 5, 16, 3, 2, 17, 20, 21], [64, 32, 4]], ids=str)
def test_steps_of_several_tokens_in_bf16_are_no_further_from_fp32_than_vanilla(counts):
    """From four rows on they are multiplied in a matrix unit where there is one, which takes up to 64."""
    wide, ours = pair(initializer_range=0.1)
    wide.to(torch.bfloat16).float(), ours.to(torch.bfloat16)
    theirs, _ = pair(initializer_range=0.1)
    theirs.to(torch.bfloat16)
    ours.preallocate(1, 128, compile="native")
    found, ids, mask = stepped(ours, prompt("one"), counts)
    assert ours._engine._native.most_rows == (64 if native.has_matrix_unit else 16)
    logits = [vanilla_logits(model, ids, mask, sum(counts)).flatten(0, 1) for model in (theirs, wide)]
    assert teacher_forced_rms(found.flatten(0, 1), *logits) <= 1.1


# text


@pytest.mark.parametrize("batch", ["one", "padded", "three"])
@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_text_is_vanillas(decoding, batch):
    vanilla, ours = native_pair(3)
    assert_same_text(vanilla, ours, prompt(batch), **decoding)


def test_an_early_stop_is_vanillas():
    vanilla, ours = native_pair()
    inputs = prompt("padded")
    text = generate(vanilla, inputs, max_new_tokens=40, **GREEDY)
    width = inputs["input_ids"].shape[1]
    eos = text[:, width + 6].tolist()
    options = {"eos_token_id": eos, "pad_token_id": 0, "max_new_tokens": 40, **GREEDY}
    assert generate(vanilla, inputs, **options).shape[1] < width + 40
    assert_same_text(vanilla, ours, inputs, **options)
    assert_same_text(vanilla, ours)


def test_no_reallocation_in_20_calls():
    vanilla, ours = native_pair(3, 96)
    engine = ours._engine

    def places():
        cache = engine.cache
        return [tensor.data_ptr() for tensor in (*cache.keys, *cache.values, cache.mask_B11S, cache.valid_past_index)]

    before = places(), engine._native, engine.weights, engine.reallocations
    for call in range(20):
        length, new = max(3 + 4 * call, 4), 1 + (call * 7) % 20
        inputs = prompt(("one", "padded", "three")[call % 3], length, seed=call)
        decoding = SAMPLED if call % 2 else GREEDY
        assert_same_text(vanilla, ours, inputs, **{"max_new_tokens": min(new, 96 - length), **decoding})
    assert before[0] == places() and engine.reallocations == before[3]
    assert engine._native is before[1] and engine.weights is before[2]


# what is rebound


def test_weights_that_change_in_place_are_seen():
    vanilla, ours = native_pair()
    assert_same_text(vanilla, ours)
    kept = ours._engine._native
    with torch.no_grad():
        for model in (vanilla, ours):
            model.model.layers[0].self_attn.k_proj.weight.mul_(0.5)
            model.model.layers[1].post_attention_layernorm.weight.mul_(1.5)
            model.model.embed_tokens.weight[7:90].mul_(0.7)
            model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    assert_same_text(vanilla, ours)
    assert ours._engine._native is kept


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_dict_is_used(assign):
    _, ours = native_pair()
    other, _ = pair(seed=1)
    ours.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=assign)
    assert_same_text(other, ours)


def test_replaced_tensors_are_used():
    """One of each kind that the step reads: norms, embedding, head, a projection."""
    vanilla, ours = native_pair()
    for name in ("model.norm", "model.layers.1.input_layernorm", "model.embed_tokens", "lm_head"):
        for model in (vanilla, ours):
            torch.manual_seed(4)
            module = model.get_submodule(name)
            module.weight = torch.nn.Parameter(torch.rand_like(module.weight) + 0.1)
        assert_same_text(vanilla, ours)


REPLACED = {
    "assigned state dict": lambda model: model.load_state_dict(
        {name: value.clone() for name, value in model.state_dict().items()}, assign=True
    ),
    "cast": lambda model: model.to(torch.bfloat16),
}


@pytest.mark.parametrize("how", REPLACED)
def test_what_was_replaced_is_not_held(how):
    _, ours = native_pair()
    old = [StorageWeakRef(parameter.untyped_storage()) for parameter in ours.parameters()]
    REPLACED[how](ours)
    assert all(storage.expired() for storage in old), "old and new weights are held at once"


def test_free_and_a_new_reservation():
    vanilla, ours = native_pair()
    assert_same_text(vanilla, ours)
    ours.free()
    assert ours._engine._native is None and ours.valid_past_index is None
    assert_same_text(vanilla, ours, path="preallocated on first use, no compile")
    ours.preallocate(1, 40, compile="native")
    assert_same_text(vanilla, ours, prompt("one"))
    ours.preallocate(3, 80, compile="no", products="stock")
    assert_same_text(vanilla, ours, path="preallocated, no compile")
    ours.preallocate(3, 50, compile="native")
    assert_same_text(vanilla, ours)


@pytest.mark.parametrize("rope", ["llama3", "dynamic"])  # the second cannot be one call, the original can again
def test_another_rotary_module_is_used(rope):
    vanilla, ours = native_pair()
    before = generate(vanilla, prompt("padded"), max_new_tokens=NEW, **GREEDY)
    originals = [model.model.rotary_emb for model in (vanilla, ours)]
    for model in (vanilla, ours):
        model.model.rotary_emb = LlamaRotaryEmbedding(config(rope=rope, max_position_embeddings=8))
    stateful = "preallocated, no compile (the native step is not possible: rope_type 'dynamic' depends on"
    assert_same_text(vanilla, ours, path=stateful if rope == "dynamic" else "preallocated, native step")
    assert not torch.equal(generate(vanilla, prompt("padded"), max_new_tokens=NEW, **GREEDY), before)
    for model, original in zip((vanilla, ours), originals, strict=True):
        model.model.rotary_emb = original
    assert_same_text(vanilla, ours)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["lm_head"]], ids=str)
def test_an_adapter_takes_the_python_step_until_it_is_merged(targets):
    peft = pytest.importorskip("peft")
    vanilla, ours = native_pair()
    assert_same_text(vanilla, ours)
    before = generate(vanilla, prompt("padded"), max_new_tokens=NEW, **GREEDY)
    settings = peft.LoraConfig(r=4, lora_alpha=32, target_modules=targets, init_lora_weights=False)
    adapted = []
    for model in (vanilla, ours):
        torch.manual_seed(3)
        adapted.append(peft.get_peft_model(model, settings).eval())
    texts = [generate(model, prompt("padded"), max_new_tokens=NEW, **GREEDY) for model in adapted]
    assert torch.equal(*texts) and not torch.equal(texts[0], before)
    reason = "a Linear of peft takes part"
    assert ours.path.startswith(f"preallocated, no compile (the native step is not possible: {reason})")
    for model in adapted:
        model.merge_and_unload()
    assert_same_text(vanilla, ours)


@pytest.mark.parametrize("interrupt", ["load_state_dict", "to"])
def test_step_goes_on_after_the_weights_were_rebound(interrupt):
    """The values are what they were, so nothing speaks against going on."""
    vanilla, ours = native_pair(1)
    ids = prompt("one")["input_ids"]
    ours.prefill(ids)
    if interrupt == "to":
        ours.to("cpu")
    else:
        ours.load_state_dict(vanilla.state_dict())
    ids = torch.cat((ids, torch.tensor([[9]])), 1)
    assert relative(ours.step(ids[:, -1:]), vanilla_logits(vanilla, ids, torch.ones_like(ids), 1)) < 1e-5


# what is refused


@pytest.mark.parametrize("wrong", [VOCAB, -1, 10**9, -(10**12)])
@pytest.mark.parametrize("place", [0, 4])
def test_ids_out_of_range_are_refused_and_change_nothing(wrong, place):
    vanilla, ours = native_pair(3)
    inputs = prompt("padded")
    ours.prefill(**inputs)
    ids = torch.full((3, 5), 7)
    ids[2, place] = wrong
    before = ours.valid_past_index.clone()
    with pytest.raises((IndexError, RuntimeError), match="vocabulary"):
        ours.step(ids)
    assert torch.equal(ours.valid_past_index, before)
    ids[2, place] = 8
    found = ours.step(ids)
    all_ids = torch.cat((inputs["input_ids"], ids), 1)
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(ids)), 1)
    assert relative(found, vanilla_logits(vanilla, all_ids, mask, 5)) < 1e-5


def test_a_refused_id_takes_no_room():
    _, ours = native_pair(1, 16)
    ours.prefill(torch.full((1, 15), 7))
    with pytest.raises((IndexError, RuntimeError)):
        ours.step(torch.tensor([[VOCAB]]))
    ours.step(torch.tensor([[7]]))


def test_a_full_cache_is_refused():
    _, ours = native_pair(1, 16)
    ours.prefill(torch.full((1, 14), 7))
    ours.step(torch.tensor([[7]]))
    with pytest.raises(ValueError, match="cache of 16 positions is full"):
        ours.step(torch.tensor([[7, 7]]))
    ours.step(torch.tensor([[7]]))
    with pytest.raises(ValueError, match="cache of 16 positions is full"):
        ours.step(torch.tensor([[7]]))
    run, reserved = ours._engine._native, ours._engine.cache.shape.reserved_length
    ours._engine.cache.set_valid_past(torch.tensor([reserved]))
    with pytest.raises(RuntimeError, match="row 0 of the cache is full"):
        run(torch.tensor([[7]]))


@pytest.mark.parametrize("ids", [torch.zeros(2, 1, dtype=torch.int64), torch.zeros(3, 1), torch.zeros(3).long()])
def test_the_step_refuses_ids_of_another_form(ids):
    _, ours = native_pair(3)
    with pytest.raises(RuntimeError, match="Step: ids"):
        ours._engine._native(ids)


REFUSED = {
    "dynamic": ({"rope": "dynamic"}, 1, "rope_type 'dynamic' depends on the longest position"),
    "longrope": ({"rope": "longrope"}, 1, "rope_type 'longrope' depends on the longest position"),
    "head_dim": ({"head_dim": 8}, 1, "head_dim is 8"),
    "activation": ({"hidden_act": "gelu"}, 1, "the activation is not silu"),
    "rows": ({}, 17, "17"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_one_call_is_refused_in_one_sentence(case):
    changes, rows, reason = REFUSED[case]
    _, ours = pair(**changes)
    with pytest.raises(ValueError, match="compile='native' cannot be honoured: ") as refusal:
        ours.preallocate(rows, 64, compile="native")
    words = str(refusal.value)
    assert reason in words and "\n" not in words and len(words) < 200


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_keeps_the_earlier_reservation(case):
    changes, rows, _ = REFUSED[case]
    _, ours = pair(**changes)
    ours.preallocate(1, 32, compile="no", products="stock")
    cache = ours._engine.cache
    with pytest.raises(ValueError):
        ours.preallocate(rows, 64, compile="native")
    assert ours._engine.cache is cache and ours._engine.explicit


def test_a_double_model_is_refused():
    _, ours = pair()
    ours.double()
    with pytest.raises(ValueError, match=r"compile='native' cannot be honoured: the model is in torch\.float64"):
        ours.preallocate(1, 64, compile="native")


@pytest.mark.parametrize(
    ("switches", "named"),
    [
        ({"products": "packed"}, "products='packed'"),
        ({"products": "stock"}, "products='stock'"),
        ({"fuse": "qkv"}, "fuse='qkv'"),
        ({"fuse": "no"}, "fuse='no'"),
        ({"fuse": "no", "products": "native"}, "fuse='no'"),
    ],
    ids=str,
)
def test_switches_that_contradict_it_are_refused(switches, named):
    with pytest.raises(ValueError, match=f"compile='native' brings its own products: {named} cannot be honoured"):
        fastllama.FastConfig(compile="native", **switches)


@pytest.mark.parametrize("products", ["auto", "native"])
def test_switches_that_agree_with_it_are_taken(products):
    assert fastllama.FastConfig(compile="native", products=products).compile == "native"


def test_a_model_without_a_reservation_never_takes_it():
    vanilla, ours = pair()
    assert_same_text(vanilla, ours, path="preallocated on first use, no compile")
