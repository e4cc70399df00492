"""Prompts of few tokens, which the native step takes in: the same logits, the same cache, and said in `path`."""

import pytest
import torch

from fastllama import FastConfig
from fastllama.kernels import native
from fastllama.model.native_step import NativeStep
from tests import small
from tests.tiny import GREEDY, VOCAB, generate, pair

pytestmark = pytest.mark.skipif(native.load() is not None, reason=f"no C++: {native.load()}")
SMALL = [{}, {"cache_k": "q4_0", "cache_v": "int8"}]


def inputs(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Rows of random tokens, padded on the left."""
    width, generator = max(lengths), torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : width - length] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.fixture
def passes(monkeypatch):
    """Tokens [B, Q] of each native call."""
    seen, call = [], NativeStep.__call__
    monkeypatch.setattr(NativeStep, "__call__", lambda self, ids: seen.append(tuple(ids.shape)) or call(self, ids))
    return seen


# (rows of the cache, lengths of the prompts, native calls)
CASES = [
    (1, [1], [(1, 1)]),
    (1, [16], [(1, 16)]),
    (1, [17], [(1, 16), (1, 1)]),
    (1, [32], [(1, 16), (1, 16)]),
    (1, [33], []),
    (3, [9, 2, 10], [(3, 5), (3, 5)]),
    (3, [11, 2, 9], []),
    (4, [3, 5], [(4, 4), (4, 1)]),  # two rows of the cache are idle
    (16, [1, 2] * 4, [(16, 1), (16, 1)]),
    (16, [1, 2, 2], []),  # too many rows would idle
]


@pytest.mark.parametrize("small", SMALL, ids=["floats", "small cache"])
@pytest.mark.parametrize(("rows", "lengths", "calls"), CASES, ids=str)
def test_a_short_prompt_is_read_by_native_steps(rows, lengths, calls, small, passes):
    vanilla, ours = pair(head_dim=32)
    given = inputs(lengths)
    ours.preallocate(rows, 64, compile="native", **small)
    found = ours.prefill(**given)
    assert passes == calls
    assert ours.valid_past_index.tolist() == lengths + [0] * (rows - len(lengths))
    if not small:
        with torch.no_grad():
            positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
            expected = vanilla(**given, position_ids=positions).logits[:, -1]
        assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-5
    tokens = torch.arange(3, 3 + len(lengths))[:, None]
    followed = ours.step(tokens)
    ours.preallocate(rows, 64, compile="no", **small)
    bound = 2e-2 if small else 1e-5  # a number that is rounded to few bits may fall to the other side
    for ours_now, other in ((ours.prefill(**given), found), (ours.step(tokens), followed)):
        assert ((ours_now - other).abs().max() / other.abs().max()).item() < bound


@pytest.mark.parametrize("lengths", [[1], [7], [32], [3, 5], [8, 1, 4], [2] * 16], ids=str)
@pytest.mark.parametrize("explicit", [True, False])
def test_the_text_is_vanillas(lengths, explicit, passes):
    vanilla, ours = pair()
    given = inputs(lengths)
    if explicit:
        ours.preallocate(len(lengths), 64, compile="native")
    expected = generate(vanilla, given, max_new_tokens=20, **GREEDY)
    assert torch.equal(generate(ours, given, max_new_tokens=20, **GREEDY), expected)
    assert bool(passes) == explicit
    most = max(16 // len(lengths), 1) * 2
    assert (f"prompts of up to {most} tokens in native steps" in ours.path) == explicit


def test_a_call_after_a_longer_one_sees_nothing_of_it(passes):
    vanilla, ours = pair()
    ours.preallocate(2, 64, compile="native")
    generate(ours, inputs([40, 33]), max_new_tokens=8, **GREEDY)
    passes.clear()
    for lengths in ([3, 6], [5], [2, 2]):
        expected = generate(vanilla, inputs(lengths), max_new_tokens=20, **GREEDY)
        assert torch.equal(generate(ours, inputs(lengths), max_new_tokens=20, **GREEDY), expected)
    assert passes[0] == (2, 6)


def test_what_goes_in_another_way(passes):
    """Chunks that are asked for, embeddings, and contexts that move."""
    vanilla, ours = pair()
    ours.preallocate(1, 64, compile="native", prefill_chunk=16)
    ours.prefill(**inputs([20]))
    assert not passes
    given = inputs([12])
    ours.preallocate(1, 64, compile="native")
    expected = generate(vanilla, given, max_new_tokens=4, **GREEDY)
    assert torch.equal(generate(ours, given, max_new_tokens=4, prefill_chunk_size=5, **GREEDY), expected)
    assert (1, 12) not in passes and (1, 5) not in passes
    embedded = {"inputs_embeds": vanilla.model.embed_tokens(given["input_ids"]).detach()}
    embedded["attention_mask"] = given["attention_mask"]
    passes.clear()
    found = ours.generate(**embedded, max_new_tokens=4, **GREEDY)
    assert torch.equal(found, expected[:, 12:]) and (1, 12) not in passes
    ours.preallocate(1, 64, compile="native", context_shift=True)
    passes.clear()
    assert torch.equal(generate(ours, given, max_new_tokens=4, **GREEDY), expected)
    assert (1, 12) not in passes and "prompts of up to" not in ours.path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", [None, "int8"])
def test_halves_and_small_weights(dtype, weights, passes, tmp_path):
    """Rounding alone tells them apart from what Python computes."""
    _, ours = pair(head_dim=32)
    ours = ours.to(dtype)
    if weights is not None:
        ours.save_pretrained(tmp_path)
        ours = type(ours).from_pretrained(tmp_path, fast=FastConfig(weights=weights), dtype=dtype)
    ours.preallocate(4, 64, compile="native")
    given = inputs([7, 2, 8])
    found = ours.prefill(**given).float()
    in_unit = native.has_matrix_unit and dtype == torch.bfloat16
    assert passes == ([(4, 8)] if in_unit else [(4, 4), (4, 4)])
    ours.preallocate(4, 64, compile="no")
    expected = ours.prefill(**given).float()
    rms = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert rms.item() < 5 * torch.finfo(dtype).eps  # of a few roundings in each of two layers


def test_a_prompt_that_fills_the_cache(passes):
    vanilla, ours = pair()
    given = inputs([32])
    ours.preallocate(1, 32, compile="native")
    expected = generate(vanilla, given, max_new_tokens=1, **GREEDY)
    assert torch.equal(generate(ours, given, max_new_tokens=1, **GREEDY), expected) and passes == [(1, 16), (1, 16)]


@pytest.mark.parametrize("length", [3, 33])
def test_ids_of_32_bits(length):
    _, ours = pair()
    given = inputs([length])
    ours.preallocate(1, 64, compile="native")
    expected = ours.prefill(**given)
    assert torch.equal(ours.prefill(given["input_ids"].int(), given["attention_mask"]), expected)


@pytest.mark.parametrize("place", [1, 20])  # in the first pass, and in the second
def test_an_id_beyond_the_vocabulary_is_refused(place):
    vanilla, ours = pair()
    ours.preallocate(1, 64, compile="native")
    given = inputs([24])
    wrong = given["input_ids"].clone()
    wrong[0, place] = VOCAB
    with pytest.raises(IndexError, match="not below the vocabulary"):
        ours.prefill(wrong)
    with pytest.raises(ValueError, match="call prefill"):
        ours.step(torch.tensor([[3]]))
    expected = generate(vanilla, given, max_new_tokens=20, **GREEDY)
    assert torch.equal(generate(ours, given, max_new_tokens=20, **GREEDY), expected)


def test_the_words_promise_it_only_where_it_happens():
    _, ours = pair()
    ours.preallocate(1, 64, compile="native", prefill_chunk=16)
    ours.generate(**inputs([4]), max_new_tokens=2, **GREEDY)
    assert "prompts of up to 16 tokens in native steps" in ours.path
    ours.generate_many([[3, 4, 5]], max_new_tokens=2, **GREEDY)
    assert "native step" in ours.path and "prompts of up to" not in ours.path


def test_prompts_over_small_weights_take_as_many_rows_as_floats(tmp_path, passes, monkeypatch):
    monkeypatch.setattr("fastllama.model.native_step.native_rows", lambda dtype: 64)
    ours = small.load(small.write(tmp_path, dtype=torch.bfloat16), "int8", dtype=torch.bfloat16)
    ours.preallocate(1, 64, compile="native")
    generate(ours, inputs([40]), max_new_tokens=3, **GREEDY)
    assert passes == [(1, 40), (1, 1), (1, 1)]
