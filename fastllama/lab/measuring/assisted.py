"""What assistance did: reports of its calls, the gain over the same model unassisted, and how a point keeps both."""

from statistics import median

from fastllama.lab.points import figures
from fastllama.lab.points.assistance import LATER, NAMES, SCHEDULES
from fastllama.lab.points.fields import (
    Kind,
    agree,
    check,
    hash8,
    name,
    number,
    object_,
    or_null,
    samples,
    small_count,
    small_size,
    word,
)

MODES = ("draft", "lookup", "tree")
VERDICTS = ("exact", "tie", "half", "drawn", "differs")
_COUNTS = ("new_tokens", "draft_tokens", "accepted_tokens", "target_forwards", "draft_forwards", "switched_off")
_SECONDS = ("prefill_s", "draft_s", "target_s")
REPORT = {"mode": word(*MODES), **dict.fromkeys(_COUNTS, small_count), **dict.fromkeys(_SECONDS, number)}
_LATER_REPORT = {"draft_prefill_s": number}  # which reports of earlier versions lack
FIGURES = (
    "speedup_end_to_end",
    "acceptance",
    "tokens_per_target_forward",
    "prefill_s",
    "draft_s",
    "target_s",
    "switched_off",
)
OPTIONS = {
    "draft": or_null(name),
    "prompt_lookup": or_null(small_size),
    "draft_tokens": or_null(small_size),
    "draft_schedule": word(*SCHEDULES),
    "draft_weights": or_null(name),
}
_LATER = {"p_split": number, "draft_branches": small_size, "draft_device": name, "draft_window": small_count}
_REPORTS = Kind(
    lambda value: isinstance(value, list) and value and all(map(object_, value)), "a list of at least one report"
)
_UNASSISTED = {
    "path": name,
    "hash": hash8,
    "tok_per_s": number,
    "decode_tok_per_s": or_null(number),
    "row_tok_per_s": or_null(number),
    "ttft_ms": number,
    "runs": samples,
}
_STORED = {
    **OPTIONS,
    "mode": word(*MODES),
    "speedup_end_to_end": number,
    "acceptance": or_null(number),
    "tokens_per_target_forward": number,
    **dict.fromkeys(_SECONDS, number),
    "switched_off": small_count,
    "parity": word(*VERDICTS),
    "first_divergence": or_null(object_),
    "reports": _REPORTS,
    "unassisted": object_,
}
assert set(NAMES) == {*OPTIONS, *_LATER} and set(LATER) == set(_LATER)


def report_of(told) -> dict:
    """What `model.assisted` tells after a call, as plain numbers."""
    return {field: getattr(told, field) for field in REPORT | _LATER_REPORT}


def gain(runs: list[dict], unassisted: list[dict]) -> float:
    """The median over paired runs of the unassisted call's seconds over the assisted one's."""
    return median(plain["total_s"] / run["total_s"] for run, plain in zip(runs, unassisted, strict=True))


def summary(reports: list[dict]) -> dict:
    """Figures of several calls: shares and counts over all of them, seconds as the median of a call."""
    total = {field: sum(report[field] for report in reports) for field in _COUNTS}
    proposed, forwards = total["draft_tokens"], total["target_forwards"]
    return {
        "acceptance": total["accepted_tokens"] / proposed if proposed else None,
        "tokens_per_target_forward": total["new_tokens"] / forwards if forwards else 0.0,
        **{field: median(report[field] for report in reports) for field in _SECONDS},
        "switched_off": total["switched_off"],
    }


def of(subject, unassisted, sizes: tuple[int, int], verdict: str, divergence: dict | None) -> dict:
    """The measured part of a point's `assisted`, of contestants that were timed in turns; sizes: rows, new tokens."""
    plain = {"path": unassisted.path, "hash": next(iter(unassisted.outputs)), "runs": unassisted.runs}
    return {
        "mode": subject.reports[0]["mode"],
        "speedup_end_to_end": gain(subject.runs, unassisted.runs),
        **summary(subject.reports),
        "parity": verdict,
        "first_divergence": divergence,
        "reports": subject.reports,
        "unassisted": {**plain, **figures.summary(unassisted.runs, *sizes)},
    }


def check_options(stored: dict, prefix: str = "assisted.") -> None:
    """ValueError, naming the field, if the object does not begin with the options of an assistance."""
    check(stored, OPTIONS | _later(stored), prefix)


def _later(stored: dict) -> dict:
    return {field: kind for field, kind in _LATER.items() if field in stored}


def check_point(point: dict, check_runs, check_divergence, tolerance: tuple[float, float]) -> None:
    """ValueError, naming the field, if a point's `assisted` is not what its own samples give."""
    stored, sizes = point["assisted"], (point["batch_size"], point["new_tokens"])
    check(stored, _STORED | _later(stored), "assisted.", closed=True)
    for index, report in enumerate(stored["reports"]):
        later = {field: kind for field, kind in _LATER_REPORT.items() if field in report}
        check(report, REPORT | later, f"assisted.reports[{index}].", closed=True)
        if report["accepted_tokens"] > report["draft_tokens"]:
            raise ValueError(f"field assisted.reports[{index}] accepts more tokens than were drafted")
    plain = stored["unassisted"]
    check(plain, _UNASSISTED, "assisted.unassisted.", closed=True)
    check_runs(plain, "assisted.unassisted.", closed=True)
    if not len(point["runs"]) == len(plain["runs"]) == len(stored["reports"]):
        raise ValueError(f"there are {len(point['runs'])} runs beside {len(plain['runs'])} unassisted ones")
    derived = {**summary(stored["reports"]), "speedup_end_to_end": gain(point["runs"], plain["runs"])}
    for field, value in derived.items():
        agree(f"assisted.{field}", stored[field], value, *tolerance)
    for field, value in figures.summary(plain["runs"], *sizes).items():
        agree(f"assisted.unassisted.{field}", plain[field], value, *tolerance)
    same, divergence = point["hash"] == plain["hash"], stored["first_divergence"]
    if same != (stored["parity"] == "exact") or same != (divergence is None):
        raise ValueError(f"assisted.parity is {stored['parity']} but hash is {point['hash']} beside {plain['hash']}")
    if divergence is not None:
        check_divergence(point, divergence, "assisted.first_divergence.")


def told(kept: dict) -> str:
    """What the assistance of a measured point did, in a sentence's words."""
    found = kept["assisted"]
    share = (
        "nothing drafted" if found["acceptance"] is None else f"{found['acceptance']:.0%} of drafted tokens accepted"
    )
    off = f", switched off {found['switched_off']} times" if found["switched_off"] else ""
    return (
        f"{found['speedup_end_to_end']:.2f} x unassisted end to end, {share}, "
        f"{found['tokens_per_target_forward']:.2f} tokens per target forward{off}"
    )
