"""What a Llama takes and reads, by its configuration alone: before anything is loaded.

Legend: N rows and K columns of a matrix, E hidden size, I intermediate size, V vocabulary, Q and C columns of queries
and of keys.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import LlamaConfig

from fastllama.cache.budget import CacheShape
from fastllama.kernels.attention import has_native_attention
from fastllama.kernels.linear import MANY_ROWS, WIDENED_NUMBERS, widens
from fastllama.kernels.small_product import EXPANDED_NUMBERS, check, shapes
from fastllama.kernels.small_weights import head_format

_MLP_ROWS = 256  # rows that a prefill takes through an MLP at a time on a CPU
_SCORES_BYTES = 3 * 2**28  # of the scores that an accelerator holds while it reads a small cache
_HEAD_COPIES_BYTES = 12  # of each logit: fp32 copies that choosing a token takes


def head_dim(config: LlamaConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cache_shape(
    config: LlamaConfig,
    batch_size: int,
    cache_length: int,
    dtype: torch.dtype,
    device: torch.device,
    cache_k: str | None = None,
    cache_v: str | None = None,
) -> CacheShape:
    """The cache of a model with this configuration. Raises `ValueError` for a format that it cannot have."""
    shape = CacheShape(
        config.num_hidden_layers, batch_size, config.num_key_value_heads, max(cache_length, 2), head_dim(config),
        dtype, device, cache_k, cache_v,
    )  # fmt: skip
    shape.check_formats()
    return shape


@dataclass(frozen=True)
class WeightBytes:
    """body: what every step reads. embedding: a table of which a step reads a row a token; 0 where it is the head."""

    body: int
    embedding: int

    @property
    def total(self) -> int:
        return self.body + self.embedding


def _matrices(config: LlamaConfig) -> Iterator[tuple[str, int, int, bool]]:
    """(name, N, K, whether it has a bias) of one layer's products, fused as the fast path fuses them."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, head_dim(config)
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    yield "qkv", queries + 2 * keys, hidden, config.attention_bias
    yield "o", hidden, queries, config.attention_bias
    yield "gate_up", 2 * inner, hidden, config.mlp_bias
    yield "down", hidden, inner, config.mlp_bias


def matrix_bytes(rows: int, columns: int, weights: str | None, itemsize: int) -> int:
    """Bytes of an [N, K] matrix, as it is or in a small format."""
    if weights is None:
        return rows * columns * itemsize
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes(weights, rows, columns))


def weight_bytes(config: LlamaConfig, weights: str | None, dtype: torch.dtype) -> WeightBytes:
    """Bytes of all parameters, in the formats that `weights` brings; embedding, norms and biases stay in `dtype`.

    The head is int8 whenever the layers are small, and with it an embedding that is the same matrix.
    Raises `ValueError` naming a matrix whose columns the groups do not divide.
    """
    layer = 2 * config.hidden_size * dtype.itemsize
    for name, rows, columns, biased in _matrices(config):
        if weights is not None:
            check(weights, columns, name)
        layer += matrix_bytes(rows, columns, weights, dtype.itemsize) + biased * rows * dtype.itemsize
    format = None if weights is None else head_format(weights)
    head = matrix_bytes(config.vocab_size, config.hidden_size, format, dtype.itemsize)
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * dtype.itemsize
    norm = config.hidden_size * dtype.itemsize
    return WeightBytes(config.num_hidden_layers * layer + norm + head, embedding)


def rotary_bytes(shape: CacheShape) -> int:
    """Bytes of the tables of cosines and sines."""
    return 2 * shape.reserved_length * shape.head_dim * shape.dtype.itemsize


def prefill_bytes(
    config: LlamaConfig, shape: CacheShape, tokens: int, past: int, weights: str | None = None, products: str = "auto"
) -> int:
    """Bytes in passing of one prefill pass of `tokens` a row that ends at position `past` + tokens, and of choosing.

    The C++ attention of a CPU needs no mask. Where `products` are torch's own and where the C++ has no such head, a
    pass that has a past has one of [tokens, past + tokens], unless the cache is small: that is read block by block.
    """
    rows, itemsize, dim, device = shape.batch_size, shape.dtype.itemsize, shape.head_dim, shape.device.type
    count = rows * tokens
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    hidden, inner = config.hidden_size, config.intermediate_size
    at_once = min(count, max(_MLP_ROWS, rows)) if device == "cpu" else count
    attention = count * (2 * hidden + (queries + 2 * keys) + 4 * (queries + keys))  # at the rotation
    mlp = count * 2 * hidden + at_once * (3 * inner + 2 * hidden)
    held = max(attention, mlp) * itemsize
    if weights is not None:  # a block of a matrix at a time is widened, in C++ at once to the model's dtype
        held += EXPANDED_NUMBERS * (itemsize if device == "cpu" else 4 + 4 + itemsize)
    elif device == "cpu" and widens(shape.dtype) and count >= MANY_ROWS:  # a block of a matrix, and what it multiplies
        largest = max(rows * columns for _, rows, columns, _ in _matrices(config))
        held += 4 * (min(largest, WIDENED_NUMBERS) + at_once * inner)
    native = device == "cpu" and products != "stock" and has_native_attention(dim, shape.dtype)
    if device != "cpu" and not shape.is_plain:
        held += _SCORES_BYTES
    elif shape.is_plain and past and not native:
        group = config.num_attention_heads // config.num_key_value_heads
        held += tokens * (past + tokens) * (1 + itemsize * (1 + group))
    return held + rows * config.vocab_size * (itemsize + _HEAD_COPIES_BYTES)
