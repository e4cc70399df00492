"""Products y = x W^T + b, in the formulations that serve a decode step, and the one for many rows.

Legend: x [..., K], W [N, K], b [N]. The specification of each is torch.nn.functional.linear in fp32.
"""

import itertools
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastllama.kernels import native

NATIVE_ROWS = 16  # beyond, the libraries' many-row products are faster
UNIT_ROWS = 64  # likewise in bf16, where there is a matrix unit: see `native_rows`
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANY_ROWS = 16  # rows from which it pays that oneDNN rearranges the weight for the call
WIDENED_NUMBERS = 2**22  # numbers of a half-precision weight that are widened at a time
_ROW_HINT = 128  # the packed form for 128 rows is the fastest at every row count
# Whether oneDNN multiplies bf16 and fp16 on this processor. Where it does not, torch's own product of bf16 for many
# rows runs at a sixth of fp32's speed (18 x 10^9 operations a second for 120, AMD EPYC family 25 model 1). Where it
# multiplies fp16 (AVX512-FP16) it sums in fp32, at 182 to 187 x 10^9 operations a second beside 160 to 170 in fp32.
_HAS_BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
_HAS_FP16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()

_library = torch.library.Library("fastllama", "DEF")
_library.define("linear_packed(Tensor x, Tensor handle, Tensor? bias, int out_features) -> Tensor")
_packed: dict[int, torch.Tensor] = {}  # by handle: compiled code cannot take an opaque tensor as an argument
_handles = itertools.count()


def _linear_packed(x, handle, bias, out_features):
    return torch.ops.mkldnn._linear_pointwise(x, _packed[int(handle)], bias, "none", [], "")


_library.impl("linear_packed", _linear_packed, "CPU")


def _packed_shape(x, handle, bias, out_features):
    return x.new_empty((*x.shape[:-1], out_features))


# Not by register_fake: it looks for its caller through every module of the process, while all are being imported.
_library.impl("linear_packed", _packed_shape, "Meta")


def native_rows(dtype: torch.dtype) -> int:
    """Rows of x that the C++ product is for; once the operators are loaded.

    A matrix unit takes 64 rows in bf16 at 0.8 of the time of torch's product and 16 at 0.6 (11264 x 2048, AMX).
    """
    return UNIT_ROWS if native.has_matrix_unit and dtype == torch.bfloat16 else NATIVE_ROWS


def rows_of(x: torch.Tensor) -> int:
    """Rows of x [..., K] as a matrix."""
    return x.shape[:-1].numel()


class Stock(NamedTuple):
    """torch's own call, but for many rows on a CPU: see `many_rows`."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return many_rows(x, self.weight, self.bias)


class Native(NamedTuple):
    """The C++ operator of native_code, for up to `native_rows` rows. The weight lies as it is."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if rows_of(x) > native_rows(x.dtype):
            return many_rows(x, self.weight, self.bias)
        return torch.ops.fastllama_native.linear_rows(x, self.weight, self.bias)


class Packed(NamedTuple):
    """A weight rearranged once for oneDNN, for any number of rows. `handle` is an int64 scalar that names it."""

    handle: torch.Tensor
    bias: torch.Tensor | None
    out_features: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.fastllama.linear_packed(x, self.handle, self.bias, self.out_features)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this torch, device and dtype have the packed form."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and (weight.dtype == torch.float32 or _HAS_BF16)
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack(weight: torch.Tensor) -> torch.Tensor:
    """The weight in oneDNN's own arrangement, as an opaque tensor; `to_dense()` gives the same numbers back."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROW_HINT)


def hold(packed: torch.Tensor) -> torch.Tensor:
    """Keeps a packed weight for `Packed`, as long as the handle that is returned lives: compiled code may outlive the
    product."""
    number = next(_handles)
    handle = torch.tensor(number)
    # A handle may die anywhere, in the middle of a compilation too: what runs then must not touch a tensor.
    weakref.finalize(handle, _packed.pop, number, None)
    _packed[number] = packed
    return handle


def held(handle: torch.Tensor) -> torch.Tensor:
    """The packed weight of a handle."""
    return _packed[int(handle)]


def let_go(handle: torch.Tensor) -> None:
    """Forgets a packed weight."""
    _packed.pop(int(handle), None)


def many_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear, computed where a CPU has the units for it.

    fp32 goes to oneDNN, which for many rows is 2 to 3 times as fast as torch's default there. fp16 and bf16 are widened
    to fp32 block by block where the processor has no product for them: the sums are exact to fp32 and rounded once.
    """
    if weight.device.type != "cpu" or rows_of(x) < MANY_ROWS or x.dtype != weight.dtype:  # which F.linear refuses
        return F.linear(x, weight, bias)
    if weight.dtype == torch.float32:
        return _onednn(x, weight, bias)
    return _widened(x, weight, bias) if widens(weight.dtype) else F.linear(x, weight, bias)


def widens(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies many rows of `dtype` faster as fp32."""
    return (dtype == torch.float16 and not _HAS_FP16) or (dtype == torch.bfloat16 and not _HAS_BF16)


def _onednn(x, weight, bias):
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _widened(x, weight, bias):
    wide = x.float()
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    step = max(1, WIDENED_NUMBERS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        part = slice(start, start + step)
        out[..., part] = _onednn(wide, weight[part].float(), None if bias is None else bias[part].float())
    return out
