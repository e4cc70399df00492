"""One rule that turns samples into a word: faster, slower or no difference.

Samples are compared as logarithms of speeds, so that a ratio and its inverse weigh the same. From six runs on a rank
test decides (Wilcoxon's where runs stand in pairs, Mann and Whitney's where they do not): one run that a neighbour
slowed down must not decide, and timings have such runs. Fewer runs can never reach 5 % by ranks (five pairs give 6 %
at best), so there a t-test decides (Student's of pairs, Welch's of two groups). tests/test_statistics.py holds the
rates of both kinds of error, on noise taken from the committed records.
"""

import math
import warnings
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastllama.lab.points import figures

FASTER, SLOWER, NO_DIFFERENCE = "faster", "slower", "no difference"
ALPHA = 0.05
Speeds = Sequence[float] | np.ndarray
_RANKS_FROM = 6


@dataclass(frozen=True)
class Verdict:
    """What samples say about a ratio of speeds, the first's over the second's.

    ratio: the median. low, high: its confidence interval at 95 %, all ratios that the test does not reject (0 and
    infinity where there are too few samples to reject any; the ratio is NaN where there is none). p: of a ratio of 1.
    runs: samples of the smaller side.
    """

    word: str
    ratio: float
    low: float
    high: float
    p: float
    runs: int

    def json(self) -> dict:
        """As JSON holds it: null for infinity and NaN."""
        finite = {name: None for name in ("ratio", "high") if not math.isfinite(getattr(self, name))}
        return {**vars(self), **finite}


def _scipy():
    """scipy.stats. ValueError, naming the command that installs it, if it is missing."""
    try:
        from scipy import stats
    except ImportError:
        raise ValueError('verdicts need scipy: pip install -e ".[compare]"') from None
    return stats


def _test(first, second=None):
    """scipy's result for [..., runs] logarithms, alone against 0 or against a second group's; over the last axis."""
    stats = _scipy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # samples that are all alike: p is 0, or NaN, seen to below
        if second is None:
            runs = first.shape[-1]
            if runs < _RANKS_FROM:
                return stats.ttest_1samp(first, 0.0, axis=-1)
            # Left to itself scipy permutes for seconds where two samples are alike.
            return stats.wilcoxon(first, axis=-1, method="exact" if runs <= 50 else "auto")
        if min(first.shape[-1], second.shape[-1]) >= _RANKS_FROM:
            return stats.mannwhitneyu(first, second, axis=-1)
        return stats.ttest_ind(first, second, axis=-1, equal_var=False)


def p_value(first, second=None) -> np.ndarray:
    """p that [..., runs] logarithms of ratios have no median but 0, or that two groups of them differ by nothing."""
    first = np.asarray(first, dtype=float)
    second = None if second is None else np.asarray(second, dtype=float)
    return np.nan_to_num(_test(first, second).pvalue, nan=1.0)  # NaN: all samples alike and no difference


def _interval(first, second) -> tuple[float, float]:
    """Every shift of the logarithms that the test does not reject."""
    if min(len(first), len(first) if second is None else len(second)) < _RANKS_FROM:
        low, high = _test(first, second).confidence_interval(1 - ALPHA)
        # All alike: no width, and with a difference of nothing scipy gives NaN.
        centre = first.mean() - (0.0 if second is None else second.mean())
        return (centre, centre) if math.isnan(low) else (float(low), float(high))
    # Ranks change only at these shifts; between two of them p is constant, and it falls off to either side.
    if second is None:
        shifts = (first[:, None] + first[None, :])[np.triu_indices(len(first))] / 2
    else:
        shifts = (first[:, None] - second[None, :]).ravel()
    shifts = np.unique(shifts)
    between = (shifts[:-1] + shifts[1:]) / 2

    def kept(index: int) -> bool:
        return bool(p_value(first - between[index], second) >= ALPHA)

    middle = len(between) // 2
    low = bisect_left(range(middle), True, key=kept)
    high = bisect_left(range(middle, len(between)), True, key=lambda index: not kept(index)) + middle
    return float(shifts[low]), float(shifts[high])


def _verdict(first, second=None) -> Verdict:
    first = np.asarray(first, dtype=float)
    second = None if second is None else np.asarray(second, dtype=float)
    runs = min(len(first), len(first) if second is None else len(second))
    if runs == 0:
        return Verdict(NO_DIFFERENCE, math.nan, 0.0, math.inf, 1.0, runs)
    ratio = math.exp(np.median(first) - (0.0 if second is None else np.median(second)))
    if runs == 1:
        return Verdict(NO_DIFFERENCE, ratio, 0.0, math.inf, 1.0, runs)
    low, high = map(math.exp, _interval(first, second))
    p = float(p_value(first, second))
    word = NO_DIFFERENCE
    if p < ALPHA and min(low, ratio) > 1:
        word = FASTER
    elif p < ALPHA and max(high, ratio) < 1:
        word = SLOWER
    return Verdict(word, ratio, low, high, p, runs)


def paired(first: Speeds, second: Speeds) -> Verdict:
    """Of speeds taken in turns: run i of the first stands beside run i of the second."""
    return _verdict(np.log(first) - np.log(second))


def unpaired(first: Speeds, second: Speeds) -> Verdict:
    """Of speeds, or ratios of speeds, that were taken one group after the other."""
    return _verdict(np.log(first), np.log(second))


def _speeds(runs: list[dict], point: dict, figure: str) -> np.ndarray:
    """One speed per run, NaN where a run has none, so that runs stay side by side."""
    sizes = point["batch_size"], point["new_tokens"]
    values = [figures.samples([run], *sizes)[figure] for run in runs]
    speeds = np.array([value[0] if value else math.nan for value in values])
    with np.errstate(divide="ignore"):  # a first token in no time has no speed, and is left out as infinite
        return 1 / speeds if figure.endswith("_ms") else speeds


def ratios_to_vanilla(point: dict, figure: str = "decode_tok_per_s") -> np.ndarray:
    """Speed over that of the vanilla timed next to it, one per run that has both.

    ValueError if the runs of the two do not stand side by side.
    """
    ours, vanilla = (_speeds(runs, point, figure) for runs in (point["runs"], point["baseline"]["runs"]))
    if len(ours) != len(vanilla):
        name = f"record {point['id']}" if "id" in point else "the point"
        raise ValueError(f"{name} holds {len(ours)} runs but {len(vanilla)} of its baseline, so they are no pairs")
    both = np.isfinite(ours) & np.isfinite(vanilla)
    return ours[both] / vanilla[both]


def compare_with_vanilla(point: dict, figure: str = "decode_tok_per_s") -> Verdict:
    """A point against the vanilla that was timed in turns with it."""
    return _verdict(np.log(ratios_to_vanilla(point, figure)))


def compare_points(point: dict, reference: dict, figure: str | None = None) -> Verdict:
    """A point (schema of lab/records/schema.py) against another of the same workload, from their raw samples.

    Where a point has a baseline, its ratio to the vanilla of its own run is what counts, since the machine drifts
    between two runs and vanilla drifts with it; vanilla's own point has the ratio 1. Two points of vanilla are
    compared by their speeds. figure: decode_tok_per_s, tok_per_s or ttft_ms (less is faster); without it
    decode_tok_per_s, or tok_per_s where nothing is decoded.
    """
    if figure is None:
        decoded = point["decode_tok_per_s"] is not None and reference["decode_tok_per_s"] is not None
        figure = "decode_tok_per_s" if decoded else "tok_per_s"
    if point["baseline"] is None and reference["baseline"] is None:
        first, second = (_speeds(one["runs"], one, figure) for one in (point, reference))
        return unpaired(first[np.isfinite(first)], second[np.isfinite(second)])
    if reference["baseline"] is None:
        return compare_with_vanilla(point, figure)
    if point["baseline"] is None:
        return _verdict(-np.log(ratios_to_vanilla(reference, figure)))
    return unpaired(ratios_to_vanilla(point, figure), ratios_to_vanilla(reference, figure))
