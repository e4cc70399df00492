"""Cosines and sines by position, from the parent's own rotary module.

Legend: B batch, Q query tokens, S positions, D head dim.
"""

import contextlib
import copy

import torch
from torch import nn

from fastllama.kernels.rope import signed_sin

# Positions that the parent's module is asked for at a time: in fp32, and several tensors of each, inside.
_BLOCK = 4096


def is_stateful(module: nn.Module) -> bool:
    """Whether the module recomputes its frequencies from the longest position it is shown, so that each step, and each
    chunk of a prompt, must ask it anew."""
    return any(word in module.rope_type for word in ("dynamic", "longrope"))


class RotaryTable:
    """Answers with what the parent's module gives for positions, the sine signed for `rotate`."""

    def __init__(self, module: nn.Module, length: int, dtype: torch.dtype, device: torch.device):
        self.module = module
        self.sample = torch.empty(0, dtype=dtype, device=device)  # the module reads only its dtype and device
        self.stateful = is_stateful(module)
        self.cos_SD = self.sin_SD = None
        if not self.stateful:
            for start in range(0, length, _BLOCK):
                cos_1SD, sin_1SD = module(
                    self.sample, torch.arange(start, min(start + _BLOCK, length), device=device)[None]
                )
                if self.cos_SD is None:
                    self.cos_SD, self.sin_SD = (x.new_empty(length, x.shape[2]) for x in (cos_1SD, sin_1SD))
                self.cos_SD[start : start + _BLOCK] = cos_1SD[0]
                self.sin_SD[start : start + _BLOCK] = signed_sin(sin_1SD[0])

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.sample.device

    @property
    def nbytes(self) -> int:
        return 0 if self.stateful else self.cos_SD.nbytes + self.sin_SD.nbytes

    @contextlib.contextmanager
    def undisturbed(self):
        """Within it, a stateful module is asked through a copy, so that it forgets the positions of a rehearsal."""
        module = self.module
        self.module = copy.deepcopy(module) if self.stateful else module
        try:
            yield
        finally:
            self.module = module

    def at(self, index_BQ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin [B, Q, D]."""
        index_BQ = index_BQ.to(self.device)
        if self.stateful:
            cos_BQD, sin_BQD = self.module(self.sample, index_BQ)
            return cos_BQD.contiguous(), signed_sin(sin_BQD)
        return self.cos_SD[index_BQ], self.sin_SD[index_BQ]

    def for_prompt(
        self, length: int, columns_BP: torch.Tensor | None, width: int, chunk: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin [1 or B, P, D] of prompt positions 0 .. length - 1.

        `chunk`: transformers' prefill_chunk_size. It cuts the padded prompt of `width` columns, so with a stateful
        module a token's frequencies depend on the chunk that its column is in (`columns_BP`; None: nothing padded).
        """
        if not self.stateful:
            return self.cos_SD[None, :length], self.sin_SD[None, :length]
        index_1P = torch.arange(length, device=self.sample.device)[None]
        if chunk is None:
            return self.at(index_1P)
        columns_BP = index_1P if columns_BP is None else columns_BP
        cos_BPD = sin_BPD = None
        for start in range(0, width, chunk):
            # Leftovers of padding stand left of the place they were moved to; they are nobody's position.
            inside_BP = (columns_BP >= start) & (columns_BP < start + chunk) & (columns_BP >= index_1P)
            cos, sin = self.at(torch.where(inside_BP, index_1P, 0))
            if cos_BPD is None:
                cos_BPD, sin_BPD = cos, sin
            else:
                cos_BPD = torch.where(inside_BP[..., None], cos, cos_BPD)
                sin_BPD = torch.where(inside_BP[..., None], sin, sin_BPD)
        return cos_BPD, sin_BPD
