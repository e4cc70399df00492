"""Rows of a call: how many tokens each holds, known without asking the device."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Rows:
    """All rows of a call take the same number of tokens at a time, so what tells them apart is how far each is behind
    the longest, whose length (`used`) the engine counts."""

    def __init__(self, lengths: Sequence[int] = ()):
        self.behind = [max(lengths) - length for length in lengths]

    def lengths(self, used: int) -> list[int]:
        """Tokens that each row holds."""
        return [used - behind for behind in self.behind]


def runs(items: Sequence[Item]) -> Iterator[tuple[slice, Item]]:
    """Neighbouring rows whose items are equal, and the item: a slice of rows needs no index on the device."""
    start = 0
    for row in range(1, len(items) + 1):
        if row == len(items) or items[row] != items[start]:
            yield slice(start, row), items[start]
            start = row
