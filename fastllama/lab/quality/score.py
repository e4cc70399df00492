"""Score: how far a subject's next-token logits are from a reference's. Pure functions, and a record's `score`.

T positions, V vocabulary
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastllama.lab.points import fields

_MOST_SURPRISE = 690.0  # e to this is near the largest number of a record


@dataclass(frozen=True)
class Score:
    """KL divergences are of the reference from the subject, in nats; `top1_agreement` is a share of the positions."""

    perplexity: float
    reference_perplexity: float
    mean_kl: float
    p99_kl: float
    top1_agreement: float
    positions: int


class Compared(NamedTuple):
    """One figure a position, each [T]: surprise at the text's own token (nats), KL divergence, same likeliest token."""

    surprise_T: torch.Tensor
    reference_surprise_T: torch.Tensor
    kl_T: torch.Tensor
    same_T: torch.Tensor


def compare_logits(subject_TV: torch.Tensor, reference_TV: torch.Tensor, targets_T: torch.Tensor) -> Compared:
    """Both softmaxes are taken in fp32. Raises `ValueError` where the subject's logits are not finite."""
    lost = int((~subject_TV.isfinite()).any(-1).sum())
    if lost:
        raise ValueError(f"the logits are not finite at {lost} of {len(subject_TV)} positions, so there is no score")
    subject_TV, reference_TV = subject_TV.float().log_softmax(-1), reference_TV.float().log_softmax(-1)
    kl_T = (reference_TV.exp() * (reference_TV - subject_TV)).sum(-1)
    return Compared(
        F.nll_loss(subject_TV, targets_T, reduction="none").cpu(),
        F.nll_loss(reference_TV, targets_T, reduction="none").cpu(),
        kl_T.clamp_min(0.0).cpu(),  # below zero it is rounding
        (subject_TV.argmax(-1) == reference_TV.argmax(-1)).cpu(),
    )


def summarise(parts: list[Compared]) -> Score:
    """The score over all positions of the parts. The 99th percentile is interpolated, as numpy's is by default.

    Raises `ValueError` for a perplexity that no number holds.
    """
    whole = Compared(*(torch.cat(figures).double() for figures in zip(*parts, strict=True)))
    return Score(
        perplexity=_perplexity_of(whole.surprise_T),
        reference_perplexity=_perplexity_of(whole.reference_surprise_T),
        mean_kl=whole.kl_T.mean().item(),
        p99_kl=whole.kl_T.quantile(0.99).item(),
        top1_agreement=whole.same_T.mean().item(),
        positions=len(whole.kl_T),
    )


def _perplexity_of(surprise_T: torch.Tensor) -> float:
    mean = surprise_T.mean().item()
    if not mean < _MOST_SURPRISE:
        raise ValueError(f"the text's tokens surprise by {mean:.3g} nats on average, which no perplexity can express")
    return math.exp(mean)


@fields.wants("a finite number that is not below 1")
def _perplexity(value) -> bool:
    return fields.number(value) and value >= 1


@fields.wants("a number from 0 to 1")
def _share(value) -> bool:
    return fields.number(value) and value <= 1


_FIELDS = {
    "perplexity": _perplexity,
    "reference_perplexity": _perplexity,
    "mean_kl": fields.number,
    "p99_kl": fields.number,
    "top1_agreement": _share,
    "positions": fields.small_size,
}


def check(stored: dict, prefix: str) -> None:
    """`ValueError`, naming the field, if a stored score is not one."""
    fields.check(stored, _FIELDS, prefix, closed=True)


def change(stored: dict) -> str:
    """By how much the perplexity is above the reference's."""
    percent = 100 * (stored["perplexity"] / stored["reference_perplexity"] - 1)
    return f"{round(percent, 2) + 0.0:+.2f} %"  # adding zero makes -0 one


def small(value: float) -> str:
    """Two digits of a figure that may be very small."""
    return "0" if value == 0 else f"{value:.2g}" if value >= 1e-4 else f"{value:.0e}"


def of_record(point: dict) -> str | None:
    """The score of a stored point in one line, or why it has none; None where no lossy switch asks for one."""
    if point["parity"] != "lossy":
        return None
    if point["score"] is None:
        return f"not scored: {point['not_scored']}"
    same = "; here the ids are vanilla's all the same" if point["hash"] == point["reference_hash"] else ""
    return words(point["score"]) + same


def words(stored: dict) -> str:
    """A stored score in one line."""
    return (
        f"perplexity {stored['perplexity']:.4g} ({change(stored)}), mean KL {small(stored['mean_kl'])}, "
        f"99 % of {stored['positions']} positions below {small(stored['p99_kl'])}, "
        f"top-1 agreement {100 * stored['top1_agreement']:.1f} %"
    )
