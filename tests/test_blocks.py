"""The formats of a cache, against the `gguf` package, which is written in numpy."""

import warnings

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fastllama.kernels.blocks import FORMATS
from fastllama.kernels.stored import FLOATS, IQ4_NL, expand, part_sizes, quantise

QUANTISED = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
BLOCKED = (*QUANTISED, "iq4_nl")
TYPE_BYTES = {"q8_0": 34, "q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "iq4_nl": 18}
TYPES = {name: GGMLQuantizationType[name.upper()] for name in (*BLOCKED, "f32", "f16", "bf16")}


def theirs(x: torch.Tensor, format: str) -> np.ndarray:
    """What the package makes of it: bytes [..., R, bytes of a block]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of overflows, which are meant
        found = quants.quantize(x.float().contiguous().numpy(), TYPES[format])
    if format in ("q4_1", "q5_1"):  # numpy takes the sign of zero from any of several zeros
        blocks = found.reshape(-1, TYPE_BYTES[format])
        zero = x.float().reshape(-1, 32).amin(-1).numpy() == 0
        blocks[zero, 3] = 0
        blocks[zero, 1] &= 127
    return found.view(np.uint8)


def in_order(parts: tuple, format: str) -> np.ndarray:
    """Our parts as llama.cpp's blocks: scales, fifth bits, quants."""
    if format in FLOATS:
        return parts[0].contiguous().view(torch.uint8).numpy()
    blocks = parts[-1].shape[-1]
    number = 2 if format in ("q4_1", "q5_1") else 1
    scales = [part[..., None].contiguous().view(torch.uint8) for part in parts[-number:]]
    rest = [part.view(torch.uint8).unflatten(-1, (blocks, -1)) for part in reversed(parts[:-number])]
    return torch.cat((*scales, *rest), dim=-1).flatten(-2).numpy()


def read(blocks: np.ndarray, format: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(np.array(quants.dequantize(blocks, TYPES[format])))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)) and torch.equal(a.isnan(), b.isnan())


def samples() -> torch.Tensor:
    """[rows, 64]: noise of all sizes, zeros, denormals, huge numbers, outliers, ties of both signs, exact halves."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(64, 64, generator=generator)
    rows = [noise, noise * 1e-3, noise * 1e-8, noise * 1e-38, noise * 1e-44, noise * 1e7, noise * 1e37, noise.exp()]
    rows += [noise.abs(), -noise.abs(), noise + 100, torch.zeros(2, 64), -torch.zeros(1, 64), torch.full((1, 64), -3.5)]
    ties = noise.clone()
    for row in range(64):
        first, second = torch.randperm(32, generator=generator)[:2].tolist()
        ties[row, [first, second]] = torch.tensor([5.0, -5.0])
    halves = torch.arange(64).remainder(32).sub(16).div(2)[None] * torch.tensor([[1.0], [-1.0], [0.25], [127 / 32]])
    ends = torch.tensor([3.4e38, -3.4e38, 1e-45, -1e-45, 65504.0, 65520.0, 5.96e-8, 0.0]).repeat(8)[None]
    outlier = noise * 1e-3
    outlier[:, 7] = 300
    return torch.cat((*rows, ties, halves, ends, outlier))


@pytest.mark.parametrize("format", [*QUANTISED, *FLOATS])
def test_bytes_are_those_of_gguf(format):
    x = samples()
    parts = quantise(x, format)
    blocks = theirs(x, format)
    assert np.array_equal(in_order(parts, format), blocks)
    if format != "f32":
        assert same(expand(parts, format, torch.float32), read(blocks, format))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", QUANTISED)
def test_half_numbers_are_widened_first(format, dtype):
    x = samples().clamp(-60000, 60000).to(dtype)
    parts = quantise(x, format)
    assert np.array_equal(in_order(parts, format), theirs(x, format))
    assert torch.equal(expand(parts, format, dtype), expand(parts, format, torch.float32).to(dtype))


FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
NARROW = st.floats(width=32, min_value=-2.0, max_value=2.0)


@settings(max_examples=150, deadline=None)
@given(arrays(np.float32, (3, 64), elements=st.one_of(NARROW, FLOAT32, st.sampled_from([0.0, 1.0, -1.0, 0.5]))))
@pytest.mark.parametrize("format", QUANTISED)
def test_any_finite_numbers(format, array):
    x = torch.from_numpy(array)
    parts = quantise(x, format)
    assert np.array_equal(in_order(parts, format), theirs(x, format))
    assert same(expand(parts, format, torch.float32), read(theirs(x, format), format))


def plain_iq4_nl(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The documented rule, number by number: (index of the codebook, d) of one block."""
    furthest = max(x.tolist(), key=abs)
    d = np.float32(furthest) / np.float32(-127)
    with np.errstate(over="ignore", divide="ignore"):
        stored = d.astype(np.float16)
        inverse = np.float32(0) if d == 0 else np.float32(1) / d
    index = []
    for number in x.numpy():
        with np.errstate(invalid="ignore"):
            scaled = number * inverse
        distances = [abs(np.float64(scaled) - value) for value in IQ4_NL]
        nearest = min(range(16), key=lambda i: (distances[i], -i))
        index.append(nearest if np.isfinite(scaled) else 0)
    return np.array(index, dtype=np.uint8), stored


def test_iq4_nl_takes_the_nearest_of_the_codebook_and_gguf_reads_the_same_numbers():
    x = samples()[:, :32]
    quants_, d = quantise(x, "iq4_nl")
    for row, low_high, scale in zip(x, quants_, d, strict=True):
        index, expected = plain_iq4_nl(row)
        assert np.array_equal(np.concatenate((low_high & 15, low_high >> 4)), index)
        assert scale.numpy().view(np.uint16) == expected.view(np.uint16)
    x = samples()
    parts = quantise(x, "iq4_nl")
    assert same(expand(parts, "iq4_nl", torch.float32), read(in_order(parts, "iq4_nl"), "iq4_nl"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_follows_its_rule(dtype):
    x = samples().clamp(-60000, 60000).to(dtype)
    quants_, scale = quantise(x, "int8")
    assert quants_.dtype == torch.int8 and scale.dtype == dtype and scale.shape == (len(x), 1)
    expected = np.maximum(np.abs(x.float().numpy()).max(-1, keepdims=True) / np.float32(127), np.float32(1e-5))
    expected = torch.from_numpy(expected).to(dtype)
    assert torch.equal(scale, expected)
    whole = np.rint(x.float().numpy() / expected.float().numpy()).clip(-127, 127)  # halves to even
    assert np.array_equal(quants_.numpy(), whole)
    expanded = expand((quants_, scale), "int8", dtype)
    assert torch.equal(expanded, (torch.from_numpy(whole).float() * expected.float()).to(dtype))


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in FLOATS])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible_in_its_whole_block(format, bad):
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    clean = expand(quantise(x, format), format, torch.float32)
    x[1, 40] = bad
    found = expand(quantise(x, format), format, torch.float32)
    touched = slice(0, 64) if format == "int8" else slice(32, 64)
    assert not found[1, touched].isfinite().any()
    assert found[1, touched].isfinite().sum() == 0
    found[1, touched] = clean[1, touched] = 0
    assert torch.equal(found, clean)


@pytest.mark.parametrize("format", FLOATS)
def test_what_is_not_finite_stays_as_it_is_in_a_float_format(format):
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0] * 8])
    assert same(expand(quantise(x, format), format, torch.float32), x)
    huge = torch.full((1, 32), 1e38)
    assert expand(quantise(huge, "f16"), "f16", torch.float32).isinf().all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sizes_are_those_of_the_parts(format, dtype):
    x = torch.randn(2, 3, 5, 64).to(dtype)
    parts = quantise(x, format)
    assert [(part.shape[-1], part.dtype) for part in parts] == part_sizes(format, 64, dtype)
    assert all(part.shape[:-1] == x.shape[:-1] for part in parts)
    assert sum(part.nbytes for part in parts) == FORMATS[format].row_bytes(64, dtype.itemsize) * 2 * 3 * 5


def test_bytes_of_a_block_are_llama_cpps():
    assert {name: FORMATS[name].row_bytes(32) for name in BLOCKED} == TYPE_BYTES


@pytest.mark.parametrize("format", BLOCKED)
def test_blocks_that_do_not_divide_are_refused(format):
    with pytest.raises(ValueError, match=f"head_dim=48 is not a multiple of 32, which the cache format {format} needs"):
        quantise(torch.zeros(1, 48), format)
    with pytest.raises(ValueError, match="cache format 'q3_0' is not known; allowed: f32, f16"):
        part_sizes("q3_0", 64, torch.float32)


@pytest.mark.parametrize("format", FORMATS)
def test_layout_of_the_input_does_not_matter(format):
    x = torch.randn(4, 3, 64)
    for part, other in zip(quantise(x.transpose(0, 1), format), quantise(x, format), strict=True):
        assert torch.equal(part, other.transpose(0, 1))
    assert quantise(x[:0], format)[0].shape[0] == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("format", FORMATS)
def test_a_gpu_makes_the_same_bytes(format):
    x = samples()
    for ours, there in zip(quantise(x, format), quantise(x.cuda(), format), strict=True):
        assert torch.equal(ours.view(torch.uint8), there.cpu().view(torch.uint8))
