"""The embedding as the fast path reads it: a table of rows.

Legend: V vocabulary, E hidden size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fastllama.kernels.small_product import dequantise_rows
from fastllama.model.small_linear import SmallEmbedding
from fastllama.model.sources import is_plain


class Table(NamedTuple):
    """The embedding: rows of `weight` [V, E]."""

    weight: torch.Tensor

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight)


class SmallTable(NamedTuple):
    """The embedding in few bits: its rows are expanded to the dtype of `like` as they are looked up."""

    quants: torch.Tensor
    scales: torch.Tensor
    like: torch.Tensor
    format: str
    out_features: int
    in_features: int

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return dequantise_rows(self.quants, self.scales, self.format, self.in_features, ids, self.like.dtype)


def table(embedding: nn.Module) -> Table | SmallTable | nn.Module:
    """The module's table, or the module itself where it is of an unknown kind."""
    if is_plain(embedding, nn.Embedding):
        return Table(embedding.weight)
    if is_plain(embedding, SmallEmbedding):
        e = embedding
        return SmallTable(e.weight, e.weight_scale, e.like, e.format, e.rows, e.columns)
    return embedding
