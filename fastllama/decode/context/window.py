"""What a shifted cache holds, as transformers has caches.

Legend: B batch, S cache positions, K kv heads, D head dim.
"""

from torch import nn
from transformers.cache_utils import DynamicCache


def window_out(model: nn.Module, cache, lengths: list[int]) -> DynamicCache:
    """The tokens that each row still holds, at positions 0, 1, 2, ... of their own, to the right of zeros.

    A forward goes on from it with position_ids that follow the row's own length and a mask that hides the zeros.
    """
    result, width = DynamicCache(config=model.config), max(lengths)
    for layer in range(cache.shape.num_layers):
        pair = []
        for storage_BKSD in cache.floats(layer, len(lengths), width):
            out_BKSD = storage_BKSD.new_zeros(storage_BKSD.shape)
            for row, length in enumerate(lengths):
                out_BKSD[row, :, width - length :] = storage_BKSD[row, :, :length]
            pair.append(out_BKSD.to(model.device))
        result.update(*pair, layer)
    return result
