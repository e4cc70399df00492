"""Peak memory, predicted from a model's configuration and a point, before anything is loaded.

B rows, P prompt tokens, N new tokens, E hidden size, I intermediate size, Q and K columns of queries and of keys
"""

from dataclasses import dataclass
from functools import cache

import torch
from transformers import LlamaConfig

from fastllama.cache.budget import CacheShape, available_bytes
from fastllama.kernels.small_product import EXPANDED_NUMBERS
from fastllama.lab import checkpoint, memory
from fastllama.lab.point import Point

# A prediction is good to this share of the peak that lab/memory.py measures, for contestants that are not compiled
# (a compiler's own memory is not predicted); tests/test_peak.py holds it to that.
MARGIN = 0.25
# A CPU's heap keeps what passing tensors leave behind: up to about as much again.
_HEAP = 2
_FIRST_USE = 50_000_000  # bytes of tokenizer, text, threads and what libraries import when they are first used
_LOGITS = 3  # fp32 copies of one position's logits that choosing a token takes
_MLP_ROWS = 256  # rows that our prefill takes through an MLP at a time on a CPU


@dataclass(frozen=True)
class Peak:
    """Bytes that one contestant takes alone in a new process.

    base: the interpreter and the libraries, on a CPU. work: what a forward pass holds beside weights and cache.
    """

    base: int
    weights: int
    cache: int
    work: int

    @property
    def nbytes(self) -> int:
        return self.base + self.weights + self.cache + self.work


@dataclass(frozen=True)
class Fit:
    """What measuring a point needs beyond what this process holds already, and what is free, in bytes."""

    point: Point
    needed: float
    free: float

    @property
    def fits(self) -> bool:
        return self.needed <= self.free

    def __str__(self) -> str:
        work = self.point.workload
        return (
            f"batch {work.batch_size} and {self.point.positions} positions are predicted to need "
            f"{self.needed / 1e9:.1f} GB, and {self.free / 1e9:.1f} GB are free on {self.point.device}"
        )


@cache
def _base() -> int:
    """What a process holds that has imported the laboratory and loaded nothing, as this one when it is first asked."""
    return memory.own_bytes() + _FIRST_USE


@cache
def _sizes(model: str, dtype: torch.dtype, weights: str | None) -> tuple[LlamaConfig, int]:
    """(configuration, bytes of the weights)"""
    found = checkpoint.outline(model, dtype)
    return found.config, found.weight_bytes(dtype.itemsize, weights)


def predict(point: Point, name: str) -> Peak:
    """The peak of contestant `name`. Nothing is loaded or built; raises as `checkpoint.outline` does."""
    config, weights = _sizes(point.model, point.torch_dtype, point.weights if name == "ours" else None)
    on_cpu, itemsize = torch.device(point.device).type == "cpu", point.torch_dtype.itemsize
    base, heap = (_base(), _HEAP) if on_cpu else (0, 1)
    work = point.workload
    tokens = work.batch_size * work.prompt_length
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    logits = work.batch_size * config.vocab_size * (itemsize + 4 * _LOGITS)
    position = checkpoint.position_bytes(config, itemsize)
    if name == "ours":
        shape = CacheShape(
            config.num_hidden_layers, work.batch_size, config.num_key_value_heads, max(point.positions, 2),
            head_dim, point.torch_dtype, torch.device(point.device),
        )  # fmt: skip
        chunk = min(tokens, work.batch_size * (point.config.prefill_chunk or work.prompt_length))
        rows = min(chunk, _MLP_ROWS) if on_cpu else chunk
        attention = chunk * (2 * hidden + (queries + 2 * keys) + 4 * (queries + keys))  # at the rotation
        mlp = chunk * 2 * hidden + rows * (3 * inner + 2 * hidden)
        held = heap * max(attention, mlp) * itemsize + logits
        if point.weights is not None:  # a prompt's products expand a block of a weight at a time
            held += EXPANDED_NUMBERS * (4 + 4 + itemsize)
        return Peak(base, weights, shape.nbytes, held)
    attention = tokens * (2 * hidden + 6 * queries)
    mlp = tokens * (2 * hidden + 3 * inner)
    held = heap * max(attention, mlp) * itemsize + logits
    if work.batch_size > 1:  # rows of different length: a mask of P x P a row, and as numbers inside the attention
        held += work.batch_size * work.prompt_length**2 * (1 + itemsize)
    # The last layer's keys and values are held twice while a token is added to them.
    cache_bytes = position * work.batch_size * work.total_length * (1 + 1 / config.num_hidden_layers)
    return Peak(base, weights, int(cache_bytes), held)


def fit(point: Point) -> Fit:
    """Whether a point can be measured now: its contestants together, on one copy of the weights where both hold floats,
    or each by itself."""
    peaks = [predict(point, name) for name in point.contestants]
    weights = peaks[0].weights if point.weights is None else sum(peak.weights for peak in peaks)
    together = weights + sum(peak.cache for peak in peaks) + max(peak.work for peak in peaks)
    # The contestants are gone when each is measured in a process of its own.
    alone = max(peak.nbytes for peak in peaks)
    return Fit(point, max(together, alone), available_bytes(torch.device(point.device)))
