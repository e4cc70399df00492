"""A prompt's attention in C++: torch's own in fp32 is the specification; when it is chosen, and what the path says."""

import pytest
import torch
import torch.nn.functional as F

from fastllama.kernels import native, tune
from fastllama.kernels.attention import NATIVE_HEAD_DIMS, attend_prompt
from fastllama.kernels.tune import Chooser
from tests.tiny import GREEDY, generate, pair, prompt


@pytest.fixture(scope="module", autouse=True)
def built():
    if native.load() is not None:
        pytest.skip(native.load())


def tensors(dtype, batch=1, tokens=9, heads=4, kv_heads=2, dim=32, past=0, spare=3):
    """query [B, Q, N, D] as a part of a fused product, keys and values [B, K, S, D] as a cache holds them."""
    torch.manual_seed(tokens + dim + past)
    query = torch.randn(batch, tokens, heads + kv_heads, dim).to(dtype)[:, :, :heads]
    stored = (torch.randn(batch + 1, kv_heads, past + tokens + spare, dim).to(dtype) for _ in range(2))
    return query, *stored


def specification(query, keys, values, past, scale):
    batch, tokens = query.shape[:2]
    seen = torch.ones(tokens, past + tokens, dtype=torch.bool).tril(past)
    keys, values = (x[:batch, :, : past + tokens] for x in (keys, values))
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), keys, values, attn_mask=seen, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(2)


SHAPES = {
    "one token": {"tokens": 1},
    "one token after others": {"tokens": 1, "past": 70},
    "one token of a group of 8": {"tokens": 1, "past": 150, "heads": 16, "kv_heads": 2},
    "three tokens of a group of 2": {"tokens": 3, "past": 126, "heads": 4, "kv_heads": 2},
    "a whole block": {"tokens": 64},
    "a block and one": {"tokens": 65, "batch": 2},
    "an odd number in the last block": {"tokens": 75, "past": 64},
    "a group of 8": {"tokens": 70, "heads": 16, "kv_heads": 2},
    "a head each": {"tokens": 130, "heads": 3, "kv_heads": 3, "batch": 2},
    "no position to spare": {"tokens": 33, "past": 31, "spare": 0},
    **{f"head dim {dim}": {"tokens": 40, "dim": dim, "past": 30} for dim in NATIVE_HEAD_DIMS},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_torchs_attention(shape, dtype):
    past, scale = shape.get("past", 0), 0.3
    query, keys, values = tensors(dtype, **shape)
    ours = attend_prompt(query, keys, values, past, scale)
    wide = specification(*(x.float() for x in (query, keys, values)), past, scale)
    assert ours.dtype == dtype and ours.shape == wide.shape
    if dtype == torch.float32:
        torch.testing.assert_close(ours, wide, rtol=1e-5, atol=2e-6)
        return
    theirs = specification(query, keys, values, past, scale)
    error, allowed = ((x.float() - wide).square().mean().sqrt() for x in (ours, theirs))
    assert error <= 1.1 * allowed + 1e-6


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_positions_behind_the_last_token_are_not_read(dtype, tokens):
    query, keys, values = tensors(dtype, tokens=390, heads=8, kv_heads=1, spare=20)
    query = query[:, :tokens]
    first = attend_prompt(query, keys, values, 340 - tokens, 0.3)
    keys[:, :, 340:], values[:, :, 340:] = float("nan"), float("nan")
    assert first.isfinite().all()
    assert torch.equal(attend_prompt(query, keys, values, 340 - tokens, 0.3), first)


def test_scores_far_apart_stay_finite():
    query, keys, values = tensors(torch.float32, tokens=80)
    query *= 1e3
    out = attend_prompt(query, keys, values, 0, 1.0)
    torch.testing.assert_close(out, specification(query, keys, values, 0, 1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q, k, v, 5), "do not fit keys"),
        (lambda q, k, v: (q, k, v, -1), "do not fit keys"),
        (lambda q, k, v: (q, k.half(), v.half(), 0), "layout"),
        (lambda q, k, v: (q[..., :24], k[..., :24].contiguous(), v[..., :24].contiguous(), 0), "head dim 24"),
        (lambda q, k, v: (q, k.transpose(1, 2).contiguous().transpose(1, 2), v, 0), "one after the other"),
        (lambda q, k, v: (q[:, :, :3], k, v, 0), "do not fit keys"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    *inputs, past = change(*tensors(torch.float32))
    with pytest.raises(RuntimeError, match=words):
        attend_prompt(*inputs, past, 1.0)


# choosing


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def chooser(wanted: str, dtype=torch.float32) -> Chooser:
    return Chooser(wanted, 1, 0, torch.ones(4, 4, dtype=dtype))


def test_the_faster_one_is_chosen_and_remembered(folder, monkeypatch):
    for best, other in (("native", "stock"), ("stock", "native")):
        calls = []

        def measure(heads, kv_heads, dim, dtype, best=best, other=other, calls=calls):
            calls.append((heads, kv_heads, dim))
            return {best: 1.0, other: 2.0}

        monkeypatch.setattr(tune, "_time_attention", measure)
        heads = 4 if best == "native" else 8
        # A later chunk needs no mask in C++, however the times fall: what is predicted of its memory holds.
        assert [chooser("auto").attention(heads, 2, 32) for _ in range(2)] == [(best, "native")] * 2
        assert calls == [(heads, 2, 32)]
    assert chooser("native").attention(8, 2, 32) == ("native", "native")  # as asked, whatever is faster
    assert chooser("stock").attention(4, 2, 32) == ("stock", "stock")


def test_what_it_is_not_built_for_is_torchs(folder):
    assert chooser("native").attention(4, 2, 24) == ("stock", "stock")
    assert chooser("auto", torch.float64).attention(4, 2, 32) == ("stock", "stock")


@pytest.mark.parametrize("products", ["native", "stock"])
def test_the_path_says_which_runs(products):
    vanilla, ours = pair()
    inputs = prompt("padded", 40)
    ours.preallocate(batch_size=3, cache_length=64, products=products)
    outputs = [generate(model, inputs, max_new_tokens=8, **GREEDY) for model in (vanilla, ours)]
    assert torch.equal(*outputs)
    assert ("C++ prompt attention" in ours.path) == (products == "native")


@pytest.mark.parametrize("fastest", ["stock", "native"])
def test_chunks_are_exact_whichever_is_faster(fastest, folder, monkeypatch):
    monkeypatch.setattr(tune, "_time_attention", lambda *sizes: {"stock": 2.0, "native": 2.0} | {fastest: 1.0})
    vanilla, ours = pair()
    inputs = prompt("padded", 40)
    ours.preallocate(batch_size=3, cache_length=64, prefill_chunk=16)
    outputs = [generate(model, inputs, max_new_tokens=8, **GREEDY) for model in (vanilla, ours)]
    assert torch.equal(*outputs)
    first, later = "C++ prompt attention", "C++ attention of a prompt's later chunks"
    assert [words in ours.path for words in (first, later)] == [fastest == "native", fastest == "stock"]
