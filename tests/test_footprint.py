"""Bytes by arithmetic, beside the tensors that they are of; which cache fits; and preallocate(memory=...)."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM as VanillaLlama

from fastllama.cache.footprint import BY_QUALITY, best_fitting, choices, words
from fastllama.cache.small_cache import cache_for
from fastllama.decode.memory_size import parse_size
from fastllama.demo import names
from fastllama.kernels.blocks import FORMATS
from fastllama.model import footprint
from fastllama.model.footprint import cache_shape, matrix_bytes, prefill_bytes, rotary_bytes, weight_bytes
from fastllama.model.rotary import RotaryTable
from tests.tiny import GREEDY, config, pair

CPU = torch.device("cpu")


def a_config(**changes) -> LlamaConfig:
    sizes = {
        "vocab_size": 384, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return LlamaConfig(**sizes | changes)


# weights


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_as_they_are(tied, biased, dtype):
    made = a_config(tie_word_embeddings=tied, attention_bias=biased, mlp_bias=biased)
    with torch.device("meta"):
        parameters = list(VanillaLlama(made).parameters())
    found = weight_bytes(made, None, dtype)
    assert found.total == sum(parameter.numel() for parameter in parameters) * dtype.itemsize
    assert found.embedding == (0 if tied else 384 * 128 * dtype.itemsize)


def _tiles(rows: int, columns: int, group: int | None) -> int:
    """What the tiles of one matrix take, as tensors."""
    tiles = -(-rows // 16)
    if group is None:
        padded = -(-columns // 32) * 32
        parts = [torch.empty(tiles, padded // 4, 16, 4, dtype=torch.uint8), torch.empty(tiles, 1, 16)]
    else:
        parts = [
            torch.empty(tiles, columns // 8, 16, 4, dtype=torch.uint8),
            torch.empty(tiles, columns // group, 16, dtype=torch.float16),
        ]
    return sum(part.nbytes for part in parts)


@pytest.mark.parametrize(("weights", "group"), [("int8", None), ("int4", 32), ("int4-g32", 32), ("int4-g64", 64)])
@pytest.mark.parametrize("tied", [False, True])
def test_small_weights_are_tiles_beside_float_norms_and_embedding(weights, group, tied):
    made = a_config(tie_word_embeddings=tied, vocab_size=390)  # no multiple of a tile's rows
    layer = sum(_tiles(*size, group) for size in ((256, 128), (128, 128), (640, 128), (128, 320)))
    found = weight_bytes(made, weights, torch.bfloat16)
    norms = (2 * 3 + 1) * 128 * 2
    assert found.body == 3 * layer + _tiles(390, 128, None) + norms
    assert found.embedding == (0 if tied else 390 * 128 * 2)


def test_a_group_that_does_not_divide_is_refused_by_the_matrix_name():
    with pytest.raises(ValueError, match="down has 320 columns, no multiple of 128"):
        weight_bytes(a_config(), "int4-g128", torch.bfloat16)


def test_the_seeds_model_at_131072():
    made = names.configuration("random:llama-3.1-8b", torch.bfloat16)
    assert weight_bytes(made, None, torch.bfloat16).total == pytest.approx(16.06e9, rel=1e-3)
    sizes = {
        name: cache_shape(made, 1, 131072, torch.bfloat16, CPU, name, name).nbytes / 1e9
        for name in (None, "int8", "q4_0")
    }
    # The arithmetic of the specification: 17.2, 8.6 + 0.13, 4.8 GB.
    assert sizes == pytest.approx({None: 17.18, "int8": 8.72, "q4_0": 4.83}, rel=2e-3)
    assert matrix_bytes(16, 64, None, 2) == 2048


# caches and tables


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_takes_what_its_shape_says(format, dtype):
    shape = cache_shape(a_config(), 2, 50, dtype, CPU, format, format)
    cache = cache_for(shape, stock=True)

    def tensors(value):
        if isinstance(value, torch.Tensor):
            return [value]
        if isinstance(value, (list, tuple)):
            return [tensor for one in value for tensor in tensors(one)]
        return [tensor for one in vars(value).values() for tensor in tensors(one)] if hasattr(value, "__dict__") else []

    held = {tensor.data_ptr(): tensor.nbytes for tensor in tensors(cache)}
    # Beside what grows with what is stored there are a few row and position numbers.
    assert 0 <= sum(held.values()) - shape.nbytes <= 8 * (shape.reserved_length + 2 * 2)


def test_the_rotary_table_is_as_large_as_predicted_and_made_in_blocks(monkeypatch):
    _, ours = pair()
    rotary = ours.model.rotary_emb
    whole = RotaryTable(rotary, 40, torch.float32, CPU)
    monkeypatch.setattr("fastllama.model.rotary._BLOCK", 16)
    blocks = RotaryTable(rotary, 40, torch.float32, CPU)
    assert torch.equal(whole.cos_SD, blocks.cos_SD) and torch.equal(whole.sin_SD, blocks.sin_SD)
    shape = cache_shape(config(), 1, 32, torch.float32, CPU)
    assert RotaryTable(rotary, shape.reserved_length, torch.float32, CPU).nbytes == rotary_bytes(shape)
    cos, sin = blocks.for_prompt(20, None, 20, None)
    assert cos.data_ptr() == blocks.cos_SD.data_ptr() and torch.equal(sin[0], whole.sin_SD[:20])


def test_what_is_widened_counts_where_the_processor_widens(monkeypatch):
    shape = cache_shape(a_config(), 1, 64, torch.bfloat16, CPU)
    largest = 2 * 320 * 128  # gate and up

    def extra(tokens: int, numbers: int) -> int:
        monkeypatch.setattr(footprint, "WIDENED_NUMBERS", numbers)
        found = []
        for widens in (True, False):
            monkeypatch.setattr(footprint, "widens", lambda dtype, widens=widens: widens)
            found.append(prefill_bytes(a_config(), shape, tokens, 0))
        return found[0] - found[1]

    assert extra(40, 2**22) == 4 * (largest + 40 * 320)
    assert extra(40, 1000) == 4 * (1000 + 40 * 320)
    assert extra(8, 2**22) == 0


def test_what_passes_grows_with_the_chunk_and_without_the_native_attention_with_the_mask():
    here, there = (cache_shape(a_config(), 1, 4096, torch.bfloat16, torch.device(name)) for name in ("cpu", "meta"))
    assert prefill_bytes(a_config(), here, 2048, 0) > 3 * prefill_bytes(a_config(), here, 256, 1792)
    assert prefill_bytes(a_config(), here, 256, 3840) == prefill_bytes(a_config(), here, 256, 0)
    assert prefill_bytes(a_config(), there, 256, 3840) > prefill_bytes(a_config(), there, 256, 0) + 256 * 4096
    stock = prefill_bytes(a_config(), here, 256, 3840, products="stock")
    assert stock > prefill_bytes(a_config(), here, 256, 0, products="stock") + 256 * 4096
    odd = a_config(head_dim=48)  # of which the C++ has no attention
    shape = cache_shape(odd, 1, 4096, torch.bfloat16, torch.device("cpu"))
    assert prefill_bytes(odd, shape, 256, 3840) > prefill_bytes(odd, shape, 256, 0) + 256 * 4096


# which cache fits


def nbytes(shape) -> int:
    return shape.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_most_exact_cache_that_fits_is_chosen(dtype):
    shape = cache_shape(a_config(), 2, 100, dtype, CPU)
    offered = choices(shape)
    wanted = [name for name in BY_QUALITY if name != "f16" or dtype == torch.float32]
    assert [(one.cache_k, one.cache_v) for one in offered] == [(name, name) for name in wanted]
    for index, one in enumerate(offered):
        found = best_fitting(shape, one.nbytes, nbytes)
        assert found.nbytes <= one.nbytes and offered.index(found) <= index
        # Nothing more exact would have fitted.
        assert all(better.nbytes > one.nbytes for better in offered[: offered.index(found)])


def test_where_none_fits_the_error_says_what_the_smallest_needs():
    shape = cache_shape(a_config(), 1, 100_000, torch.bfloat16, CPU)
    smallest = min(choices(shape), key=nbytes)
    with pytest.raises(MemoryError) as error:
        best_fitting(shape, smallest.nbytes - 1, nbytes)
    assert f"{smallest.nbytes / 1e9:.3g} GB at the least (keys and values q4_0)" in str(error.value)
    assert best_fitting(shape, smallest.nbytes, nbytes) == smallest


def test_a_side_that_is_given_is_honoured_and_blocks_that_do_not_fit_are_no_choice():
    shape = cache_shape(a_config(), 1, 100, torch.bfloat16, CPU, cache_k="q8_0")
    assert {one.cache_k for one in choices(shape)} == {"q8_0"}
    found = best_fitting(shape, min(map(nbytes, choices(shape))), nbytes)
    assert (found.cache_k, found.cache_v) == ("q8_0", "q4_0") and words(found) == "keys q8_0, values q4_0"
    narrow = cache_shape(a_config(head_dim=16), 1, 100, torch.bfloat16, CPU)
    assert [one.cache_k for one in choices(narrow)] == [None, "int8"]


# sizes


@pytest.mark.parametrize(
    ("given", "size"),
    [("24GB", 24 * 10**9), ("16GiB", 16 * 2**30), (" 1.5 mb ", 1_500_000), ("512", 512), (77, 77), ("2kib", 2048)],
)
def test_sizes_are_read(given, size):
    assert parse_size(given) == size


@pytest.mark.parametrize(
    "given", ["", "GB", "-1GB", "0", 0, -5, "4XB", "1e9", 1.5, None, True, "nan GB", "1.GB", "९GBs"]
)
def test_what_is_no_size_is_refused(given):
    with pytest.raises(ValueError, match=r"memory=.* is not allowed; allowed: a size such as 24GB, 16GiB, 500MB"):
        parse_size(given)


# preallocate(memory=...)


def test_preallocate_chooses_within_the_memory_given():
    _, ours = pair()
    weights = sum(parameter.nbytes for parameter in ours.parameters()) + sum(b.nbytes for b in ours.buffers())
    plain = ours.preallocate(1, 400)
    assert ours.preallocate(1, 400, memory=weights + plain) == plain and ours._engine.config.cache_k is None
    small = ours.preallocate(1, 400, memory=weights + plain - 1)
    assert small < plain and ours._engine.config.cache_k == ours._engine.config.cache_v == "f16"
    least = ours.preallocate(1, 400, cache_k="int8", cache_v="int8")
    assert ours.preallocate(1, 400, memory=f"{weights + least}") == least
    assert ours._engine.config.cache_k == "int8"
    ours.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, **GREEDY)
    assert "int8" in ours.path
    with pytest.raises(MemoryError, match=r"GB at the least \(keys and values int8\)"):
        ours.preallocate(1, 400, memory=weights + least - 1)
    assert ours._engine.cache.shape.cache_length == 400  # the earlier reservation is kept
    with pytest.raises(ValueError, match="memory='lots' is not allowed"):
        ours.preallocate(1, 400, memory="lots")


def test_preallocate_honours_the_sides_that_are_given():
    _, ours = pair()
    ours.preallocate(1, 200, memory="1GB", cache_k="int8")
    assert (ours._engine.config.cache_k, ours._engine.config.cache_v) == ("int8", None)
