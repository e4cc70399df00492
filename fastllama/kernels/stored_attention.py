"""Attention to keys and values as a cache stores them, and storing them: each one operator, also to torch.compile.

On a CPU both are C++ where that is built. Elsewhere attention expands a block of positions at a time and keeps a
running softmax (Milakov and Gimelshein, 2018), so that no more than a block is ever held expanded; how many blocks
there are follows from sizes alone, so a CUDA graph can hold it.

Legend: B batch, Q query tokens, S cache positions, N query heads, K kv heads, G = N / K, r = G Q rows, D head dim.
"""

from typing import Any

import torch

from fastllama.kernels import native
from fastllama.kernels.attention import head_obstacle
from fastllama.kernels.stored import expand, quantise

# Numbers of keys that are expanded at a time, and scores that are held: on a CPU few enough to stay in its cache.
_EXPANDED = {"cpu": 2**18, "gpu": 2**23}
_SCORES = {"cpu": 2**20, "gpu": 2**26}
_POSITIONS = 256  # at least, in one block
_STORED_TOKENS = 1024  # quantised at a time

_LIBRARY = torch.library.Library("fastllama", "FRAGMENT")
_LIBRARY.define(
    "attend_stored(Tensor query, Tensor[] keys, str key_format, Tensor[] values, str value_format, Tensor seen,"
    " SymInt used, float scale, bool native) -> Tensor"
)
_LIBRARY.define("store(Tensor new, Tensor(a!)[] parts, str format, Tensor index, bool native) -> ()")


def native_obstacle(device: torch.device, head_dim: int) -> str | None:
    """Why C++ cannot do both here; None when it can."""
    if device.type != "cpu":
        return "the cache is not on a CPU"
    reason = head_obstacle(head_dim) or native.load()
    if reason is None and not hasattr(torch.ops.fastllama_native, "attend_stored"):
        reason = "the library does not read stored formats"
    return reason


def attend_stored(
    query_BQND: torch.Tensor,
    keys: tuple[torch.Tensor, ...],
    key_format: str,
    values: tuple[torch.Tensor, ...],
    value_format: str,
    seen_BQ: torch.Tensor,
    used: int,
    scale: float,
    native: bool,
) -> torch.Tensor:
    """Attention of new tokens to a cache that already stores them. Returns [B, Q, N D].

    Parts are [>= B, K, >= used, n] (`kernels.stored`). Token q of row b sees the first `seen_BQ[b, q]` positions: at
    least one, and at most used - (Q - 1 - q). `native`: in C++, where `native_obstacle` has found none.
    """
    return torch.ops.fastllama.attend_stored(
        query_BQND, keys, key_format, values, value_format, seen_BQ, used, scale, native
    )


def store(
    new_BQKD: torch.Tensor, parts: tuple[torch.Tensor, ...], format: str, index_BQ: torch.Tensor, native: bool
) -> None:
    """Quantises new keys or values into the parts, at each row's own positions `index_BQ`."""
    torch.ops.fastllama.store(new_BQKD, parts, format, index_BQ, native)


def _attend(query_BQND, keys, key_format, values, value_format, seen_BQ, used, scale, native):
    if native:
        return torch.ops.fastllama_native.attend_stored(
            query_BQND, keys, key_format, values, value_format, seen_BQ, scale
        )
    batch, tokens, heads, dim = query_BQND.shape
    kv_heads, kind = keys[0].shape[1], "cpu" if query_BQND.device.type == "cpu" else "gpu"
    block = min(max(_EXPANDED[kind] // (batch * kv_heads * dim), _POSITIONS), used)
    rows = max(_SCORES[kind] // (batch * heads * block), 1)
    out_BQND = torch.empty_like(query_BQND, memory_format=torch.contiguous_format)
    for first in range(0, tokens, rows):
        last = min(first + rows, tokens)
        part = slice(first, last)
        end = used - (tokens - last)
        state = _Running(query_BQND[:, part], kv_heads, seen_BQ[:, part], scale)
        for start in range(0, end, block):
            stop = min(start + block, end)
            key, value = (
                expand([x[:batch, :, start:stop] for x in parts], format, query_BQND.dtype)
                for parts, format in ((keys, key_format), (values, value_format))
            )
            state.take(key, value, start)
        out_BQND[:, part] = state.result()
    return out_BQND.flatten(2)


class _Running:
    """Softmax and weighted sum, block after block, in fp32: the top score, the sum of weights, the sum of values."""

    def __init__(self, query_BQND: torch.Tensor, kv_heads: int, seen_BQ: torch.Tensor, scale: float):
        batch, tokens, heads, dim = query_BQND.shape
        self.dtype, self.scale = query_BQND.dtype, scale
        self.group = heads // kv_heads
        query_BKGQD = query_BQND.unflatten(2, (kv_heads, self.group)).permute(0, 2, 3, 1, 4)
        # A GPU multiplies halves exactly, into fp32; a CPU does so only with fp32.
        self.halves = query_BQND.is_cuda and self.dtype != torch.float32
        self.query = self._flat(query_BKGQD.flatten(2, 3))
        self.seen_B1r1 = seen_BQ.repeat(1, self.group)[:, None, :, None]
        self.shape = (batch, kv_heads, self.group * tokens)
        place: dict[str, Any] = {"dtype": torch.float32, "device": query_BQND.device}
        # Not -inf: the difference of two would be NaN.
        self.top = torch.full((*self.shape, 1), torch.finfo(torch.float32).min, **place)
        self.weight = torch.zeros(*self.shape, 1, **place)
        self.sum = torch.zeros(*self.shape, dim, **place)

    def _flat(self, x_BKSD: torch.Tensor) -> torch.Tensor:
        x = x_BKSD.flatten(0, 1)
        return x if self.halves else x.float()

    def _product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = torch.bmm(a, b, out_dtype=torch.float32) if self.halves else torch.bmm(a, b)
        return product.unflatten(0, self.shape[:2])

    def take(self, key_BKSD: torch.Tensor, value_BKSD: torch.Tensor, start: int) -> None:
        positions = torch.arange(start, start + key_BKSD.shape[2], device=key_BKSD.device)
        score_BKrS = self._product(self.query, self._flat(key_BKSD).mT).mul_(self.scale)
        score_BKrS.masked_fill_(positions >= self.seen_B1r1, float("-inf"))
        top = torch.maximum(self.top, score_BKrS.amax(-1, keepdim=True))
        weight_BKrS = score_BKrS.sub_(top).exp_()
        kept = (self.top - top).exp_()
        self.top = top
        self.weight = self.weight * kept + weight_BKrS.sum(-1, keepdim=True)
        weight = weight_BKrS.flatten(0, 1)
        weight = weight.to(self.dtype) if self.halves else weight
        self.sum = self.sum * kept + self._product(weight, self._flat(value_BKSD))

    def result(self) -> torch.Tensor:
        """[B, Q, N, D] in the dtype of the query."""
        out_BKGQD = (self.sum / self.weight).to(self.dtype).unflatten(2, (self.group, -1))
        return out_BKGQD.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _store(new_BQKD, parts, format, index_BQ, native):
    if native:
        torch.ops.fastllama_native.store(new_BQKD, parts, format, index_BQ)
        return
    rows_B1 = torch.arange(new_BQKD.shape[0], device=new_BQKD.device)[:, None]
    size = _STORED_TOKENS
    for new, index in zip(new_BQKD.split(size, dim=1), index_BQ.split(size, dim=1), strict=True):
        for part, numbers in zip(parts, quantise(new, format), strict=True):
            part[rows_B1, :, index] = numbers


def _shape(query_BQND, keys, key_format, values, value_format, seen_BQ, used, scale, native):
    return query_BQND.new_empty(*query_BQND.shape[:2], query_BQND.shape[2] * query_BQND.shape[3])


def _nothing(new_BQKD, parts, format, index_BQ, native):
    return None


_LIBRARY.impl("attend_stored", _attend, "CompositeExplicitAutograd")
_LIBRARY.impl("store", _store, "CompositeExplicitAutograd")
_LIBRARY.impl("attend_stored", _shape, "Meta")
_LIBRARY.impl("store", _nothing, "Meta")
