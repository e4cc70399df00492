"""A plain model whose cache is shifted or grouped by hand: the oracle of texts longer than the cache.

One row at a time, on transformers' own model and lists of key and value tensors; turns are taken in fp64.
"""

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fastllama.kernels.stored import expand, quantise


def turned(key_KSD: torch.Tensor, distances: list[int], inv_freq: torch.Tensor) -> torch.Tensor:
    """Keys moved on by so many positions each, by complex multiplication."""
    half = key_KSD.shape[-1] // 2
    wide = torch.complex(key_KSD[..., :half].double(), key_KSD[..., half:].double())
    angle = torch.tensor(distances, dtype=torch.float64)[:, None] * inv_freq.double()
    wide = wide * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((wide.real, wide.imag), -1).to(key_KSD.dtype)


class PlainRow:
    """`kept`: which tokens of the text the cache holds; `positions`: where each of them stands."""

    def __init__(self, model, cache_k: str | None = None, cache_v: str | None = None):
        self.model, self.formats = model, (cache_k, cache_v)
        self.kept: list[int] = []
        self.positions: list[int] = []
        self.seen = self.shifts = 0
        self.cached = [None] * len(model.model.layers)

    def stored(self, x: torch.Tensor, side: int) -> torch.Tensor:
        format = self.formats[side]
        return x if format is None else expand(quantise(x, format), format, x.dtype)

    @torch.no_grad()
    def take(self, ids: list[int], positions: list[int]) -> torch.Tensor:
        """Appends tokens at these positions; logits [V] after the last."""
        body = self.model.model
        hidden = body.embed_tokens(torch.tensor(ids))[None]
        cos, sin = body.rotary_emb(hidden, torch.tensor(positions)[None])
        past, count = len(self.kept), len(ids)
        hides = torch.ones(count, past + count, dtype=torch.bool).triu(past + 1)
        for index, layer in enumerate(body.layers):
            attention, x = layer.self_attn, layer.input_layernorm(hidden)
            query, key, value = (
                projection(x).view(1, count, -1, attention.head_dim).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            new = [self.stored(x[0], side) for side, x in enumerate((key, value))]
            if self.cached[index] is not None:
                new = [torch.cat(both, 1) for both in zip(self.cached[index], new, strict=True)]
            self.cached[index] = new
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[0], dim=0) for x in new)
            scores = (query[0] @ key.mT * attention.scaling).masked_fill(hides, float("-inf"))
            weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
            hidden = hidden + attention.o_proj((weights @ value).transpose(0, 1).flatten(1)[None])
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.kept += range(self.seen, self.seen + count)
        self.positions += positions
        self.seen += count
        return self.model.lm_head(body.norm(hidden))[0, -1].float()

    def turn(self, distances: list[int]) -> None:
        """Moves the key of each cached token on by a distance; what does not move is not touched."""
        moved = torch.tensor([distance != 0 for distance in distances])
        inv_freq = self.model.model.rotary_emb.inv_freq
        for layer in self.cached:
            layer[0] = torch.where(moved[:, None], self.stored(turned(layer[0], distances, inv_freq), 0), layer[0])
        self.positions = [position + distance for position, distance in zip(self.positions, distances, strict=True)]

    def shift(self, keep: int) -> None:
        """llama.cpp's context shift."""
        drop = max((len(self.kept) - keep) // 2, 1)
        left = [*range(keep), *range(keep + drop, len(self.kept))]
        self.cached = [[x[:, left] for x in layer] for layer in self.cached]
        self.kept, self.positions = ([each[i] for i in left] for each in (self.kept, self.positions))
        self.turn([0] * keep + [-drop] * (len(left) - keep))
        self.shifts += 1


def rows_of(inputs: dict) -> list[list[int]]:
    """The ids of each row of a prompt, without its padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(*inputs.values(), strict=True)]


def assert_row_as_by_hand(
    found: list[int], ours_NV: torch.Tensor, logits_NV: torch.Tensor, bound: float, exact: bool
) -> None:
    """Our logits are the plain row's, which read our ids, so that a tie stays one; and the ids are greedy by them.

    `exact`: nothing was rounded to few bits on the way, where single numbers may be further off than most.
    """
    difference = (ours_NV - logits_NV).abs().amax(-1) / logits_NV.abs().amax(-1)
    assert difference.median() < bound and difference.max() < (bound if exact else 0.05)
    if exact:
        margins = logits_NV.topk(2).values
        sure = margins[:, 0] - margins[:, 1] > 1e-4
        assert torch.equal(logits_NV.argmax(-1)[sure], torch.tensor(found)[sure])


def shifted(model, prompt: list[int], new: int, cache_length: int, keep: int, forced=None, **formats):
    """(greedy ids, logits [new, V], the row): generation that shifts; `forced` ids are read in place of greedy ones."""
    row = PlainRow(model, **formats)
    logits = [row.take(prompt, list(range(len(prompt))))]
    ids = []
    while True:
        ids.append(int(logits[-1].argmax()) if forced is None else forced[len(ids)])
        if len(ids) == new:
            return ids, torch.stack(logits), row
        if len(row.kept) + 1 > cache_length:
            row.shift(keep)
        logits.append(row.take(ids[-1:], [len(row.kept)]))


def grouped(model, prompt: list[int], new: int, n: int, w: int, forced=None, **formats):
    """The same with self-extend, by llama.cpp's own loop over its own variables, before each batch of at most w."""
    row, ids, logits = PlainRow(model, **formats), [], []
    n_past = ga_i = 0

    def evaluate(batch: list[int]) -> None:
        nonlocal n_past, ga_i
        while n_past >= ga_i + w:
            ib, bd = n * ga_i // w, w // n * (n - 1)
            dd = w // n - ib * bd - w
            middle = ga_i + ib * bd
            after = [p + ib * bd if ga_i <= p < n_past else p for p in row.positions]
            after = [p // n if middle <= p < middle + w else p for p in after]
            after = [p + dd if middle + w <= p < n_past + ib * bd else p for p in after]
            # It too adds up a token's moves, and turns its key once.
            row.turn([new - old for new, old in zip(after, row.positions, strict=True)])
            n_past -= bd
            ga_i += w // n
        logits.append(row.take(batch, list(range(n_past, n_past + len(batch)))))
        n_past += len(batch)

    for start in range(0, len(prompt), w):
        evaluate(prompt[start : start + w])
    logits = logits[-1:]
    while True:
        ids.append(int(logits[-1].argmax()) if forced is None else forced[len(ids)])
        if len(ids) == new:
            return ids, torch.stack(logits), row
        evaluate(ids[-1:])
