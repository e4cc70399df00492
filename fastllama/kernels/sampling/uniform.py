"""Uniform numbers from a seed and a counter: no state, so that a row's draw is its own.

Legend: B rows.
"""

import torch

# splitmix64 (Steele, Lea, Flood 2014): the step of its counter, and the two factors and three shifts of its finaliser.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_SHIFTS = (30, 27, 31)
_BITS = 53  # as many as a float64 holds


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    # int64 shifts copy the sign: take the copies off.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shifted(x, _SHIFTS[0])) * _FACTORS[0]
    x = (x ^ _shifted(x, _SHIFTS[1])) * _FACTORS[1]
    return x ^ _shifted(x, _SHIFTS[2])


def uniform(seed_B: torch.Tensor, counter_B: torch.Tensor) -> torch.Tensor:
    """float64 [B] in [0, 1): number `counter_B` of the stream of `seed_B`, both int64 [B].

    Each seed begins at a scattered place of splitmix64's sequence, so that neighbouring seeds have nothing in common.
    """
    start_B = _mixed(seed_B + _STEP)
    bits_B = _mixed(start_B + (counter_B + 1) * _STEP)
    return _shifted(bits_B, 64 - _BITS).to(torch.float64) * 2.0**-_BITS
