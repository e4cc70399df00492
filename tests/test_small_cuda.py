"""Small weights on an NVIDIA GPU: by torch's kernels, or as a compiled step reads them; float8 where the GPU has it."""

import pytest
import torch

from fastllama.kernels.small_kinds import SMALL_KINDS
from fastllama.kernels.small_packed import packed_obstacle
from fastllama.kernels.small_product import dequantise, quantise
from fastllama.kernels.tune import Chooser
from fastllama.model.small_linear import small_tensors
from tests import small
from tests.tiny import GREEDY, VOCAB, generate, prompt

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
NEW = 8
HAS_FLOAT8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
FLOAT8 = pytest.param("float8", marks=pytest.mark.skipif(not HAS_FLOAT8, reason="the GPU has no float8"))


def on_gpu(folder, weights: str, dtype: torch.dtype):
    return small.load(folder, weights, dtype=dtype, device_map={"": "cuda"})


def inputs(batch: str) -> dict:
    return {name: value.cuda() for name, value in prompt(batch).items()}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    return small.write(tmp_path_factory.mktemp("small"), tie_word_embeddings=request.param, attention_bias=True)


@pytest.mark.parametrize("compile", ["no", "static", "dynamic"])
@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("weights", ["int8", "int4", "int4-g64", FLOAT8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_those_of_the_expanded_weights(compile, batch, weights, dtype, folder):
    ours = on_gpu(folder, weights, dtype)
    ours.preallocate(1 if batch == "one" else 3, 32, compile=compile, bucket=16)
    asked = inputs(batch)
    tokens = torch.randint(3, VOCAB, (len(asked["input_ids"]), NEW), generator=torch.Generator().manual_seed(8)).cuda()
    exact = small.teacher_forced(small.specification(ours, torch.float64).cuda(), asked, tokens).double()
    logits = small.teacher_forced(ours, asked, tokens).double()
    off = (logits - exact).square().mean().sqrt()
    if dtype == torch.float32:
        assert off < 1e-4 * exact.std()
    else:
        vanilla = small.teacher_forced(small.specification(ours).cuda(), asked, tokens).double()
        assert off <= 1.2 * (vanilla - exact).square().mean().sqrt()
    assert " small " in ours._engine.words()


@pytest.mark.parametrize(("kind", "compile"), [("expanded", "static"), ("packed", "no"), ("summed", "static")])
@pytest.mark.parametrize("weights", ["int8", "int4", "int4-g64", FLOAT8])
def test_each_formulation_gives_these_logits_and_the_weights_back(kind, compile, weights, folder, monkeypatch):
    if kind == "packed" and weights == "float8":
        pytest.skip("torch has no kernel for it")
    times = lambda self, work, names: {name: float(name != kind) for name in names}  # noqa: E731
    monkeypatch.setattr(Chooser, "_measure_small", times)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder) + "-cache-" + kind)
    ours = on_gpu(folder, weights, torch.bfloat16)
    before = [x.clone() for x in small_tensors(ours)]
    ours.preallocate(3, 32, compile=compile, bucket=16)
    assert f" small {kind}" in ours._engine.words()
    asked = inputs("padded")
    tokens = torch.randint(3, VOCAB, (3, NEW), generator=torch.Generator().manual_seed(8)).cuda()
    exact = small.teacher_forced(small.specification(ours, torch.float64).cuda(), asked, tokens).double()
    logits = small.teacher_forced(ours, asked, tokens).double()
    vanilla = small.teacher_forced(small.specification(ours).cuda(), asked, tokens).double()
    # int4's scales have 8 bits in torch's kernel.
    assert (logits - exact).square().mean().sqrt() <= 1.5 * (vanilla - exact).square().mean().sqrt()
    ours.free()
    for one, other in zip(before, small_tensors(ours), strict=True):
        assert one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("columns", [2048, 5632, 4096 + 128, 14336])
@pytest.mark.parametrize("weights", ["int8", "int4", "int4-g64", "int4-g128"])
def test_torchs_kernels_take_the_columns_of_real_models(weights, columns):
    device = torch.device("cuda")
    assert packed_obstacle(weights, device, torch.bfloat16, columns) is None
    held = quantise(torch.randn(272, columns, device=device), weights)
    packed = SMALL_KINDS["packed"](*held, None, weights, 272, columns)
    weight = dequantise(*held, weights, 272, columns, torch.float32)
    for rows in (1, 5, 16, 40, 300):
        x = torch.randn(rows, columns, device=device).bfloat16()
        expected = x.float() @ weight.T
        assert (packed(x).float() - expected).abs().max() < 0.01 * expected.abs().max()


def test_what_was_chosen_is_measured_and_remembered(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours = on_gpu(folder, "int4", torch.bfloat16)
    ours.preallocate(1, 32, compile="static", bucket=16)
    (remembered,) = tmp_path.rglob("products/*.json")
    assert "compile static" in remembered.read_text() and torch.cuda.get_device_name() in remembered.read_text()


@pytest.mark.parametrize("weights", ["int8", "int4", FLOAT8])
def test_a_saved_model_loads_bit_for_bit(weights, folder, tmp_path):
    ours = on_gpu(folder, weights, torch.bfloat16)
    ours.save_pretrained(tmp_path)
    again = type(ours).from_pretrained(tmp_path, device_map={"": "cuda"})
    for one, other in zip(small_tensors(ours), small_tensors(again), strict=True):
        assert one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_a_move_is_seen_by_captured_graphs(folder):
    ours = on_gpu(folder, "int8", torch.float32)
    ours.preallocate(1, 32, compile="static", bucket=16)
    expected = generate(ours, inputs("one"), max_new_tokens=NEW, **GREEDY)
    ours.cpu()
    ours.cuda()
    assert torch.equal(generate(ours, inputs("one"), max_new_tokens=NEW, **GREEDY), expected)


@pytest.mark.skipif(HAS_FLOAT8, reason="the GPU has float8")
def test_float8_is_refused_where_the_gpu_has_none(folder):
    with pytest.raises(ValueError, match="weights='float8' cannot be honoured: the GPU has capability"):
        on_gpu(folder, "float8", torch.bfloat16)


def test_native_products_are_refused(folder):
    ours = on_gpu(folder, "int8", torch.float32)
    with pytest.raises(ValueError, match="products='native' cannot be honoured"):
        ours.preallocate(1, 32, products="native")
