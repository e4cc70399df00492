"""A line of the suite: a case, what is asked of it, and whether what was measured reaches that."""

import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from fastllama.kernels.linear import can_pack
from fastllama.lab.measuring.parity import HALF_DTYPES, VERDICTS, worst
from fastllama.lab.points.point import DTYPES, Point
from fastllama.lab.points.workload import Workload

NOT_COMPARED = "not compared"
_OPERATORS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Bound:
    """What is asked of one figure. Raises `ValueError` on an operator other than >= and <=."""

    figure: str
    op: str
    bound: float

    def __post_init__(self):
        if self.op not in _OPERATORS:
            raise ValueError(f"a bound is >= or <= and not {self.op!r}")

    def holds(self, value: float | None) -> bool:
        """False for a figure that was not measured."""
        return value is not None and _OPERATORS[self.op](value, self.bound)

    def __str__(self) -> str:
        return f"{self.figure} {self.op} {self.bound:g}"


@dataclass(frozen=True)
class Case:
    """One model and the sizes of what it is given. runs: timed runs, or rounds where several things take turns."""

    model: str
    dtype: str
    batch_size: int = 1
    prompt_length: int = 128
    new_tokens: int = 64
    runs: int = 5
    warmup: int = 1
    compile: str = "native"
    products: str = "auto"

    @property
    def switches(self) -> dict[str, str]:
        """How ours is reserved. Packed products only where torch packs the dtype: elsewhere the native step."""
        if self.products == "packed" and not can_pack(torch.empty(4, 4, dtype=DTYPES[self.dtype])):
            return {"compile": "native"}
        return {"compile": self.compile} | ({} if self.products == "auto" else {"products": self.products})

    def point(self, device: str, cls: type[Point] = Point, preallocate: bool = True, **changes) -> Point:
        """The case as a point of ours (or, without `preallocate`, of compiled transformers)."""
        case = replace(self, **changes)
        work = Workload(case.batch_size, case.prompt_length, case.new_tokens)
        switches = case.switches if preallocate else {"compile": case.compile}
        return cls(case.model, case.dtype, device, work, preallocate, switches, runs=case.runs, warmup=case.warmup)


@dataclass
class Measured:
    """Figures of a line, and what they were computed from.

    points: records of lab.measure. samples: what else was timed, JSON-ready. checks: (dtype, verdict) of outputs
    that were compared with vanilla's beside the points.
    """

    figures: dict[str, float | None]
    points: list[dict] = field(default_factory=list)
    samples: dict = field(default_factory=dict)
    checks: list[tuple[str, str]] = field(default_factory=list)

    @property
    def verdicts(self) -> list[tuple[str, str]]:
        """(dtype, verdict) of every point and check."""
        return [(point["dtype"], point["parity"]) for point in self.points] + self.checks

    @property
    def parity(self) -> str:
        """The worst verdict of those that compared something."""
        compared = [verdict for _, verdict in self.verdicts if verdict in VERDICTS]
        return worst(compared) if compared else NOT_COMPARED


@dataclass(frozen=True)
class Line:
    """words: a format of the case's fields. quick: the smaller case of a quick run, None if it is left out there."""

    name: str
    words: str
    asked: tuple[Bound, ...]
    measure: Callable[[Any, str], Measured]  # with a case of the class that it was made for
    case: Case
    quick: Case | None = None

    def case_of(self, quick: bool) -> Case | None:
        """The case of a quick run or of a whole one."""
        return self.quick if quick else self.case

    def what(self, case: Case) -> str:
        """The line in words."""
        return self.words.format(**asdict(case))


def _same_text(dtype: str, verdict: str) -> bool:
    if verdict in ("lossy", "drawn"):  # its text may differ: what quality it has to keep is a bound of its own
        return True
    if dtype in HALF_DTYPES:
        return verdict != "differs"
    return verdict in ("exact", "tie")


def judge(asked: tuple[Bound, ...], measured: Measured) -> tuple[bool | None, dict[str, bool]]:
    """(whether all is reached, the same per figure). None where nothing is asked.

    The whole is never reached where fp32 output is neither exact nor a tie, or was not compared.
    """
    each = {bound.figure: bound.holds(measured.figures.get(bound.figure)) for bound in asked}
    if not each:
        return None, each
    verdicts = measured.verdicts
    same = bool(verdicts) and all(_same_text(dtype, verdict) for dtype, verdict in verdicts)
    return all(each.values()) and same, each
