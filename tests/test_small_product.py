"""Products with weights of few bits: the C++ beside the specification, which expands them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllama.kernels import native, small_product
from fastllama.kernels.small_product import Small, _quantised_by_torch, dequantise, expanded, quantise, shapes

pytestmark = pytest.mark.skipif(native.load() is not None, reason=f"no C++: {native.load()}")
# x is rounded to 16 bits of a block's largest; y to its own dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-3, torch.float16: 1e-3}
FORMATS = ("int8", "int4", "int4-g64", "int4-g128")


def small(rows: int, columns: int, format: str, bias: torch.Tensor | None = None, seed: int = 0) -> Small:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return Small(*quantise(weight, format), bias, format, rows, columns)


def error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return ((y.double() - reference).abs().max() / reference.abs().max()).item()


def reference(x: torch.Tensor, product: Small) -> torch.Tensor:
    weight = dequantise(*product[:2], product.format, product.out_features, product.in_features, torch.float32)
    return F.linear(x.double(), weight.double(), None if product.bias is None else product.bias.double())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows_of_x", [1, 2, 7, 8, 9, 16, 17, 40, 97, 130])
@pytest.mark.parametrize(("rows", "columns"), [(16, 128), (50, 256), (300, 384)])
@pytest.mark.parametrize("bytes", [True, False], ids=["as told", "no instruction for bytes"])
def test_it_multiplies_as_the_expanded_weight_does(dtype, format, rows_of_x, rows, columns, bytes, monkeypatch):
    if not bytes:
        monkeypatch.setattr(native, "sums_products_of", "none")
    generator = torch.Generator().manual_seed(rows_of_x)
    x = torch.randn(rows_of_x, columns, generator=generator).to(dtype)
    product = small(rows, columns, format, torch.randn(rows, generator=generator).to(dtype))
    y = product(x)
    assert y.dtype == dtype and y.shape == (rows_of_x, rows)
    assert error(y, reference(x, product)) < TOLERANCE[dtype]


@pytest.mark.parametrize("columns", [1, 31, 33, 100])
@pytest.mark.parametrize(("rows_of_x", "dtype"), [(6, torch.float32), (6, torch.bfloat16), (40, torch.bfloat16)])
def test_int8_takes_any_number_of_columns(columns, rows_of_x, dtype):
    product, x = small(20, columns, "int8"), torch.randn(2, rows_of_x // 2, columns).to(dtype)
    assert error(product(x), reference(x, product)) < TOLERANCE[dtype]


@given(exponent=st.integers(-30, 30), places=st.sets(st.integers(0, 127), max_size=4), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_outliers_cost_their_own_block_alone(exponent, places, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 128, generator=generator)
    x[0, list(places)] *= 2.0**exponent
    product = small(16, 128, "int4", seed=seed)
    weight = dequantise(*product[:2], "int4", 16, 128, torch.float32).double()
    # Each number of x is off by half a unit of its block's fixed point at most.
    unit = x.view(4, 32).abs().amax(-1).double() / 32639
    bound = (weight.abs().view(16, 4, 32).sum(-1) * unit * 0.51).sum(-1)
    rounding = (weight.abs() @ x[0].abs().double()) * 1e-6
    assert ((product(x)[0].double() - x[0].double() @ weight.T).abs() <= bound + rounding).all()


@pytest.mark.parametrize("rows_of_x", [1, 5, 6, 21, 22, 43])  # 5 and 21 are what one and four tiles of digits hold
@pytest.mark.parametrize("columns", [32, 96, 1000, 2080])  # whole and half tiles of 64, in parts and behind them
def test_int8_is_as_fine_as_fp32(rows_of_x, columns):
    """Where sums of bytes are taken in a matrix unit; elsewhere as fine as 16 bits and a scale for 32 columns."""
    x = torch.randn(rows_of_x, columns, generator=torch.Generator().manual_seed(columns))
    product = small(40, columns, "int8", torch.randn(40))
    bits = 24 if native.has_matrix_unit else 16
    weight = dequantise(*product[:2], "int8", 40, columns, torch.float32).double()
    unit = x.abs().amax(-1, keepdim=True).double() * 2.0 ** (1 - bits)
    bound = 0.52 * unit * weight.abs().sum(-1) + (x.double().abs() @ weight.abs().T) * 4e-7 + 1e-6
    assert ((product(x).double() - reference(x, product)).abs() <= bound).all()


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_visible(format, value):
    product, x = small(40, 128, format), torch.randn(3, 128)
    x[1, 70] = value
    y = product(x)
    assert not torch.isfinite(y[1]).any()
    assert torch.equal(y[[0, 2]], product(x[[0, 2]]))


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-40, 1e-36])
def test_zeros_and_the_smallest_numbers_are_finite(format, scale):
    product, x = small(40, 128, format), torch.randn(2, 128) * scale
    assert (product(x).double() - reference(x, product)).abs().max() < 1e-33


def test_rows_of_zeros_give_zeros():
    for format in ("int8", "int4"):
        weight = torch.randn(32, 64)
        weight[5] = 0
        product = Small(*quantise(weight, format), None, format, 32, 64)
        assert (product(torch.randn(3, 64))[:, 5] == 0).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-37])  # where bf16 has denormals
def test_rows_are_expanded_as_the_specification_says(format, dtype, scale):
    columns = 100 if format == "int8" else 384
    weight = torch.randn(50, columns, generator=torch.Generator().manual_seed(0)) * scale
    quants, scales = quantise(weight, format)
    wanted = dequantise(quants, scales, format, 50, columns, dtype)
    for first, count in ((0, 50), (0, 3), (16, 16), (32, 18)):
        made = torch.full((count, columns), 7.0, dtype=dtype)
        torch.ops.fastllama_native.expand_small(quants, scales, 8 if format == "int8" else 4, first, made)
        assert torch.equal(made, wanted[first : first + count])


def test_many_rows_are_expanded_only_where_that_is_faster(monkeypatch):
    taken = []
    by_expanding = small_product._natively_expanded
    monkeypatch.setattr(small_product, "_natively_expanded", lambda *args: taken.append(1) or by_expanding(*args))
    products = {format: small(32, 64, format) for format in ("int8", "int4")}

    def expands(rows: int, dtype: torch.dtype, format: str = "int8") -> bool:
        taken.clear()
        products[format](torch.randn(rows, 64).to(dtype))
        assert bool(taken) == small_product.expands(rows, dtype, format)
        return bool(taken)

    monkeypatch.setattr(native, "sums_products_of", "bytes")
    monkeypatch.setattr(native, "has_matrix_unit", True)
    assert [expands(rows, torch.bfloat16) for rows in (97, 256, 257)] == [False, False, True]
    monkeypatch.setattr(native, "has_matrix_unit", False)
    assert [expands(rows, torch.bfloat16) for rows in (16, 17, 96, 97)] == [False, False, False, True]
    assert not expands(400, torch.float32) and not expands(400, torch.float16)
    monkeypatch.setattr(native, "sums_products_of", "shorts")
    assert [expands(rows, torch.bfloat16, "int4") for rows in (96, 97)] == [False, True]
    assert not expands(400, torch.bfloat16) and not expands(400, torch.float32)
    monkeypatch.setattr(native, "sums_products_of", "none")
    assert [expands(rows, torch.float32) for rows in (16, 17)] == [False, True]


def test_compiled_it_is_one_operator():
    product, x = small(48, 64, "int4"), torch.randn(1, 64)
    assert torch.equal(torch.compile(product.__call__, fullgraph=True)(x), product(x))


@pytest.mark.full
def test_compiled_many_rows_are_multiplied_by_the_expanded_weight():
    product, x = small(48, 64, "int4"), torch.randn(97, 64).bfloat16()
    y = torch.compile(product.__call__, fullgraph=True)(x)
    assert error(y, reference(x, product)) < TOLERANCE[torch.bfloat16]


def test_what_does_not_belong_together_is_refused():
    quants, scales = quantise(torch.randn(32, 64), "int8")
    multiply = torch.ops.fastllama_native.linear_small
    for x, bits, rows in ((torch.randn(1, 128), 8, 32), (torch.randn(1, 64), 4, 32), (torch.randn(1, 64), 8, 64)):
        with pytest.raises(RuntimeError, match="small weight"):
            multiply(x, quants, scales, None, bits, rows)
    for first, count in ((32, 1), (16, 17), (8, 8), (-16, 16)):
        with pytest.raises(IndexError):
            torch.ops.fastllama_native.expand_small(quants, scales, 8, first, torch.empty(count, 64))


@pytest.mark.parametrize("format", FORMATS)
def test_without_cpp_the_product_is_the_same(format):
    product, x = small(50, 256, format), torch.randn(5, 256)
    assert error(expanded(x, *product), reference(x, product)) < 1e-5


def by_torch(weight: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    made = [torch.zeros(shape, dtype=dtype) for shape, dtype in shapes(format, *weight.shape)]
    return _quantised_by_torch(weight, format, made)


@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-42, 1e-38, 1e-20, 1e-3, 1.0, 1e3, 5e4]),
    coarse=st.booleans(),
    format=st.sampled_from(FORMATS),
    rows=st.sampled_from([1, 16, 37]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
@settings(max_examples=150, deadline=None)
def test_cpp_quantises_bit_for_bit(seed, scale, coarse, format, rows, dtype):
    weight = torch.randn(rows, 128, generator=torch.Generator().manual_seed(seed))
    # Coarse numbers meet ties, repeated extremes, zeros and rows of nothing else.
    weight = ((weight * 2).round() / 2 if coarse else weight) * scale
    weight = weight.to(dtype).nan_to_num(posinf=6e4, neginf=-6e4)
    for ours, plain in zip(quantise(weight, format), by_torch(weight, format), strict=True):
        assert torch.equal(ours.view(torch.uint8), plain.contiguous().view(torch.uint8))


@pytest.mark.parametrize("columns", [1, 31, 33])
def test_cpp_fills_up_odd_columns_as_torch_does(columns):
    weight = torch.randn(20, columns)
    assert all(torch.equal(*pair) for pair in zip(quantise(weight, "int8"), by_torch(weight, "int8"), strict=True))


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(format, value):
    weight = torch.randn(40, 64)
    weight[33, 5] = value
    with pytest.raises(ValueError, match="NaN or infinities"):
        quantise(weight, format)


def test_a_weight_too_large_for_half_scales_is_refused():
    with pytest.raises(ValueError, match="too large"):
        quantise(torch.full((16, 32), 1e6), "int4")
