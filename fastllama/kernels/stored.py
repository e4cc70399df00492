"""Numbers as a cache stores them: quantised to the formats of `blocks`, and expanded again.

Keys or values [..., D] are stored as a tuple of tensors, their parts, in this order:

    f32, f16, bf16   numbers [..., D]
    int8             quants int8 [..., D], scale [..., 1] in the dtype of what was quantised
    q8_0             quants int8 [..., D], d fp16 [..., D/32]
    q4_0, iq4_nl     quants uint8 [..., D/2], d fp16 [..., D/32]
    q4_1             quants uint8 [..., D/2], d, m fp16 [..., D/32]
    q5_0             quants uint8 [..., D/2], fifth bits uint8 [..., D/8], d fp16 [..., D/32]
    q5_1             quants uint8 [..., D/2], fifth bits uint8 [..., D/8], d, m fp16 [..., D/32]

Within a block of 32, byte j has number j in its low four bits and number j + 16 in its high ones; fifth bit j belongs
to number j. A block's d, m, fifth bits and quants one after another are llama.cpp's block. The rules are those of the
`gguf` package's quantisers (int8: of torchao's llama; iq4_nl, for which that package has none: `_iq4_nl`), bit for bit
for finite numbers; in q4_1 and q5_1 a number that is -0 counts as +0, where numpy may take either. A block with a NaN
or an infinity expands to NaNs and infinities only: one scale serves all of it.

Legend: D head dim, R blocks of a row, r = 32 numbers of a block.
"""

import functools
import itertools

import torch

from fastllama.kernels.blocks import BLOCK, FORMATS

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml's kvalues_iq4nl
_LEVELS = {"q4_1": 15, "q5_1": 31}
_HALF_LEVELS = {"q4_0": 8, "q5_0": 16}
_LEAST_SCALE = 1e-5  # of int8


def part_sizes(format: str, head_dim: int, dtype: torch.dtype) -> list[tuple[int, torch.dtype]]:
    """Last dimension and dtype of each part, for a model of `dtype`.

    Raises `ValueError` for an unknown format and where blocks of 32 do not divide `head_dim`.
    """
    if format not in FORMATS:
        raise ValueError(f"cache format {format!r} is not known; allowed: {', '.join(FORMATS)}")
    if format in FLOATS:
        return [(head_dim, FLOATS[format])]
    if format == "int8":
        return [(head_dim, torch.int8), (1, dtype)]
    if head_dim % BLOCK:
        raise ValueError(f"head_dim={head_dim} is not a multiple of {BLOCK}, which the cache format {format} needs")
    sizes = [(head_dim, torch.int8)] if format == "q8_0" else [(head_dim // 2, torch.uint8)]
    if format in ("q5_0", "q5_1"):
        sizes.append((head_dim // 8, torch.uint8))
    scales = 2 if format in _LEVELS else 1
    return sizes + [(head_dim // BLOCK, torch.float16)] * scales


def quantise(x: torch.Tensor, format: str) -> tuple[torch.Tensor, ...]:
    """The parts of x [..., D]. Raises `ValueError` as `part_sizes` does."""
    part_sizes(format, x.shape[-1], x.dtype)
    if format in FLOATS:
        return (x.to(FLOATS[format]),)
    if format == "int8":
        return _int8(x)
    x_Rr = x.float().unflatten(-1, (-1, BLOCK))
    if format == "q8_0":
        return _q8_0(x_Rr)
    if format == "iq4_nl":
        return _iq4_nl(x_Rr)
    return _offset(x_Rr, _LEVELS[format]) if format in _LEVELS else _signed(x_Rr, _HALF_LEVELS[format])


def expand(parts: tuple[torch.Tensor, ...] | list[torch.Tensor], format: str, dtype: torch.dtype) -> torch.Tensor:
    """The numbers [..., D] that the parts stand for: computed in fp32, then rounded to `dtype`."""
    if format in FLOATS:
        return parts[0].to(dtype)
    if format == "int8":
        quants, scale = parts
        return (quants.float() * scale.float()).to(dtype)
    if format == "q8_0":
        quants_Rr, scales = parts[0].float().unflatten(-1, (-1, BLOCK)), parts[1:]
    elif format == "iq4_nl":
        codebook, _ = _codebook(parts[0].device)
        quants_Rr, scales = codebook[_nibbles(parts[0]).int()], parts[1:]
    else:
        quants_Rr, scales = _nibbles(parts[0]), parts[1:]
        if format in ("q5_0", "q5_1"):
            quants_Rr, scales = quants_Rr | (_bits(parts[1]) << 4), parts[2:]
        quants_Rr = quants_Rr.float() - _HALF_LEVELS.get(format, 0)
    x_Rr = quants_Rr * scales[0].float()[..., None]
    if format in _LEVELS:
        x_Rr = x_Rr + scales[1].float()[..., None]
    return x_Rr.flatten(-2).to(dtype)


def _int8(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    dtype, x = x.dtype, x.float()
    scale = _quotient(x.abs().amax(-1, keepdim=True), 127).clamp(min=_LEAST_SCALE).to(dtype)
    return _whole((x / scale.float()).round()).clamp(-127, 127).to(torch.int8), scale


def _q8_0(x_Rr: torch.Tensor) -> tuple[torch.Tensor, ...]:
    d_R1 = _quotient(x_Rr.abs().amax(-1, keepdim=True), 127)
    scaled_Rr = x_Rr * _inverse(d_R1)
    size_Rr = scaled_Rr.abs()
    whole_Rr = size_Rr.floor()
    whole_Rr = whole_Rr + (2 * (size_Rr - whole_Rr)).floor()  # half away from zero
    quants_Rr = _whole(scaled_Rr.sign() * whole_Rr).to(torch.int8)
    return quants_Rr.flatten(-2), d_R1[..., 0].half()


def _signed(x_Rr: torch.Tensor, half: int) -> tuple[torch.Tensor, ...]:
    d_R1 = _quotient(_furthest(x_Rr), -half)
    quants_Rr = _whole((x_Rr * _inverse(d_R1) + (half + 0.5)).trunc()).clamp(0, 2 * half - 1).to(torch.uint8)
    return *_packed(quants_Rr, half == 16), d_R1[..., 0].half()


def _offset(x_Rr: torch.Tensor, levels: int) -> tuple[torch.Tensor, ...]:
    x_Rr = x_Rr + 0.0  # of zeros of both signs numpy, and each device, takes either as the least: here all are +0
    least_R1 = x_Rr.amin(-1, keepdim=True)
    d_R1 = _quotient(x_Rr.amax(-1, keepdim=True) - least_R1, levels)
    quants_Rr = _whole(((x_Rr - least_R1) * _inverse(d_R1) + 0.5).trunc()).clamp(0, levels).to(torch.uint8)
    return *_packed(quants_Rr, levels == 31), d_R1[..., 0].half(), least_R1[..., 0].half()


def _iq4_nl(x_Rr: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The number furthest from zero is the codebook's first (-127 d); each takes the nearest, of two the upper."""
    d_R1 = _quotient(_furthest(x_Rr), IQ4_NL[0])
    scaled_Rr = x_Rr * _inverse(d_R1)
    _, middles = _codebook(x_Rr.device)
    quants_Rr = torch.bucketize(scaled_Rr.contiguous(), middles, right=True).to(torch.uint8)
    quants_Rr = torch.where(scaled_Rr.isfinite(), quants_Rr, 0)
    return *_packed(quants_Rr, False), d_R1[..., 0].half()


@functools.cache  # made once: a graph being captured cannot copy from the host
def _codebook(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    middles = [(a + b) / 2 for a, b in itertools.pairwise(IQ4_NL)]
    numbers, between = (torch.tensor(each, dtype=torch.float32, device=device) for each in (IQ4_NL, middles))
    return numbers, between


def _furthest(x_Rr: torch.Tensor) -> torch.Tensor:
    """The number furthest from zero, with its sign; of several the first."""
    return x_Rr.gather(-1, x_Rr.abs().argmax(-1, keepdim=True))


def _quotient(x: torch.Tensor, number: float) -> torch.Tensor:
    # By a tensor: by a Python number a GPU multiplies with the reciprocal, which rounds otherwise.
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


def _inverse(d: torch.Tensor) -> torch.Tensor:
    return torch.where(d == 0, 0.0, d.reciprocal())


def _whole(x: torch.Tensor) -> torch.Tensor:
    """What is no number becomes 0, which is what numpy's cast makes of it too: 1/d overflows beside denormals."""
    return torch.where(x.isfinite(), x, 0.0)


def _packed(quants_Rr: torch.Tensor, fifth: bool) -> tuple[torch.Tensor, ...]:
    low, high = quants_Rr.split(BLOCK // 2, dim=-1)
    nibbles = ((low & 15) | (high << 4)).flatten(-2)
    if not fifth:
        return (nibbles,)
    bits = (quants_Rr >> 4).unflatten(-1, (-1, 8)) << torch.arange(8, dtype=torch.uint8, device=quants_Rr.device)
    return nibbles, bits.sum(-1, dtype=torch.uint8).flatten(-2)


def _nibbles(bytes: torch.Tensor) -> torch.Tensor:
    bytes = bytes.unflatten(-1, (-1, BLOCK // 2))
    return torch.cat((bytes & 15, bytes >> 4), dim=-1)


def _bits(bytes: torch.Tensor) -> torch.Tensor:
    bits = (bytes[..., None] >> torch.arange(8, dtype=torch.uint8, device=bytes.device)) & 1
    return bits.flatten(-2).unflatten(-1, (-1, BLOCK))
