"""Caches of any format in C++: what `store` writes, bit for bit, and attention to it, against torch's own in fp32.

Legend: B rows, Q query tokens, N query heads, K kv heads, S positions, D head dim.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastllama.kernels import native, stored
from fastllama.kernels.attention import NATIVE_HEAD_DIMS
from fastllama.kernels.blocks import FORMATS

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.fixture(scope="module", autouse=True)
def built():
    if native.load() is not None:
        pytest.skip(native.load())


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def takes(format: str, dim: int) -> bool:
    return FORMATS[format].is_float or format == "int8" or dim % 32 == 0


def parts_for(format: str, size: tuple, dtype: torch.dtype) -> list[torch.Tensor]:
    """Empty storage [B, K, S, n], with a head to spare behind each row, so that strides matter."""
    batch, heads, positions, dim = size
    sizes = stored.part_sizes(format, dim, dtype)
    return [torch.zeros(batch, heads + 1, positions, n, dtype=kind)[:, :heads] for n, kind in sizes]


def filled(format: str, x_BKSD: torch.Tensor) -> list[torch.Tensor]:
    parts = parts_for(format, x_BKSD.shape, x_BKSD.dtype)
    for part, numbers in zip(parts, stored.quantise(x_BKSD, format), strict=True):
        part.copy_(numbers)
    return parts


def attend(query, keys, key_format, values, value_format, seen, scale=0.3):
    return torch.ops.fastllama_native.attend_stored(query, keys, key_format, values, value_format, seen, scale)


def store(new_BQKD, parts, format, index_BQ):
    torch.ops.fastllama_native.store(new_BQKD, parts, format, index_BQ)


def specification(query_BQND, keys_BKSD, values_BKSD, seen_BQ, scale=0.3):
    batch, positions = query_BQND.shape[0], keys_BKSD.shape[2]
    mask = (torch.arange(positions) < seen_BQ[..., None])[:, None]
    out = F.scaled_dot_product_attention(
        query_BQND.transpose(1, 2), keys_BKSD[:batch], values_BKSD[:batch], attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(2)


def seen_by(batch: int, tokens: int, positions: int, *, ragged: bool) -> torch.Tensor:
    """Each row's tokens see one position more than the one before, as in a chunk after a past of its own."""
    past = torch.arange(batch) * (17 if ragged else 0)
    return torch.arange(positions - tokens + 1, positions + 1) - past[:, None].clamp(max=positions - tokens)


def assert_attends(key_format, value_format, dtype, batch, tokens, heads, kv_heads, dim, positions, *, ragged=True):
    generator = torch.Generator().manual_seed(tokens + dim + positions)
    query = torch.randn(batch, tokens, heads + 1, dim, generator=generator).to(dtype)[:, :, :heads]
    x = [torch.randn(batch + 1, kv_heads, positions, dim, generator=generator).to(dtype) for _ in range(2)]
    keys, values = filled(key_format, x[0]), filled(value_format, x[1])
    seen = seen_by(batch, tokens, positions, ragged=ragged)
    found = attend(query, keys, key_format, values, value_format, seen)
    formats = ((keys, key_format), (values, value_format))
    wide = specification(query.float(), *(stored.expand(*side, torch.float32) for side in formats), seen)
    assert found.dtype == dtype and found.shape == wide.shape
    if dtype == torch.float32:
        torch.testing.assert_close(found, wide, rtol=1e-5, atol=1e-5)
        return
    theirs = specification(query, *(stored.expand(*side, dtype) for side in formats), seen)
    error, allowed = ((each.float() - wide).square().mean().sqrt() for each in (found, theirs))
    assert error <= 1.1 * allowed + 1e-6


# attention

SHAPES = {
    "one head a group": (2, 3, 3),
    "two": (1, 4, 2),
    "five": (2, 10, 2),
    "eight": (1, 16, 2),
}


@pytest.mark.parametrize("dim", [32, 64, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read(format, dtype, dim):
    for (batch, heads, kv_heads), tokens in itertools.product(SHAPES.values(), (1, 2, 5, 64)):
        assert_attends(format, format, dtype, batch, tokens, heads, kv_heads, dim, 64 + tokens + dim // 2)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("format", ["f32", "f16", "bf16", "int8"])
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_a_head_dim_of_16(tokens, format, dtype):
    assert_attends(format, format, dtype, 2, tokens, 4, 2, 16, 150)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_prompts(format, dtype):
    assert_attends(format, format, dtype, 2, 300, 4, 2, 64, 300, ragged=False)
    assert_attends(format, format, dtype, 1, 300, 8, 1, 64, 431, ragged=False)


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize(
    "formats", list(itertools.permutations(["bf16", "f32", "int8", "q8_0", "q4_1", "q5_0"], 2)), ids="-".join
)
def test_keys_and_values_may_differ(formats, tokens):
    for dtype in DTYPES.values():
        assert_attends(*formats, dtype, 2, tokens, 4, 2, 64, 140)


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("format", ["bf16", "int8", "q8_0", "q4_1"])
@pytest.mark.parametrize("positions", [1, 63, 64, 65, 127, 128, 129, 512, 513, 1030])
def test_borders_of_blocks_and_shares(positions, format, threads):
    for dtype, heads in itertools.product(DTYPES.values(), (1, 2, 8)):
        assert_attends(format, format, dtype, 1, 1, heads, 1, 64, positions)


def test_rows_of_very_different_lengths():
    for format, tokens in itertools.product(("f32", "int8", "q8_0", "q4_0"), (1, 6)):
        query = torch.randn(3, tokens, 4, 64)
        x = torch.randn(3, 2, 1030, 64)
        parts, read = filled(format, x), stored.expand(filled(format, x), format, x.dtype)
        seen = torch.tensor([[1], [1020], [65]]) + torch.arange(tokens)
        torch.testing.assert_close(
            attend(query, parts, format, parts, format, seen),
            specification(query, read, read, seen),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_tokens_that_see_nothing_of_a_block(format, dtype, threads):
    for group, lengths in itertools.product((1, 2, 8), ([5, 70, 200], [200, 1, 64], [1030, 3, 520])):
        query = torch.randn(1, 3, 2 * group, 64).to(dtype)
        x = torch.randn(1, 2, 1030, 64).to(dtype)
        parts, seen = filled(format, x), torch.tensor([lengths])
        read = stored.expand(parts, format, torch.float32)
        bound = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            attend(query, parts, format, parts, format, seen).float(),
            specification(query.float(), read, read, seen),
            rtol=bound,
            atol=bound,
        )


@pytest.mark.parametrize("tokens", [1, 2, 3, 40])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_hidden_positions_weigh_nothing(format, dtype, tokens):
    query, x = torch.randn(1, tokens, 4, 64).to(dtype), torch.randn(1, 2, 200, 64).to(dtype)
    seen = seen_by(1, tokens, 110, ragged=False)
    first = attend(query, filled(format, x), format, filled(format, x), format, seen)
    x[:, :, 110:] = float("nan")
    assert torch.equal(attend(query, filled(format, x), format, filled(format, x), format, seen), first)


@pytest.mark.parametrize("tokens", [1, 2, 3, 40])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [0.0, 1e-7, 300.0])
def test_zeros_small_and_large_numbers(size, format, dtype, tokens):
    query, x = torch.randn(1, tokens, 4, 64).to(dtype), (size * torch.randn(1, 2, 90, 64)).to(dtype)
    parts, seen = filled(format, x), seen_by(1, tokens, 90, ragged=False)
    read = stored.expand(parts, format, dtype)
    found = attend(query, parts, format, parts, format, seen, 0.01)
    expected = specification(query.float(), read.float(), read.float(), seen, 0.01)
    bound = (1e-4 if dtype == torch.float32 else 10 * torch.finfo(dtype).eps) * read.float().abs().max().item()
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest number of the dtype
    assert (found.float() - expected).abs().max() <= bound + least


@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_so(bad, format, dtype, tokens):
    query, x = torch.randn(1, tokens, 4, 64).to(dtype), torch.randn(1, 2, 90, 64).to(dtype)
    seen, good = seen_by(1, tokens, 90, ragged=False), filled(format, x)
    spoilt = x.clone()
    spoilt[0, 0, 30, 5] = bad
    out = attend(query, good, format, filled(format, spoilt), format, seen).unflatten(2, (4, 64))
    assert not out[:, :, :2, 5].isfinite().any() and out[:, :, 2:].isfinite().all()
    if bad != bad:  # an infinite score may be one that is minus infinity, which weighs nothing
        out = attend(query, filled(format, spoilt), format, good, format, seen).unflatten(2, (4, 64))
        assert out[:, :, :2].isnan().all() and out[:, :, 2:].isfinite().all()
        query[0, 0, 3, 7] = bad
        out = attend(query, good, format, good, format, seen).unflatten(2, (4, 64))
        assert out[0, 0, 3].isnan().all() and out[0, :, :3].isfinite().all()


# store


def hard_numbers(dtype: torch.dtype, rows: int, dim: int) -> torch.Tensor:
    """[rows, D]: of every size, with zeros, ties, denormals, infinities and what is no number."""
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(rows, dim, generator=generator)
    x *= 10.0 ** torch.randint(-9, 4, (rows, 1), generator=generator)
    x[1::11] = torch.randint(-127, 128, (len(x[1::11]), dim), generator=generator) / 2  # ties
    x[2::11] = torch.randint(-8, 8, (len(x[2::11]), dim), generator=generator).float()
    x[3::11] *= torch.randint(0, 2, (len(x[3::11]), dim), generator=generator)
    x[4::11] = 0.0
    x[5::11, : dim // 2] = -0.0
    x[6::11] = x[6::11].abs()
    x[7::11] = -x[7::11].abs()
    x[8::11] *= 1e-38
    x[9::11, 3] = torch.tensor([float("nan"), float("inf"), -float("inf"), 65504.0]).repeat(rows)[: len(x[9::11])]
    x[10::11] = x[10::11, :1]
    x[12::22] *= 1e35
    return x.to(dtype)


@pytest.mark.parametrize("dim", [16, 32, 64, 96, 128, 48, 256])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_store_is_the_reference_bit_for_bit(format, dtype, dim):
    if not takes(format, dim):
        pytest.skip("blocks of 32 do not divide the head dim")
    batch, tokens, heads = 2, 275, 2
    new = hard_numbers(dtype, batch * tokens * heads, dim).view(batch, tokens, heads, dim)
    index = torch.stack(
        [torch.randperm(400, generator=torch.Generator().manual_seed(row))[:tokens] for row in range(2)]
    )
    parts, expected = (parts_for(format, (batch + 1, heads, 400, dim), dtype) for _ in range(2))
    store(new, parts, format, index)
    for part, numbers in zip(expected, stored.quantise(new, format), strict=True):
        for row in range(batch):
            part[row, :, index[row]] = numbers[row].transpose(0, 1)
    for found, wanted in zip(parts, expected, strict=True):
        if wanted.is_floating_point():
            nan = wanted.isnan()
            assert torch.equal(found.isnan(), nan)
            found, wanted = found.masked_fill(nan, 0), wanted.masked_fill(nan, 0)
            found, wanted = (x.contiguous().view(torch.uint8) for x in (found, wanted))
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
def test_store_takes_parts_of_a_fused_product(threads):
    fused = torch.randn(2, 300, 10, 64)
    for format in FORMATS:
        parts, expected = (parts_for(format, (2, 3, 300, 64), fused.dtype) for _ in range(2))
        index = torch.arange(300).expand(2, -1)
        store(fused[:, :, 4:7], parts, format, index)
        store(fused[:, :, 4:7].contiguous(), expected, format, index)
        assert all(torch.equal(*pair) for pair in zip(parts, expected, strict=True))


# refusals


def one(format="q8_0", dim=64, dtype=torch.float32):
    return torch.randn(1, 2, 4, dim).to(dtype), filled(format, torch.randn(1, 2, 9, dim).to(dtype))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, p, s: (q, p, "q8_1", p, "q8_0", s), "'q8_1' is not known"),
        (lambda q, p, s: (q, p[:1], "q8_0", p, "q8_0", s), "has 2 parts, not 1"),
        (lambda q, p, s: (q, p, "q4_0", p, "q8_0", s), "part 0 of the cache format q4_0"),
        (lambda q, p, s: (q, p, "int8", p, "q8_0", s), "part 1 of the cache format int8"),
        (lambda q, p, s: (q[..., :48], p, "q8_0", p, "q8_0", s), "48 is not a multiple of 32"),
        (lambda q, p, s: (q[:, :, :3], p, "q8_0", p, "q8_0", s), "do not fit keys"),
        (lambda q, p, s: (q, p, "q8_0", [x[:, :, :5] for x in p], "q8_0", s), "do not fit keys"),
        (lambda q, p, s: (q, p, "q8_0", p, "q8_0", s.int()), "seen must be int64"),
        (lambda q, p, s: (q, p, "q8_0", p, "q8_0", s[:, :1]), "seen must be int64"),
        (
            lambda q, p, s: (q, [x.transpose(1, 2).contiguous().transpose(1, 2) for x in p], "q8_0", p, "q8_0", s),
            "one after the other",
        ),
        (lambda q, p, s: (q.double(), p, "q8_0", p, "q8_0", s), "is not supported"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    with pytest.raises(RuntimeError, match=words):
        attend(*change(*one(), torch.tensor([[8, 9]])))


@pytest.mark.parametrize("number", [0, 10, -1])
def test_positions_outside_the_cache_are_refused(number):
    query, parts = one()
    with pytest.raises(IndexError, match="seen has"):
        attend(query, parts, "q8_0", parts, "q8_0", torch.tensor([[9, number]]))
    with pytest.raises(IndexError, match="index has"):
        store(query[:, :, :2], parts, "q8_0", torch.tensor([[8, number - 1 if number < 1 else 9]]))


def test_every_head_dim_is_built():
    for dim in NATIVE_HEAD_DIMS:
        query, parts = one("int8", dim)
        assert attend(query, parts, "int8", parts, "int8", torch.tensor([[8, 9]])).shape == (1, 2, 4 * dim)


# the whole decode step

HEADS, KV_HEADS, HIDDEN, WIDE, WORDS, POSITIONS, LAYERS = 4, 2, 48, 80, 101, 200, 2


def step_inputs(dim: int) -> dict:
    generator = torch.Generator().manual_seed(dim)
    sizes = [((HEADS + 2 * KV_HEADS) * dim, HIDDEN), (HIDDEN, HEADS * dim), (2 * WIDE, HIDDEN), (HIDDEN, WIDE)] * LAYERS
    matrices = [torch.randn(size, generator=generator) / size[1] ** 0.5 for size in [*sizes, (WORDS, HIDDEN)]]
    norms = [1 + 0.1 * torch.randn(HIDDEN, generator=generator) for _ in range(2 * LAYERS + 1)]
    angles = torch.arange(POSITIONS)[:, None] * 100.0 ** -(torch.arange(dim // 2) / (dim // 2))
    cos, sin = angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), 1)
    return {
        "matrices": matrices,
        "norms": norms,
        "embedding": torch.randn(WORDS, HIDDEN, generator=generator),
        "cos": cos,
        "sin": sin,
    }


def step_on(inputs, keys, values, formats, mask, valid_past_index, dim):
    matrices = [*inputs["matrices"], inputs["embedding"]]
    return torch.classes.fastllama_native.Step(
        matrices,
        [None] * len(matrices),
        [None] * len(matrices),
        [len(matrix) for matrix in matrices],
        [matrix.shape[1] for matrix in matrices],
        inputs["norms"],
        *([tuple(parts) for parts in side] for side in (keys, values)),
        list(formats),
        mask,
        valid_past_index,
        inputs["cos"],
        inputs["sin"],
        None,
        [HEADS, KV_HEADS, dim],
        [0.3, *[1e-5] * len(inputs["norms"])],
    )


def plain_step(inputs, ids_BQ, keys, values, formats, past_B, dim):
    """The same with an operator each; `keys` and `values` are each layer's parts."""
    norm = lambda x, i: F.rms_norm(x, (HIDDEN,), inputs["norms"][i], 1e-5)  # noqa: E731
    matrices, tokens = inputs["matrices"], ids_BQ.shape[1]
    index_BQ = past_B[:, None] + torch.arange(tokens)
    cos, sin = (inputs[name][index_BQ][:, :, None] for name in ("cos", "sin"))
    hidden = inputs["embedding"][ids_BQ]
    for layer in range(LAYERS):
        qkv, o, gate_up, down = matrices[4 * layer : 4 * layer + 4]
        heads = (norm(hidden, 2 * layer) @ qkv.T).unflatten(2, (-1, dim))
        turned = heads * cos + heads.roll(dim // 2, 3) * sin
        store(turned[:, :, HEADS : HEADS + KV_HEADS], keys[layer], formats[0], index_BQ)
        store(heads[:, :, HEADS + KV_HEADS :], values[layer], formats[1], index_BQ)
        mixed = attend(turned[:, :, :HEADS], keys[layer], formats[0], values[layer], formats[1], index_BQ + 1)
        hidden = hidden + mixed @ o.T
        gate, up = (norm(hidden, 2 * layer + 1) @ gate_up.T).chunk(2, -1)
        hidden = hidden + (F.silu(gate) * up) @ down.T
    return norm(hidden, 2 * LAYERS) @ matrices[-1].T


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize(
    "formats", [*((name, name) for name in FORMATS), ("int8", "q4_0"), ("f32", "q8_0")], ids="-".join
)
def test_a_step_is_the_operators_one_after_another(formats, threads):
    dim, past = 32, torch.tensor([130, 5])
    inputs = step_inputs(dim)
    x = torch.randn(2, LAYERS, 2, KV_HEADS, POSITIONS, dim)
    mine, plain = ([[filled(f, y) for y in x[i]] for i, f in enumerate(formats)] for _ in range(2))
    valid, mask = past.clone(), torch.full((2, 1, 1, POSITIONS), float("-inf"))
    step = step_on(inputs, *mine, formats, mask, valid, dim)
    for tokens in (1, 3, 1):
        ids = torch.randint(WORDS, (2, tokens))
        found, expected = step.run(ids), plain_step(inputs, ids, *plain, formats, past, dim)
        past += tokens
        # A sum in another order may move a number across a border between quants.
        assert (found - expected).abs().max() < 2e-2 * expected.abs().max()
        assert (found - expected).square().mean() < 1e-6 * expected.square().mean()
    assert torch.equal(valid, past)
    for format, ours, theirs in zip(formats, mine, plain, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            a, b = stored.expand(a, format, torch.float32), stored.expand(b, format, torch.float32)
            assert ((a - b).abs() > 1e-4 * b.abs().max()).sum() < 0.01 * (a != 0).sum()
            assert (a - b).abs().max() < 0.2 * b.abs().max()


def test_a_step_refuses_parts_of_another_format():
    inputs, parts = step_inputs(32), [filled("q8_0", torch.randn(1, KV_HEADS, POSITIONS, 32))] * LAYERS
    with pytest.raises(RuntimeError, match="part 0 of the cache format q4_0"):
        mask, valid = torch.zeros(1, 1, 1, POSITIONS), torch.zeros(1, dtype=torch.int64)
        step_on(inputs, parts, parts, ["q8_0", "q4_0"], mask, valid, 32)
