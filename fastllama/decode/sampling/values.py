"""Values: a call's options as tensors, one number for each row.

Legend: B rows.
"""

from dataclasses import fields

import torch

from fastllama.decode.sampling.options import COLD, Sampling

_LARGEST = 2**62
_NO_NUMBERS = ("mirostat", "sampler_order", "seed")


class Values:
    """`values.top_p` and so on, tensors [B] on a device: float64, or int64 where the option is an integer."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    tfs_z: torch.Tensor
    typical_p: torch.Tensor
    repeat_penalty: torch.Tensor
    repeat_last_n: torch.Tensor
    frequency_penalty: torch.Tensor
    presence_penalty: torch.Tensor
    mirostat_tau: torch.Tensor
    mirostat_eta: torch.Tensor
    min_keep: torch.Tensor

    def __init__(self, sampling: Sampling, rows: int, device: torch.device):
        """Raises `ValueError` where options by row are for another number of rows."""
        if sampling.rows not in (None, rows):
            raise ValueError(f"the options by row of sampling are for {sampling.rows} rows, and the call has {rows}")
        for option in fields(Sampling):
            if option.name not in _NO_NUMBERS:
                setattr(self, option.name, _column(getattr(sampling, option.name), rows, device))
        self.temperature = torch.where(self.temperature > COLD, self.temperature.to(torch.float64), 0.0)
        self.seed = None if not sampling.draws_itself else _seeds(sampling.seed, rows, device)


def _column(value, rows: int, device: torch.device) -> torch.Tensor:
    numbers = value if isinstance(value, tuple) else (value,)
    whole = all(isinstance(number, int) for number in numbers)
    bounded = [max(min(number, _LARGEST), -_LARGEST) if whole else number for number in numbers]
    return torch.tensor(bounded, dtype=torch.int64 if whole else torch.float64, device=device).expand(rows)


def _seeds(seed: int | tuple[int, ...], rows: int, device: torch.device) -> torch.Tensor:
    seeds = seed if isinstance(seed, tuple) else [seed + row for row in range(rows)]
    return torch.tensor(seeds, dtype=torch.int64, device=device)
