"""The formats in which weights are held in fewer bits than a float has.

Legend: W [N, K]; G numbers along K share a scale in int4, a whole row in int8 and float8.
"""

from typing import NamedTuple


class WeightFormat(NamedTuple):
    """`bits` of each number; `group` numbers along K that share a scale, None for a whole row."""

    name: str
    bits: int
    group: int | None


INT8 = WeightFormat("int8", 8, None)
WEIGHTS = {
    format.name: format
    for format in (
        INT8,
        WeightFormat("int4", 4, 32),
        *(WeightFormat(f"int4-g{group}", 4, group) for group in (32, 64, 128, 256)),
        WeightFormat("float8", 8, None),
    )
}


def canonical(name: str) -> str:
    """The name with its group spelt out: `int4` is `int4-g32`."""
    return f"int4-g{WEIGHTS[name].group}" if WEIGHTS[name].bits == 4 else name


def head_format(name: str) -> str:
    """The format of the output matrix, whose loss is felt most: int8 beside int4."""
    return name if name == "float8" else INT8.name
