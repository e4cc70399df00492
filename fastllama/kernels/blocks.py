"""The formats in which a cache stores numbers, by their names in llama.cpp; `int8` is torchao's llama's.

A row is the D numbers of one head and token. Blocks of 32 numbers share a scale.
"""

from typing import NamedTuple

BLOCK = 32


class Format(NamedTuple):
    """`bits` of each number, and the bytes that a block needs beside them (`int8`: a row)."""

    name: str
    bits: int
    extra: int

    @property
    def is_float(self) -> bool:
        return self.extra == 0

    def row_bytes(self, head_dim: int, itemsize: int = 2) -> int:
        """Bytes of one head and token; `itemsize` is that of the model's dtype, in which `int8` keeps its scale."""
        extra = itemsize if self.name == "int8" else head_dim // BLOCK * self.extra
        return head_dim * self.bits // 8 + extra


FORMATS = {
    format.name: format
    for format in (
        Format("f32", 32, 0),
        Format("f16", 16, 0),
        Format("bf16", 16, 0),
        Format("int8", 8, 2),
        Format("q8_0", 8, 2),
        Format("q4_0", 4, 2),
        Format("q4_1", 4, 4),
        Format("q5_0", 5, 2),
        Format("q5_1", 5, 4),
        Format("iq4_nl", 4, 2),
    )
}
