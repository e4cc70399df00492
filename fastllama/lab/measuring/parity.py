"""Parity: is what we generated what vanilla transformers generates? Pure functions.

B batch, N new tokens, T positions, V vocabulary
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Below this margin (logits, fp32) of the reference's best over its second token, rounding may choose either.
TIE_MARGIN = 1e-4
HALF_DTYPES = ("fp16", "bf16")
# From best to worst: a batch, or several runs, are as good as their worst.
VERDICTS = ("exact", "tie", "half", "lossy", "drawn", "differs")


@dataclass(frozen=True)
class Divergence:
    """Where ours leaves the reference for the first time, and how sure the reference was of its own token."""

    row: int
    position: int  # among the new tokens, from 0
    margin: float  # the reference's top-1 minus top-2 logit there


def output_hash(new_ids: torch.Tensor) -> str:
    """8 hex digits of sha256 over the shape and the ids [B, N], both as little-endian int64."""
    digest = hashlib.sha256()
    for values in (torch.tensor(new_ids.shape), new_ids):
        digest.update(values.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:8]


def first_differences(ours_BN: torch.Tensor, reference_BN: torch.Tensor) -> list[tuple[int, int]]:
    """(row, position) of the first different token of each row that has one, the earliest position first."""
    if ours_BN.shape != reference_BN.shape:
        raise ValueError(f"outputs of shapes {tuple(ours_BN.shape)} and {tuple(reference_BN.shape)} do not compare")
    differs_BN = ours_BN.cpu() != reference_BN.cpu()
    rows = differs_BN.any(-1).nonzero().flatten().tolist()
    firsts = [(row, int(differs_BN[row].to(torch.uint8).argmax())) for row in rows]
    return sorted(firsts, key=lambda first: (first[1], first[0]))


def compare(
    ours_BN: torch.Tensor,
    reference_BN: torch.Tensor,
    dtype: str,
    margin: Callable[[int, int], float],
    lossy: bool = False,
    drawn: bool = False,
) -> tuple[str, Divergence | None]:
    """The verdict ("exact", "tie", "half", "lossy", "drawn" or "differs") and the divergence that decides it.

    margin(row, position): the reference's top-1 minus top-2 logit before that new token. In fp32 a batch is a
    tie only if every row that differs does so at a tie; the divergence named is then the earliest, and else
    the earliest that is no tie. In half precision it is the earliest. With a lossy switch no ids are called equal,
    though they may be; their divergence is the earliest, if there is one. drawn: with assistance, which draws from the
    same distribution in another order; what differs then is "drawn".
    """
    firsts = first_differences(ours_BN, reference_BN)
    found = [Divergence(row, position, margin(row, position)) for row, position in firsts]
    if lossy:
        return "lossy", found[0] if found else None
    if not found:
        return "exact", None
    if drawn:
        return "drawn", found[0]
    if dtype in HALF_DTYPES:
        return "half", found[0]
    real = [divergence for divergence in found if not divergence.margin < TIE_MARGIN]
    return ("differs", real[0]) if real else ("tie", found[0])


def worst(verdicts: list[str]) -> str:
    """The worst of several verdicts."""
    return max(verdicts, key=VERDICTS.index)


def top_margin(logits_V: torch.Tensor) -> float:
    """Top-1 minus top-2 of one position's logits, as fp32."""
    first, second = logits_V.float().topk(2).values.tolist()
    return first - second


def teacher_forced_rms(model_TV: torch.Tensor, vanilla_TV: torch.Tensor, fp32_TV: torch.Tensor) -> float:
    """RMS distance of the model's logits to fp32, over that of vanilla's logits in the same half precision.

    All [T, V], teacher-forced on the same tokens. 1.0 where neither is off; infinity where only the model is.
    """
    fp32_TV = fp32_TV.double()
    ours, vanillas = ((logits.double() - fp32_TV).square().mean().sqrt().item() for logits in (model_TV, vanilla_TV))
    if vanillas == 0:
        return 1.0 if ours == 0 else float("inf")
    return ours / vanillas
