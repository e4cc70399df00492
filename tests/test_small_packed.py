"""Small weights in the order of torch's own kernels, and row after row: the same products, held once, bit for bit back.

torch's int4 kernel is for GPUs: here a plain one, written from the order that it documents, stands in its place.
"""

import copy
import warnings

import pytest
import torch

import fastllama
from fastllama.kernels import native, small_packed, tune
from fastllama.kernels.linear import NATIVE_ROWS
from fastllama.kernels.small_kinds import SMALL_KINDS, SmallWork
from fastllama.kernels.small_packed import pack_small, packed_obstacle
from fastllama.kernels.small_product import dequantise, quantise
from fastllama.kernels.small_summed import rows_of_tiles, tiles_of_rows
from fastllama.kernels.tune import Chooser
from fastllama.model.compiled import run_for
from fastllama.model.released import is_released
from fastllama.model.small_linear import SmallLinear, small_tensors
from tests import small
from tests.tiny import GREEDY, VOCAB, generate, prompt

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
FORMATS = ("int8", "int4", "int4-g64", "float8")


def converted(numbers_NC: torch.Tensor, inner: int) -> torch.Tensor:
    """The order of the GPU's int4 kernel, one number at a time. A byte holds an even column above the next one."""
    rows, columns = numbers_NC.shape[0], 2 * numbers_NC.shape[1]
    words = torch.zeros(rows // 8, columns // (16 * inner), 32, inner // 2, dtype=torch.int64)
    for row in range(rows):
        for column in range(columns):
            byte = int(numbers_NC[row, column // 2])
            number = byte & 15 if column % 2 else byte >> 4
            tile, within = divmod(column, 32)  # a word's lane has 2 of every 8 columns of 32
            lane = 4 * (row % 8) + within % 8 // 2
            place = within // 8 + 4 * (column % 2)
            outer, word = divmod(tile, inner // 2)
            words[row // 8, outer, lane, word] |= number << 4 * place
    return words.where(words < 2**31, words - 2**32).int()


def multiplied(x_RK: torch.Tensor, words: torch.Tensor, group: int, scales_GN2: torch.Tensor) -> torch.Tensor:
    """x times the numbers - 8 times a scale plus a zero point, each rounded to bfloat16 as the GPU does."""
    assert x_RK.is_contiguous() and x_RK.dtype == scales_GN2.dtype == torch.bfloat16
    outer, words_each = words.shape[1], words.shape[3]
    numbers = torch.empty(words.shape[0] * 8, x_RK.shape[1])
    for lane in range(32):
        for place in range(8):
            for word in range(words_each):
                columns = 32 * (word + words_each * torch.arange(outer)) + 8 * (place % 4) + lane % 4 * 2 + place // 4
                numbers[lane // 4 :: 8, columns] = (words[:, :, lane, word] >> 4 * place & 15).float() - 8
    scale, zero = (part.T.repeat_interleave(group, 1).float() for part in scales_GN2.unbind(-1))
    return (x_RK.float() @ (numbers * scale + zero).bfloat16().float().T).bfloat16()


@pytest.fixture
def gpu_kernel():
    """Makes torch's int4 operators answer on a CPU; call it with others to see those refused."""
    libraries = []

    def register(convert=converted, multiply=multiplied):
        library = torch.library.Library("aten", "IMPL")
        libraries.append(library)
        library.impl("_convert_weight_to_int4pack", convert, "CPU")
        library.impl("_weight_int4pack_mm", multiply, "CPU")
        small_packed._tried.cache_clear()

    yield register
    for library in libraries:
        library._destroy()
    small_packed._tried.cache_clear()


def made(format: str, rows: int, columns: int, kind: str, bias: torch.Tensor | None = None):
    """(the product, the weight that is meant)"""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    held = quantise(weight, format)
    return SMALL_KINDS[kind](*held, bias, format, rows, columns), dequantise(
        *held, format, rows, columns, torch.float64
    )


def error(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    return ((y.double() - expected).abs().max() / expected.abs().max()).item()


def rms(difference: torch.Tensor) -> float:
    return difference.square().mean().sqrt().item()


# the orders


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 16, 50])
def test_rows_of_tiles_are_tiles_again(format, rows):
    for columns in (128, 192) if format != "int8" else (128, 33, 1):
        held = quantise(torch.randn(rows, columns), format)
        back = tiles_of_rows(*rows_of_tiles(*held, format, rows, columns), format, rows, columns)
        for one, other in zip(held, back, strict=True):
            assert one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize(("format", "columns"), [("int8", 33), ("int4", 32), ("int4", 64), ("int4-g128", 384)])
def test_a_packed_weight_comes_back_bit_for_bit(format, columns, gpu_kernel):
    gpu_kernel()
    held = quantise(torch.randn(50, columns), format)
    for one, other in zip(held, pack_small(*held, None, format, 50, columns).unpacked(), strict=True):
        assert one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_the_stand_in_has_the_kernels_shapes():
    numbers = torch.randint(0, 255, (16, 64), dtype=torch.uint8)
    expected = torch.ops.aten._convert_weight_to_int4pack(numbers.to("meta"), 4)
    assert converted(numbers, 4).shape == expected.shape and expected.dtype == torch.int32


# the products


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows_of_x", [1, 3, 40])
@pytest.mark.parametrize(("kind", "format"), [("packed", "int8"), *(("summed", format) for format in FORMATS)])
def test_a_product_is_that_of_the_expanded_weight(kind, format, rows_of_x, dtype):
    generator = torch.Generator().manual_seed(1)
    for bias in (None, torch.randn(50, generator=generator).to(dtype)):
        product, weight = made(format, 50, 256, kind, bias)
        x = torch.randn(rows_of_x, 1, 256, generator=generator).to(dtype)
        y = product(x)
        assert y.dtype == dtype and y.shape == (rows_of_x, 1, 50)
        assert error(y, x, weight, bias) < TOLERANCE[dtype]


def test_compiled_the_sum_is_that_of_the_expanded_weight():
    bias = torch.randn(50)
    cases = [made(format, 50, 256, "summed", bias) for format in FORMATS]
    x = torch.randn(3, 1, 256)

    def every(products, x):
        return [product(x) for product in products]

    ys = torch.compile(every, fullgraph=True)([product for product, _ in cases], x)
    for y, (product, weight) in zip(ys, cases, strict=True):
        assert y.shape == (3, 1, 50)
        assert error(y, x, weight, bias) < 1e-6, product.format


@pytest.mark.parametrize("rows_of_x", [1, 3, 300])
@pytest.mark.parametrize("format", ["int4", "int4-g128"])
def test_the_int4_kernel_is_given_what_it_multiplies(format, rows_of_x, gpu_kernel):
    gpu_kernel()
    generator = torch.Generator().manual_seed(2)
    bias, x = (
        torch.randn(50, generator=generator).bfloat16(),
        torch.randn(rows_of_x, 256, generator=generator).bfloat16(),
    )
    product, weight = made(format, 50, 256, "packed", bias)
    y, exact = product(x), x.double() @ weight.T + bias.double()
    half = torch.nn.functional.linear(x, weight.bfloat16(), bias)
    assert y.shape == (rows_of_x, 50) and y.dtype == x.dtype
    # As far from it as weights in bfloat16 are, and by the rounding of the scales more: 1.16 times over many numbers.
    assert rms(y - exact) < (1.4 if rows_of_x > 10 else 2) * rms(half - exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(value):
    product, _ = made("int8", 50, 128, "packed")
    x = torch.randn(2, 128)
    x[1, 70] = value
    assert product(x)[0].isfinite().all() and not product(x)[1].isfinite().any()


# where there is no kernel, or another one


def test_where_there_is_no_kernel_the_reason_is_said():
    assert packed_obstacle("int8", CPU, torch.float32, 128) is None
    none = "this torch has no _weight_int4pack_mm for"
    assert packed_obstacle("int4", CPU, torch.bfloat16, 128) == f"{none} cpu"
    assert packed_obstacle("int4", torch.device("meta"), torch.bfloat16, 128) is not None
    assert "multiplies torch.bfloat16" in packed_obstacle("int4", CPU, torch.float32, 128)
    assert "no kernel for float8" in packed_obstacle("float8", CPU, torch.bfloat16, 128)


def test_a_kernel_that_is_another_one_is_not_used(gpu_kernel):
    def fails(*arguments):
        raise RuntimeError("no kernel image\nfor this device")

    asked = ("int4", CPU, torch.bfloat16, 128)
    gpu_kernel()
    assert packed_obstacle(*asked) is None
    for doubles, reason in [
        ({"multiply": lambda *a: multiplied(*a) * 1.1}, "computes something else"),
        ({"convert": lambda n, inner: converted(n.flip(0), inner)}, "an order that is not known"),
        ({"multiply": fails}, "does not run on this device: no kernel image"),
    ]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that an operator is registered anew
            gpu_kernel(**doubles)
        assert reason in packed_obstacle(*asked)


# the choice


@pytest.fixture
def no_native(monkeypatch, tmp_path):
    """As on a GPU: no C++ product. What is measured is remembered in a folder of the test's own."""
    native.load()  # where it is: a library is loaded once a process
    monkeypatch.setattr(tune, "native_obstacle", lambda format, device: "not here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def chooser(wanted="auto", compile="no", dtype=torch.float32, rows=1) -> Chooser:
    return Chooser(wanted, rows, 2**20, torch.ones(4, dtype=dtype), run_for(compile, CPU))


def test_every_formulation_is_a_candidate_where_it_can_run(no_native, gpu_kernel, monkeypatch):
    gpu_kernel()
    asked = []

    def measure(self, work, candidates):
        asked.append(tuple(candidates))
        return dict.fromkeys(candidates, 2.0) | {candidates[-1]: 1.0}

    monkeypatch.setattr(Chooser, "_measure_small", measure)
    half = torch.bfloat16
    assert chooser().small("int8", 64, 128, True) == "packed"
    assert chooser(compile="static").small("int8", 64, 128, True) == "summed"
    assert chooser(compile="static").small("int4", 64, 128, True) == "summed"  # torch's kernel is for bfloat16
    assert chooser(compile="static", dtype=half).small("int4", 64, 128, True) == "summed"
    assert chooser(compile="dynamic", rows=NATIVE_ROWS + 1).small("int8", 64, 128, True) == "packed"
    assert chooser(compile="static").small("float8", 64, 128, True) == "summed"
    three, two = ("expanded", "packed", "summed"), ("expanded", "summed")
    assert asked == [("expanded", "packed"), three, two, three, ("expanded", "packed"), two]
    assert chooser().small("float8", 64, 128, True) == chooser().small("int8", 64, 128, False) == "expanded"
    assert chooser("stock").small("int8", 64, 128, True) == "expanded"
    assert chooser("packed").small("int8", 64, 128, True) == "packed"
    assert len(asked) == 6
    with pytest.raises(ValueError, match="products='packed' cannot be honoured: weights in float8 have no packed form"):
        chooser("packed").small("float8", 64, 128, True)


def test_a_measurement_times_each_and_leaves_out_what_fails(no_native, monkeypatch):
    work = SmallWork("int8", 64, 128, 1, torch.float32, CPU, 2**15)
    assert work.copies == 3
    times = chooser()._measure_small(work, ["expanded", "packed"])
    assert all(0 < time < 1e9 for time in times.values())

    def fails(*arguments):
        raise RuntimeError("no luck\ntoday")

    monkeypatch.setitem(SMALL_KINDS, "packed", fails)
    with pytest.warns(UserWarning, match="int8 weights are not multiplied packed: no luck$"):
        times = chooser()._measure_small(work, ["expanded", "packed"])
    assert min(times, key=times.get) == "expanded"
    monkeypatch.setitem(SMALL_KINDS, "expanded", fails)
    with pytest.raises(RuntimeError, match="no luck"):
        chooser()._measure_small(work, ["expanded", "packed"])


# whole models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    return {
        tied: small.write(root / str(tied), tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
        for tied in (False, True)
    }


def storages(model) -> int:
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in small_tensors(model)}.values())


def packed(model) -> set[str]:
    return {name for name, module in model.named_modules() if is_released(module)}


def every(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, SmallLinear)}


TOKENS = torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_are_those_of_the_expanded_weights(tied, folders):
    ours = small.load(folders[tied], "int8")
    before, held = [x.clone() for x in small_tensors(ours)], storages(ours)
    specified = small.specification(ours, torch.float64)
    ours.preallocate(3, 32, products="packed")
    expected = small.teacher_forced(specified, prompt("padded"), TOKENS)
    found = small.teacher_forced(ours, prompt("padded"), TOKENS)
    # A tied head is not packed, and C++ takes x in 16 bits.
    assert (found - expected).abs().max() < (3e-4 if tied else 1e-5) * expected.abs().max()
    assert f"{8 if tied else 9} small packed" in ours._engine.words()
    assert packed(ours) == every(ours)
    assert storages(ours) <= held, "held once"
    ours.state_dict()
    assert not packed(ours)
    for one, other in zip(before, small_tensors(ours), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_halves_that_have_no_packed_floats_are_packed_too(folders):
    ours = small.load(folders[False], "int8", dtype=torch.float16)
    ours.preallocate(1, 32, products="packed")
    assert "9 small packed" in ours._engine.words()
    floats = fastllama.LlamaForCausalLM.from_pretrained(folders[False], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"this torch packs no torch\.float16 on cpu"):
        floats.preallocate(1, 32, products="packed")


def test_int4_goes_the_same_way(folders, gpu_kernel):
    gpu_kernel()
    ours = small.load(folders[False], "int4-g64", dtype=torch.bfloat16)
    exact = small.teacher_forced(small.specification(ours, torch.float64), prompt("padded"), TOKENS)
    half = small.teacher_forced(small.specification(ours), prompt("padded"), TOKENS)
    before = [x.clone() for x in small_tensors(ours)]
    ours.preallocate(3, 32, products="packed")
    found = small.teacher_forced(ours, prompt("padded"), TOKENS)
    assert "weights int4-g64, fused qkv, gate+up, products: 9 small packed" in ours._engine.words()
    assert rms(found - exact) < 1.6 * rms(half - exact)
    ours.free()
    for one, other in zip(before, small_tensors(ours), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_who_asks_for_a_weight_finds_it_and_generation_goes_on(folders, tmp_path):
    ours = small.load(folders[False], "int8")
    expected = generate(ours, prompt("padded"), max_new_tokens=8, **GREEDY)
    before = [x.clone() for x in small_tensors(ours)]
    ours.preallocate(3, 32, products="packed")
    asked = {
        "saved": lambda: ours.save_pretrained(tmp_path),
        "forward": lambda: ours(**prompt("one")),
        "copied": lambda: copy.deepcopy(ours),
        "moved": lambda: ours.to("cpu"),
        "beams": lambda: ours.generate(**prompt("one"), max_new_tokens=2, num_beams=2),
    }
    for name, ask in asked.items():
        assert torch.equal(generate(ours, prompt("padded"), max_new_tokens=8, **GREEDY), expected), name
        assert packed(ours) == every(ours)
        ask()
        assert not packed(ours), name
        assert not ours._engine.binding.is_whole
        left = ours._engine.weights
        assert left is None or (not left.blocks and ours._engine.words()), "held twice"
    again = type(ours).from_pretrained(tmp_path)
    for one, other in zip(before, small_tensors(again), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_a_compiled_step_takes_the_sums(folders, no_native, monkeypatch):
    monkeypatch.setattr(
        Chooser, "_measure_small", lambda self, work, names: {name: float(name != "summed") for name in names}
    )
    ours = small.load(folders[False], "int4")
    ours.preallocate(1, 32, compile="static", bucket=32)
    assert "9 small summed" in ours._engine.words() and packed(ours) == every(ours)
    found = small.teacher_forced(ours, prompt("one"), TOKENS[:1])
    expected = small.teacher_forced(small.specification(ours, torch.float64), prompt("one"), TOKENS[:1])
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
