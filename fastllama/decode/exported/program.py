"""StepProgram: the step as a module that torch.export can trace, with the cache among its inputs.

Legend: B batch, Q query tokens, S cache positions read, E hidden size, K kv heads, D head dim, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastllama.kernels.linear import Stock
from fastllama.model.forward import step
from fastllama.model.weights import Weights


class _Plain(NamedTuple):
    """torch's own product for any number of rows: a choice by their number would be two graphs."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class _LastOnly(NamedTuple):
    """The output matrix, for one token of each row: a prompt's other logits are nobody's."""

    product: _Plain
    rows_B: torch.Tensor
    last_B: torch.Tensor

    def __call__(self, hidden_BQE: torch.Tensor) -> torch.Tensor:
        return self.product(hidden_BQE[self.rows_B, self.last_B])


class _Causal:
    """What tokens may see where that follows from their positions alone: no mask is kept between steps."""

    def mask(self, index_BQ: torch.Tensor, positions_S: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        later_B1QS = positions_S > index_BQ[:, None, :, None]
        return torch.zeros((), dtype=dtype, device=index_BQ.device).masked_fill(later_B1QS, float("-inf"))


def _for_any_rows(part):
    if isinstance(part, Stock):
        return _Plain(*part)
    if isinstance(part, tuple):
        parts = [_for_any_rows(each) for each in part]
        return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)
    return part


class StepProgram(nn.Module):
    """One graph for a prompt (Q tokens) and a decode step (Q = 1), and for any number S of positions to read.

    It keeps no state and no mask: what a token sees follows from its position.
    """

    def __init__(self, weights: Weights, cos_SD: torch.Tensor, sin_SD: torch.Tensor):
        super().__init__()
        leaves, self._spec = tree_flatten((_for_any_rows(weights), cos_SD, sin_SD))
        self._leaves: list[tuple[bool, Any]] = []
        names: dict[tuple[int, torch.Size], str] = {}
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                self._leaves.append((False, leaf))
                continue
            place = (leaf.data_ptr(), leaf.shape)  # a tied embedding is held once
            if place not in names:
                names[place] = f"weight_{len(names)}"
                self.register_buffer(names[place], leaf.detach())
            self._leaves.append((True, names[place]))

    def forward(
        self,
        input_ids: torch.Tensor,
        lengths: torch.Tensor,
        valid_past_index: torch.Tensor,
        positions: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> torch.Tensor:
        """Stores `lengths` [B] new tokens of each row of `input_ids` [B, Q] and returns logits [B, V] of each last one.

        Rows are padded on the right; a row of length 0 is left as it was, and its logits mean nothing. `keys`, `values`
        (a tensor [B, K, storage, D] for each layer) and `valid_past_index` [B] are changed in place. Of the cache, the
        first S positions are read: `positions` is 0 .. S - 1, all int64.
        """
        leaves = [getattr(self, leaf) if is_tensor else leaf for is_tensor, leaf in self._leaves]
        weights, cos_SD, sin_SD = tree_unflatten(leaves, self._spec)
        batch, tokens = input_ids.shape
        rows_B = torch.arange(batch, device=input_ids.device)
        index_BQ = valid_past_index[:, None] + torch.arange(tokens, device=input_ids.device)
        last_B = (lengths - 1).clamp(min=0)
        weights = weights._replace(lm_head=_LastOnly(weights.lm_head, rows_B, last_B))
        how = (None, valid_past_index, rows_B[:, None], positions, input_ids, index_BQ)
        logits_BV = step(weights, keys, values, *how, cos_SD[index_BQ], sin_SD[index_BQ], _Causal())
        valid_past_index.add_(lengths - tokens)  # the step counted the padding too
        return logits_BV
