"""Generating with weights of few bits gives what vanilla transformers gives with the expanded weights."""

import copy
import itertools
import pickle

import pytest
import torch

import fastllama
from fastllama import FastConfig
from fastllama.kernels import native
from fastllama.model.small_linear import SmallEmbedding, SmallHead, SmallLinear, small_tensors
from fastllama.model.weights import Fused, Parallel
from tests import small
from tests.tiny import GREEDY, SAMPLED, VOCAB, config, generate, prompt

NEW = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHTS = ("int8", "int4", "int4-g64")
needs_native = pytest.mark.skipif(native.load() is not None, reason=f"no C++: {native.load()}")
TOKENS = torch.randint(3, VOCAB, (3, NEW), generator=torch.Generator().manual_seed(8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Float checkpoints by (tied, biased)."""
    root = tmp_path_factory.mktemp("small")
    return {
        (tied, biased): small.write(
            root / f"{tied}{biased}", tie_word_embeddings=tied, attention_bias=biased, mlp_bias=biased
        )
        for tied, biased in itertools.product((False, True), repeat=2)
    }


def rms(logits: torch.Tensor, reference: torch.Tensor) -> float:
    return (logits.double() - reference.double()).square().mean().sqrt().item()


def check(ours, batch: str, dtype: str) -> float:
    """Teacher-forced logits are the same in fp32; in halves they are so many times as far from it as vanilla's own."""
    inputs = prompt(batch)
    tokens = TOKENS[: inputs["input_ids"].shape[0]]
    logits = small.teacher_forced(ours, inputs, tokens)
    exact = small.teacher_forced(small.specification(ours, torch.float64), inputs, tokens)
    if dtype == "fp32":  # the C++ product takes x in 16 bits
        assert rms(logits, exact) < (1e-5 if "expanded" in ours._engine.words() else 3e-4) * exact.std()
        return 1.0
    over = rms(logits, exact) / rms(small.teacher_forced(small.specification(ours), inputs, tokens), exact)
    # Over these few logits two equally good roundings differ by some 15 % (one standard deviation).
    assert over < 1.6
    return over


@pytest.mark.parametrize(
    "how",
    [
        {"products": "stock"},
        pytest.param({"products": "native"}, marks=needs_native),
        pytest.param({"compile": "native"}, marks=needs_native),
    ],
    ids=["stock", "native", "native step"],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_on_the_whole_halves_are_no_further_from_fp32_than_vanillas(dtype, how, folders):
    found = []
    for folder, weights in itertools.product(folders.values(), WEIGHTS):
        ours = small.load(folder, weights, dtype=DTYPES[dtype])
        for batch, rows in (("one", 1), ("padded", 3)):
            ours.preallocate(rows, 32, **how)
            found.append(check(ours, batch, dtype))
    assert sum(found) / len(found) < 1.05


@pytest.mark.parametrize("products", ["stock", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_those_of_the_expanded_weights(dtype, weights, batch, tied, biased, products, folders):
    ours = small.load(folders[tied, biased], weights, dtype=DTYPES[dtype])
    ours.preallocate(1 if batch == "one" else 3, 32, products=products)
    check(ours, batch, dtype)
    words = ours._engine.words()
    assert f"weights {'int4-g32' if weights == 'int4' else weights}, fused qkv, gate+up" in words
    assert f"9 small {'native' if products == 'native' else 'expanded'}" in words


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
@needs_native
def test_the_native_step_takes_them(dtype, weights, batch, tied, biased, folders):
    ours = small.load(folders[tied, biased], weights, dtype=DTYPES[dtype])
    ours.preallocate(1 if batch == "one" else 3, 32, compile="native")
    check(ours, batch, dtype)
    assert "native step" in ours._engine.words()


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("batch", ["one", "three", "padded"])
@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tokens_are_those_of_the_expanded_weights(weights, batch, decoding, tied, folders):
    ours = small.load(folders[tied, True], weights)
    expected = generate(small.specification(ours), prompt(batch), max_new_tokens=NEW, **decoding)
    ours.preallocate(3, 32, products="stock")
    assert torch.equal(generate(ours, prompt(batch), max_new_tokens=NEW, **decoding), expected)
    ours.free()
    assert torch.equal(generate(ours, prompt(batch), max_new_tokens=NEW, num_beams=1, **decoding), expected)


# The others take the compiler too long for every day.
SLOW = [
    ("static", "int4", "one", False, "native"),
    ("static", "int8", "padded", True, "stock"),
    ("dynamic", "int8", "padded", False, "stock"),
    ("dynamic", "int4", "one", True, "stock"),
    ("dynamic", "int8", "padded", False, "native"),
]


@pytest.mark.parametrize(
    ("compile", "weights", "batch", "tied", "products"),
    [
        ("static", "int4", "one", False, "stock"),
        pytest.param("static", "int8", "padded", True, "native", marks=needs_native),
        *[pytest.param(*case, marks=pytest.mark.full) for case in SLOW],
    ],
)
def test_compiled_steps_take_them(compile, weights, batch, tied, products, folders):
    ours = small.load(folders[tied, True], weights)
    ours.preallocate(1 if batch == "one" else 3, 32, compile=compile, bucket=16, products=products)
    check(ours, batch, "fp32")


@pytest.mark.parametrize("compile", ["no", pytest.param("static", marks=pytest.mark.full)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_computes_what_it_means(compile, tied, dtype, folders, monkeypatch):
    """On a CPU, which a user is refused: the same torch code serves GPUs."""
    if compile == "static" and (dtype != "bf16" or tied):
        pytest.skip("one graph shows it")
    monkeypatch.setattr("fastllama.model.small_loading._require_float8", lambda devices: None)
    ours = small.load(folders[tied, True], "float8", dtype=DTYPES[dtype])
    assert ours.lm_head.format == "float8" and ours.lm_head.weight.dtype == torch.float8_e4m3fn
    ours.preallocate(3, 32, compile=compile, products="stock", bucket=16)
    check(ours, "padded", dtype)
    assert "weights float8, fused qkv, gate+up, products: 9 small expanded" in ours._engine.words()
    ours.to(torch.float64)
    assert ours.lm_head.weight.dtype == torch.float8_e4m3fn and ours.lm_head.weight_scale.dtype == torch.float32


def test_beam_search_and_forward_run_the_parents_code(folders):
    ours = small.load(folders[True, True], "int8")
    vanilla, inputs = small.specification(ours), prompt("padded")
    options = {"max_new_tokens": NEW, "num_beams": 2, "do_sample": False}
    assert torch.equal(generate(ours, inputs, **options), generate(vanilla, inputs, **options))
    assert ours.path.startswith("parent")
    # With gradients, which the C++ product has none of.
    logits = ours(**inputs).logits
    torch.testing.assert_close(logits, vanilla(**inputs).logits, rtol=1e-4, atol=1e-4)
    logits.sum().backward()
    assert ours.model.norm.weight.grad.isfinite().all()


# one storage


def storages(model) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in small_tensors(model)}


def test_fused_weights_are_one_storage_and_never_a_second_copy(folders):
    ours = small.load(folders[False, True], "int4")
    ours.preallocate(1, 32, products="stock")
    attention = ours.model.layers[0].self_attn
    joint = ours._engine.weights.blocks[0].qkv.joint
    for module in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert module.weight.untyped_storage().data_ptr() == joint.quants.untyped_storage().data_ptr()
        assert module.weight_scale.untyped_storage().data_ptr() == joint.scales.untyped_storage().data_ptr()
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in small_tensors(ours)}
    assert sum(sizes.values()) == sum(tensor.nbytes for tensor in small_tensors(ours))
    before = storages(ours)
    ours.preallocate(1, 40, products="stock")
    assert storages(ours) == before


def test_rows_that_fill_no_tiles_run_in_parallel(tmp_path):
    folder = small.write(tmp_path, head_dim=12, hidden_size=64, intermediate_size=128, vocab_size=VOCAB + 3)
    ours = small.load(folder, "int8")
    ours.preallocate(3, 32, products="stock")
    block = ours._engine.weights.blocks[0]
    assert isinstance(block.qkv, Parallel) and isinstance(block.gate_up, Fused)
    check(ours, "padded", "fp32")


def test_tied_embeddings_are_one_matrix(folders):
    ours = small.load(folders[True, False], "int4")
    assert isinstance(ours.lm_head, SmallHead) and isinstance(ours.model.embed_tokens, SmallEmbedding)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight and ours.model.embed_tokens.format == "int8"
    assert not any(name.startswith("lm_head") for name in ours.state_dict())
    untied = small.load(folders[False, False], "int4")
    assert type(untied.model.embed_tokens) is torch.nn.Embedding and untied.lm_head.format == "int8"


# what transformers and torch do with modules


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict", "assign"])
def test_copies_generate_the_same(how, tied, folders):
    ours = small.load(folders[tied, True], "int4")
    ours.preallocate(1, 32, products="stock")
    expected = generate(ours, prompt("one"), max_new_tokens=NEW, **GREEDY)
    if how in ("deepcopy", "pickle"):
        copied = copy.deepcopy(ours) if how == "deepcopy" else pickle.loads(pickle.dumps(ours))
    else:
        copied = small.load(folders[tied, True], "int4")
        for tensor in small_tensors(copied):
            tensor.zero_()
        copied.load_state_dict(ours.state_dict(), assign=how == "assign")
    copied.preallocate(1, 32, products="stock")
    assert torch.equal(generate(copied, prompt("one"), max_new_tokens=NEW, **GREEDY), expected)
    if tied:
        assert copied.lm_head.weight is copied.model.embed_tokens.weight
    if how in ("deepcopy", "pickle"):
        assert not storages(copied) & storages(ours)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_cast_leaves_quants_and_scales_alone(tied, folders):
    ours = small.load(folders[tied, True], "int4")
    ours.preallocate(3, 32, products="stock")
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    ours.to(torch.bfloat16)
    for name, tensor in ours.state_dict().items():
        is_small = name.endswith("weight_scale") or tensor.dtype == torch.uint8
        assert torch.equal(tensor, before[name]) if is_small else tensor.dtype == torch.bfloat16
    assert ours.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="call preallocate"):
        ours.prefill(**prompt("padded"))
    ours.preallocate(3, 32, products="stock")
    check(ours, "padded", "bf16")


def test_meta_and_empty_keep_the_dtypes(folders):
    ours = small.load(folders[True, False], "int4").to("meta")
    assert {tensor.dtype for tensor in small_tensors(ours)} == {torch.uint8, torch.float16, torch.float32}
    assert all(tensor.is_meta for tensor in small_tensors(ours))
    assert not any(tensor.is_meta for tensor in small_tensors(ours.to_empty(device="cpu")))


def test_training_is_refused_by_transformers(folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = small.load(folders[False, False], "int8")
    assert not ours.hf_quantizer.is_trainable
    with pytest.raises(ValueError, match="quantized"):
        transformers.Trainer(ours, transformers.TrainingArguments(tmp_path, report_to="none", use_cpu=True))


# how `fast` is remembered


def test_fast_is_the_default_of_preallocate_and_generate(folders):
    fast = FastConfig(weights="int8", bucket=16, fuse="qkv", products="stock")
    ours = fastllama.LlamaForCausalLM.from_pretrained(folders[False, False], fast=fast)
    generate(ours, prompt("one"), max_new_tokens=2, **GREEDY)
    assert ours._engine.config == fast and "fused qkv, products" in ours.path
    ours.preallocate(1, 32)
    assert ours._engine.config == fast
    ours.preallocate(1, 32, bucket=32)
    assert ours._engine.config == FastConfig(weights="int8", bucket=32, fuse="qkv", products="stock")
    ours.preallocate(1, 32, FastConfig())
    assert ours._engine.config == FastConfig()
    ours.free()
    assert copy.deepcopy(ours)._engine.config == fast
    plain = fastllama.LlamaForCausalLM.from_pretrained(folders[False, False], fast=FastConfig(bucket=16))
    plain.preallocate(1, 32, products="stock")
    assert plain._engine.config == FastConfig(bucket=16, products="stock")


@pytest.mark.parametrize("compile", ["static", "native"])
def test_generate_honours_what_fast_compiles(compile, folders):
    if compile == "native" and native.load() is not None:
        pytest.skip(native.load())
    # A layer that was compiled above.
    fast = FastConfig(weights="int8", compile=compile, bucket=16, products="auto" if native.load() else "native")
    ours = fastllama.LlamaForCausalLM.from_pretrained(folders[False, True], fast=fast)
    expected = generate(small.specification(ours), prompt("padded"), max_new_tokens=NEW, **GREEDY)
    assert torch.equal(generate(ours, prompt("padded"), max_new_tokens=NEW, **GREEDY), expected)
    assert ("native step" if compile == "native" else "static compile by layer") in ours.path


# what is refused


@pytest.mark.parametrize(("held", "asked"), [("int8", "int4"), ("int4", "int4-g64"), (None, "int8"), (None, "float8")])
def test_other_weights_than_the_models_are_refused(held, asked, folders):
    fast = None if held is None else FastConfig(weights=held)
    ours = fastllama.LlamaForCausalLM.from_pretrained(folders[False, False], fast=fast)
    with pytest.raises(ValueError, match=rf"weights='{asked}'.*from_pretrained\(.*fast="):
        ours.preallocate(1, 32, FastConfig(weights=asked))
    with pytest.raises(ValueError, match=r"as floats.*from_pretrained"):
        fastllama.LlamaForCausalLM(config()).eval().preallocate(1, 32, weights=asked)


@pytest.mark.parametrize("weights", ["int4", "int4-g32"])
def test_both_names_of_a_format_are_the_same(weights, folders):
    ours = small.load(folders[False, False], "int4")
    ours.preallocate(1, 32, weights=weights, products="stock")
    assert isinstance(ours.model.layers[0].mlp.up_proj, SmallLinear)


def test_packed_products_are_refused_where_torch_has_no_kernel(folders):
    ours = small.load(folders[False, False], "int4")
    ours.preallocate(1, 32, products="stock")
    with pytest.raises(ValueError, match=r"products='packed' cannot be honoured: weights in int4-g32 have no packed"):
        ours.preallocate(1, 32, products="packed")
    assert ours._engine.explicit  # the earlier reservation stands


def test_resizing_is_refused_before_anything_changes(folders):
    ours = small.load(folders[False, False], "int8")
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(400\) cannot be honoured"):
        ours.resize_token_embeddings(400)
    assert ours.model.embed_tokens.weight.shape[0] == VOCAB
    assert ours.resize_token_embeddings() is ours.model.embed_tokens


@needs_native
def test_a_small_checkpoint_is_multiplied_in_c_plus_plus_without_being_told(folders, tmp_path):
    small.load(folders[True, False], "int8").save_pretrained(tmp_path)
    ours = fastllama.LlamaForCausalLM.from_pretrained(tmp_path)
    generate(ours, prompt("one"), max_new_tokens=2, **GREEDY)
    assert "9 small native" in ours.path
