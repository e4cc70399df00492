"""A draft that is its target in fewer bits goes on from the target's keys and values, and needs no prompt of its own.

What one of them holds of a text the other could have written: the draft reads keys and values that are better than its
own, and taking them over costs their bytes instead of a forward pass. Only what it proposes depends on that.
"""

import torch
from torch import nn

from fastllama.decode.engine import Engine

_ROWS = 64  # of the embedding that are compared
# What decides how keys and values are computed.
_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
)


def is_same_model(model: nn.Module, draft: nn.Module) -> bool:
    """Whether two Llamas have the same shape and, where both hold floats outside their layers' products, those floats.

    The norms are floats whatever the weights are held in; an embedding that the output matrix is tied to may not be.
    A draft that was tuned in its products alone counts as the same: it then proposes a little less well.
    """
    if any(getattr(model.config, name, None) != getattr(draft.config, name, None) for name in _SHAPE):
        return False
    ours, theirs = model.model, draft.model
    pairs = [(ours.norm.weight, theirs.norm.weight)]
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        pairs.append((one.input_layernorm.weight, other.input_layernorm.weight))
    tables = ours.embed_tokens.weight, theirs.embed_tokens.weight
    if all(table.is_floating_point() and table.shape == tables[0].shape for table in tables):
        pairs.append((tables[0][:_ROWS], tables[1][:_ROWS]))
    same = [one.device == other.device and one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs]
    return all(same)


class Shared:
    """The target's cache as its draft's source."""

    def __init__(self, target: Engine):
        self.target = target
        self.taken = 0  # positions that every row has taken over

    def fits(self, draft: Engine) -> bool:
        """Whether both caches hold the same kind of numbers in the same order."""
        ours, theirs = self.target.cache.storages, draft.cache.storages
        return [*map(_kind, ours)] == [*map(_kind, theirs)]

    def take_over(self, draft: Engine, ends: list[int]) -> None:
        """Copies the first `ends` positions of each row, as far as that was not done before."""
        rows, first, last = len(ends), min(self.taken, *ends), max(ends)
        for source, storage in zip(self.target.cache.storages, draft.cache.storages, strict=True):
            storage[:rows, :, first:last] = source[:rows, :, first:last]
        self.taken = min(ends)
        draft.hold(rows, last, last)


def _kind(storage: torch.Tensor) -> tuple:
    """All but the numbers of rows and positions."""
    _, heads, _, *rest = storage.shape
    return storage.dtype, storage.device, heads, rest
