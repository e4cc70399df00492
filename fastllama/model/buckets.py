"""Buckets: how much of the cache a step reads."""

import torch


class Buckets:
    """Views of the position index, one per bucket, whose length is the step's one dynamic dimension."""

    def __init__(self, positions: torch.Tensor, cache_length: int, bucket: int):
        self.positions, self.cache_length, self.bucket = positions, cache_length, bucket
        self.views: dict[int, torch.Tensor] = {}

    def lengths(self) -> list[int]:
        """Every bucket, shortest first."""
        return [*range(self.bucket, self.cache_length, self.bucket), self.cache_length]

    def covering(self, used: int) -> torch.Tensor:
        """The view for a step that reads `used` positions."""
        length = min(-(-used // self.bucket) * self.bucket, self.cache_length)
        view = self.views.get(length)
        if view is None:
            view = self.views[length] = self.positions[:length]
        return view
