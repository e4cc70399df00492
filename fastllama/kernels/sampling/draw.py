"""The draw: one token of each row, from a number of the row's own.

Legend: B rows, V vocabulary.
"""

import torch

from fastllama.kernels.sampling.candidates import RULED_OUT


def drawn(scores_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """int64 [B]: the first token at which the sum of the probabilities, in the order of ids, exceeds `uniform_B`.

    `uniform_B` float64 in [0, 1). A token that is ruled out (-inf) is never drawn.
    """
    # In float64, so that no probability of a float32 is lost beside the sum of 100,000 others.
    weight_BV = (scores_BV - scores_BV.amax(-1, keepdim=True)).to(torch.float64).exp()
    sum_BV = weight_BV.cumsum(-1)
    total_B1 = sum_BV[:, -1:].contiguous()
    drawn_B1 = torch.searchsorted(sum_BV, uniform_B[:, None] * total_B1, right=True)
    last_B1 = torch.searchsorted(sum_BV, total_B1)  # the last with a probability: a product may round up to the sum
    return torch.minimum(drawn_B1, last_B1)[:, 0]


def only(scores_BV: torch.Tensor, token_B: torch.Tensor) -> torch.Tensor:
    """Scores [B, V] that leave a row its `token_B` (int64 [B]) alone."""
    return torch.full_like(scores_BV, RULED_OUT).scatter_(1, token_B[:, None], 0.0)
