"""Every formulation of a product against torch.nn.functional.linear in float64, and the norm against the parent's.

Legend: x [..., K], W [N, K], b [N].
"""

import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode, in_kernel_invocation_manager
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastllama.kernels import linear, native
from fastllama.kernels.linear import Native, Packed, Stock, can_pack, hold, let_go, many_rows, pack
from fastllama.kernels.norm import Norm
from tests import modes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["native", "native, any rows", "packed", "stock"]
ROWS = [*range(1, 18), 40, 50, 70]
# Odd ones, ones below a vector of 16 or 32 numbers, whole ones, x that takes several blocks of the first cache, and
# rows of up to 2 KiB and of more, which are read in one stream and in several.
SIZES = [(1, 1), (3, 5), (7, 31), (33, 33), (64, 64), (50, 97), (5, 1000), (130, 2500)]
SIZES += [(27, 512), (27, 513), (29, 1024), (29, 1025)]


def numbers(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(rows: int, out: int, columns: int, dtype, biased: bool):
    bias = numbers(out, dtype=dtype, seed=3) if biased else None
    return numbers(rows, columns, dtype=dtype, seed=1), numbers(out, columns, dtype=dtype, seed=2), bias


def multiply(form: str, x, weight, bias):
    """The product in one formulation; skips what this machine or torch does not have."""
    if form.startswith("native") and native.load() is not None:
        pytest.skip(native.load())
    if form == "packed" and not can_pack(weight):
        pytest.skip(f"torch packs no {weight.dtype} here")
    if form == "stock":
        return Stock(weight, bias)(x)
    if form == "native":
        return Native(weight, bias)(x)
    if form == "native, any rows":
        return torch.ops.fastllama_native.linear_rows(x, weight, bias)
    handle = hold(pack(weight))
    try:
        return Packed(handle, bias, weight.shape[0])(x)
    finally:
        let_go(handle)


@pytest.mark.parametrize("inside", ["a fake tensor's operation", "a compilation"])
def test_a_handle_may_die_anywhere(inside):
    """Collected while another model is compiled, it must not run an operation of torch's, which is then no real one."""
    weight = torch.randn(8, 16)
    if not can_pack(weight):
        pytest.skip("torch packs no fp32 weights here")
    kept = [hold(pack(weight))]
    number = int(kept[0])

    def compiled(x):
        return torch.ops.fastllama_tests.drop(x) + 1

    library = torch.library.Library("fastllama_tests", "FRAGMENT")
    library.define("drop(Tensor x) -> Tensor")
    library.impl("drop", lambda x: x.clone(), "CPU")

    def fake(x):
        kept.clear()
        return torch.empty_like(x)

    torch.library.register_fake("fastllama_tests::drop", fake, lib=library)
    try:
        if inside == "a compilation":
            torch.compile(compiled, backend="aot_eager")(torch.ones(3))
        else:
            with FakeTensorMode() as mode, in_kernel_invocation_manager(mode):
                kept.clear()
    finally:
        library._destroy()
    assert not kept and number not in linear._packed and not modes.left_open()


def assert_product(found, x, weight, bias):
    """Off by one rounding to the dtype, and the rounding of fp32 sums, at most."""
    wide = (x.double(), weight.double(), None if bias is None else bias.double())
    expected = F.linear(*wide)
    summands = F.linear(*(None if part is None else part.abs() for part in wide))
    rounding = 0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps
    assert found.shape == expected.shape and found.dtype == x.dtype and found.is_contiguous()
    excess = (found.double() - expected).abs() - rounding * expected.abs() - 2e-6 * summands
    assert excess.max() <= 0, f"off by {excess.max():.2g} more than rounding explains"


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_formulation_is_the_product(form, dtype, biased):
    for out, columns in SIZES:
        for rows in ROWS:
            x, weight, bias = operands(rows, out, columns, dtype, biased)
            assert_product(multiply(form, x, weight, bias), x, weight, bias)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 48),
    out=st.integers(1, 70),
    columns=st.integers(1, 400),
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
    form=st.sampled_from(["native, any rows", "stock"]),
)
def test_any_shape(rows, out, columns, dtype, biased, form):
    x, weight, bias = operands(rows, out, columns, dtype, biased)
    assert_product(multiply(form, x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rows_of_a_weight_are_shared_by_threads(dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (1, 3, 16):
            x, weight, bias = operands(rows, 1003, 257, dtype, True)
            assert_product(multiply("native", x, weight, bias), x, weight, bias)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(70,), (1, 70), (4, 70), (2, 3, 70), (4, 5, 70), (40, 1, 70)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_x_of_any_dimensions(form, dtype, shape):
    x, weight, bias = numbers(*shape, dtype=dtype, seed=1), *operands(1, 33, 70, dtype, True)[1:]
    assert_product(multiply(form, x, weight, bias), x, weight, bias)


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every other column": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "part of a row": lambda x: torch.cat((x, x), 1)[:, 70:],
    "one row expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_x_of_any_layout(form, dtype, rows, layout):
    x, weight, bias = operands(rows, 33, 70, dtype, True)
    x = LAYOUTS[layout](x)
    assert not x.is_contiguous()
    assert_product(multiply(form, x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("form", ["native", "stock"])
def test_no_rows_are_no_rows(form):
    assert multiply(form, torch.zeros(0, 1, 8), numbers(5, 8), None).shape == (0, 1, 5)


@pytest.mark.usefixtures("forked")
def test_no_columns_give_the_bias():
    """In a process of its own: a division by zero ends one."""
    if native.load() is not None:
        pytest.skip(native.load())
    code = (
        "import torch; from fastllama.kernels import native; native.load(); bias = torch.arange(3.0); "
        "assert torch.ops.fastllama_native.linear_rows(torch.zeros(2, 0), torch.zeros(3, 0), bias).tolist() "
        "== [[0, 1, 2]] * 2"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr}"


def test_fp16_sums_do_not_overflow_on_the_way():
    """The blocks are widened: only the result has to fit."""
    weight = torch.cat((torch.full((3, 64), 200.0), torch.full((3, 64), -200.0)), 1).half()
    x = torch.full((20, 128), 200.0).half()
    for form in FORMS:
        if form != "packed":
            assert torch.equal(multiply(form, x, weight, None), torch.zeros(20, 3).half())


def test_a_weight_of_several_blocks_is_widened_whole(monkeypatch):
    monkeypatch.setattr(linear, "WIDENED_NUMBERS", 3 * 70)
    monkeypatch.setattr(linear, "_HAS_FP16", False)
    x, weight, bias = operands(20, 50, 70, torch.float16, True)
    assert_product(many_rows(x, weight, bias), x, weight, bias)


WRONG = {
    "columns": lambda x, weight, bias: (x[:, :-1], weight, bias),
    "dtype of x": lambda x, weight, bias: (x.bfloat16(), weight, bias),
    "dtype of the bias": lambda x, weight, bias: (x, weight, bias.half()),
    "length of the bias": lambda x, weight, bias: (x, weight, bias[:-1]),
    "dimensions of the weight": lambda x, weight, bias: (x, weight[None], bias),
}


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("form", FORMS)
def test_what_does_not_belong_together_is_refused(form, wrong, rows):
    arguments = WRONG[wrong](*operands(rows, 6, 32, torch.float32, True))
    if form == "packed" and "weight" in wrong:
        pytest.skip("packing takes matrices")
    with pytest.raises((RuntimeError, ValueError)):
        multiply(form, *arguments)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_native_product_refuses_other_weights(rows):
    x, weight, _ = operands(rows, 32, 32, torch.float32, False)
    with pytest.raises(RuntimeError, match="contiguous"):
        multiply("native", x, weight.t(), None)
    with pytest.raises(RuntimeError, match="dtype"):
        multiply("native", x.double(), weight.double(), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_packed_weight_is_unpacked_to_the_same_numbers(size, dtype):
    weight = numbers(*size, dtype=dtype)
    if not can_pack(weight):
        pytest.skip(f"torch packs no {dtype} here")
    assert torch.equal(pack(weight).to_dense(), weight)


def test_fp16_and_double_have_no_packed_form():
    assert not can_pack(numbers(4, 4, dtype=torch.float16))
    assert not can_pack(numbers(4, 4, dtype=torch.float64))


def test_a_handle_that_was_let_go_is_unknown():
    weight = numbers(4, 4)
    if not can_pack(weight):
        pytest.skip("torch packs nothing here")
    handle = hold(pack(weight))
    assert linear.held(handle).shape == weight.shape
    let_go(handle)
    let_go(handle)  # twice is once
    with pytest.raises(KeyError):
        linear.held(handle)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-4, 1.0, 100.0]),
)
def test_the_norm_is_the_parents_bit_for_bit(rows, width, dtype, scale):
    theirs = LlamaRMSNorm(width, eps=1e-5).to(dtype)
    theirs.weight.data = numbers(width, dtype=dtype, seed=4)
    x = numbers(rows, 2, width, seed=5).mul(scale).to(dtype)
    assert torch.equal(Norm(theirs.weight, theirs.variance_epsilon)(x), theirs(x))


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or not shutil.which(os.environ.get("CXX", "c++")),
    reason="needs a C++ compiler on x86-64 Linux",
)
def test_the_library_is_built_where_a_compiler_is():
    """The other tests of C++ pass over a library that was not built: without this one, a broken one would go unseen."""
    assert native.load() is None
