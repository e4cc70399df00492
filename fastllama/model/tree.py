"""Tree attention: tokens of several branches lie one behind the other in a row, and each sees its own branch only.

After SpecInfer (Miao et al. 2023, arXiv 2305.09781): one forward pass verifies a whole tree of proposals.

Legend: B rows, Q newest tokens, T tokens of the tree so far, the newest last, S cache positions.
"""

from typing import NamedTuple, Protocol

import torch


class Masking(Protocol):
    """Who says what new tokens may see."""

    def mask(self, index_BQ: torch.Tensor, positions_S: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores [B, 1, Q, S] of tokens at `index_BQ` of the cache."""
        ...


class Branching(NamedTuple):
    """What a step must know of the tree: `depth_BQ`, how far behind the text each newest token stands (the first of a
    branch at 0), and `seen_BQT`, whether it sees each token of the tree. All see the whole text before the tree."""

    depth_BQ: torch.Tensor
    seen_BQT: torch.Tensor

    def padded(self, idle: int) -> "Branching":
        """With `idle` more rows, whose tokens see themselves."""
        tokens, total = self.seen_BQT.shape[1:]
        own = torch.eye(total, dtype=torch.bool, device=self.seen_BQT.device)[total - tokens :]
        depth = self.depth_BQ.new_zeros(idle, tokens)
        return Branching(torch.cat((self.depth_BQ, depth)), torch.cat((self.seen_BQT, own.expand(idle, -1, -1))))

    def positions(self, index_BQ: torch.Tensor) -> torch.Tensor:
        """The position [B, Q] of each newest token in its own text, where it lies at `index_BQ` of the cache."""
        return self._start(index_BQ) + self.depth_BQ

    def mask(self, index_BQ: torch.Tensor, positions_S: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores [B, 1, Q, S] of the newest tokens."""
        total = self.seen_BQT.shape[2]
        place_B1S = positions_S - self._start(index_BQ)[..., None]
        inside_BQS = place_B1S.clamp(0, total - 1).expand(-1, index_BQ.shape[1], -1)
        seen_BQS = (place_B1S < 0) | ((place_B1S < total) & self.seen_BQT.gather(2, inside_BQS))
        mask_BQS = torch.zeros(seen_BQS.shape, dtype=dtype, device=seen_BQS.device)
        return mask_BQS.masked_fill_(~seen_BQS, float("-inf"))[:, None]

    def _start(self, index_BQ: torch.Tensor) -> torch.Tensor:
        """Where the tree begins in each row's cache [B, 1]."""
        return index_BQ[:, -1:] + 1 - self.seen_BQT.shape[2]
