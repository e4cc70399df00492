"""The rule of lab/measuring/statistics.py: how often it is wrong, what it finds, on noise of the committed records."""

import math
import sys

import numpy as np
import pytest

from fastllama.lab.measuring import compare, statistics
from fastllama.lab.measuring.statistics import FASTER, NO_DIFFERENCE, SLOWER
from fastllama.lab.points import figures
from fastllama.lab.records import record
from tests.fake_records import fake_record, point

TRIALS = 8000
RUNS_OF_A_PROCESS = 5
FASTER_BY = math.log(1.05)


def centred(logarithms) -> np.ndarray:
    """Deviations from a record's own mean, as wide as the noise that they are a small sample of."""
    logarithms = np.asarray(logarithms)
    return (logarithms - logarithms.mean()) * math.sqrt(len(logarithms) / (len(logarithms) - 1))


@pytest.fixture(scope="module")
def records():
    """Those that the default number of runs was chosen by: a later, noisier record is no fault of the rule."""
    return [one for one in record.read_all() if int(one["id"].split("-")[0]) <= 48]


@pytest.fixture(scope="module")
def of_runs(records):
    """By model: logarithms of single runs, ours' and vanilla's, each around its own record's mean."""
    pools = {}
    for one in records:
        for side in filter(None, (one, one["baseline"])):
            decode = figures.samples(side["runs"], one["batch_size"], one["new_tokens"])["decode_tok_per_s"]
            pools.setdefault(one["model"], []).append(centred(np.log(decode)))
    pools = {name: np.concatenate(parts) for name, parts in pools.items()}
    return {**pools, "all": np.concatenate(list(pools.values()))}


@pytest.fixture(scope="module")
def of_ratios(records):
    """Logarithms of the runs' ratios to the vanilla beside them, each around its own record's mean."""
    return np.concatenate([centred(np.log(statistics.ratios_to_vanilla(one))) for one in records if one["baseline"]])


def drawn(random, pool, shape) -> np.ndarray:
    """Draws with replacement, told apart by a millionth: no two timings tie, as repeated draws would."""
    return random.choice(pool, shape) + 1e-6 * random.standard_normal(shape)


def again(records) -> list[tuple[dict, dict]]:
    """Records of one commit, machine, workload and switches: two processes of the same thing."""
    pairs, first = [], {}
    for one in records:
        key = (one["commit"], figures.machine_name(one), figures.workload(one), str(sorted(one["switches"].items())))
        if key in first:
            pairs.append((first[key], one))
        first.setdefault(key, one)
    return pairs


def of_processes(records) -> np.ndarray:
    """What two processes of one commit differ by beside their runs, as often up as down."""
    apart = [math.log(later["decode_speedup"] / former["decode_speedup"]) for former, later in again(records)]
    return np.array(apart + [-value for value in apart])


def turns(random, pool, processes, pairs: int, trials: int = TRIALS) -> np.ndarray:
    """[trials, pairs] of what `compare` sees of two commits that are equally fast."""
    sides = [np.median(drawn(random, pool, (trials, pairs, RUNS_OF_A_PROCESS)), axis=-1) for _ in range(2)]
    return sides[0] - sides[1] + drawn(random, processes, (trials, pairs))


def share_found(logarithms, second=None) -> float:
    return float((statistics.p_value(logarithms, second) < statistics.ALPHA).mean())


# --- both rates


def test_commits_at_the_default_number_of_runs(records, of_runs):
    processes = of_processes(records)
    assert len(processes) >= 4
    assert {"all", "demo"} < of_runs.keys()
    for model in of_runs:
        # The exact level is 0.045: with so many trials the error of the simulation does not decide.
        noise = turns(np.random.default_rng(1), of_runs[model], processes, compare.RUNS, 4 * TRIALS)
        assert 0.01 < share_found(noise) <= 0.05, model
        noise = noise[:TRIALS]
        assert share_found(noise + FASTER_BY) >= 0.8, model
        assert share_found(noise - FASTER_BY) >= 0.8, model


def test_the_default_number_of_runs_is_not_idle(records, of_runs):
    noise = turns(np.random.default_rng(1), of_runs["demo"], of_processes(records), compare.RUNS // 2)
    assert share_found(noise + FASTER_BY) < 0.8


@pytest.mark.parametrize("runs", [3, 5, 6, 8, 20])
def test_few_runs_beside_vanilla_raise_no_more_false_alarms(of_ratios, runs):
    noise = drawn(np.random.default_rng(2), of_ratios, (TRIALS, runs))
    noise *= np.random.default_rng(3).choice([-1, 1], noise.shape)  # either of two equal sides may be the slowed one
    assert share_found(noise) <= 0.05
    assert share_found(noise + math.log(2)) >= 0.8  # and twice the speed is no riddle


@pytest.mark.parametrize("sizes", [(3, 3), (3, 5), (5, 5), (6, 6), (5, 12), (12, 12)])
def test_two_records_raise_no_more_false_alarms(of_ratios, sizes):
    first, second = (drawn(np.random.default_rng(seed), of_ratios, (TRIALS, runs)) for seed, runs in enumerate(sizes))
    assert share_found(first, second) <= 0.05
    assert share_found(first + math.log(2), second) >= 0.8


def test_the_word_is_what_the_rates_were_counted_of(records, of_runs):
    noise = turns(np.random.default_rng(4), of_runs["demo"], of_processes(records), compare.RUNS)[:60]
    for shift, expected in ((0.0, None), (FASTER_BY, FASTER), (-FASTER_BY, SLOWER)):
        for one, p in zip(noise + shift, statistics.p_value(noise + shift), strict=True):
            verdict = statistics.paired(np.exp(one), np.ones(len(one)))
            assert verdict.p == pytest.approx(float(p))
            assert (verdict.word != NO_DIFFERENCE) == (p < statistics.ALPHA)
            assert expected is None or p >= statistics.ALPHA or verdict.word == expected


def test_the_interval_holds_the_true_ratio_as_often_as_it_says(records, of_runs):
    noise = turns(np.random.default_rng(5), of_runs["all"], of_processes(records), compare.RUNS)[:200] + FASTER_BY
    verdicts = [statistics.paired(np.exp(one), np.ones(len(one))) for one in noise]
    assert np.mean([one.low <= 1.05 <= one.high for one in verdicts]) >= 0.92
    assert all(one.low <= one.ratio <= one.high for one in verdicts)
    assert np.median([one.high / one.low for one in verdicts]) < 1.12


def test_records_that_were_measured_again_do_not_differ(records):
    pairs = again(records)
    assert len(pairs) >= 2
    for former, later in pairs:
        assert statistics.compare_points(later, former).word == NO_DIFFERENCE, (former["id"], later["id"])


# --- one verdict


def test_one_slowed_run_does_not_hide_a_difference():
    quiet = np.linspace(1.049, 1.051, compare.RUNS)
    quiet[3] = 0.5
    assert statistics.paired(quiet, np.ones(len(quiet))).word == FASTER


def test_words_and_their_directions():
    fast, slow = [1.1, 1.11, 1.12, 1.1], [1.0, 1.01, 1.0, 0.99]
    for rule in (statistics.paired, statistics.unpaired):
        ahead, behind = rule(fast, slow), rule(slow, fast)
        assert (ahead.word, behind.word) == (FASTER, SLOWER)
        assert ahead.ratio == pytest.approx(1 / behind.ratio)
        assert (ahead.low, ahead.high) == pytest.approx((1 / behind.high, 1 / behind.low))
        assert ahead.low > 1 and ahead.p == pytest.approx(behind.p) and ahead.p < 0.05


@pytest.mark.parametrize("runs", [2, 5, 6, 30, 60])
@pytest.mark.parametrize("rule", [statistics.paired, statistics.unpaired])
def test_samples_that_are_all_alike(rule, runs):
    same = rule([2.0] * runs, [2.0] * runs)
    assert (same.word, same.ratio, same.p) == (NO_DIFFERENCE, 1.0, 1.0) and same.low == same.high == 1.0
    apart = rule([2.0] * runs, [1.0] * runs)
    assert (apart.word, apart.ratio) == (FASTER, 2.0) and apart.low == apart.high == pytest.approx(2.0)


def test_too_few_samples_say_nothing():
    for rule in (statistics.paired, statistics.unpaired):
        one = rule([2.0], [1.0])
        assert (one.word, one.ratio, one.low, one.high, one.p) == (NO_DIFFERENCE, 2.0, 0.0, math.inf, 1.0)
        assert one.json()["high"] is None
        none = rule([], [])
        assert (none.word, none.runs, none.json()["ratio"]) == (NO_DIFFERENCE, 0, None) and math.isnan(none.ratio)


# --- points


def test_points_are_compared_by_their_ratios_to_vanilla():
    # Twice as fast on a machine that was twice as fast: nothing changed.
    assert statistics.compare_points(point(80.0, vanilla=40.0), point(40.0, vanilla=20.0)).word == NO_DIFFERENCE
    faster = statistics.compare_points(point(44.0), point(40.0))
    assert faster.word == FASTER and faster.ratio == pytest.approx(1.1)
    assert statistics.compare_points(point(40.0), point(44.0)).word == SLOWER
    assert statistics.compare_points(point(42.0, spread=0.05), point(40.0, spread=0.05)).word == NO_DIFFERENCE


def test_vanilla_is_ratio_1_and_two_of_vanilla_go_by_speed():
    plain = point(20.0, vanilla=None)
    assert statistics.compare_points(point(40.0), plain).ratio == pytest.approx(2.0)
    assert statistics.compare_points(plain, point(40.0)).word == SLOWER
    assert statistics.compare_points(point(22.0, vanilla=None), plain).ratio == pytest.approx(1.1)
    assert statistics.compare_with_vanilla(point(40.0)).word == FASTER


def test_the_first_token_and_calls_of_one_token_are_compared_too():
    slow = point(40.0)
    for run in slow["runs"]:
        run["first_s"] *= 2
        run["total_s"] += run["first_s"] / 2
    verdict = statistics.compare_points(slow, point(40.0), "ttft_ms")
    assert verdict.word == SLOWER and verdict.ratio == pytest.approx(0.5)
    assert statistics.compare_points(slow, point(40.0)).word == NO_DIFFERENCE
    assert statistics.compare_points(point(new_tokens=1), point(new_tokens=1)).word == NO_DIFFERENCE


def test_a_run_without_decoding_leaves_its_pair_out():
    one = fake_record(speed=40.0)
    one["runs"][0]["total_s"] = one["runs"][0]["first_s"]
    assert len(statistics.ratios_to_vanilla(one)) == len(one["runs"]) - 1
    assert statistics.compare_with_vanilla(one).runs == len(one["runs"]) - 1


def test_runs_that_are_no_pairs_are_refused_by_name():
    one = fake_record()
    del one["baseline"]["runs"][0]
    with pytest.raises(ValueError, match=one["id"]):
        statistics.compare_with_vanilla(one)


def test_a_first_token_in_no_time_is_left_out():
    one = point()
    one["runs"][0]["first_s"] = 0.0
    assert len(statistics.ratios_to_vanilla(one, "ttft_ms")) == len(one["runs"]) - 1


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match=r"pip install -e \"\.\[compare\]\""):
        statistics.paired([1.0, 2.0], [1.0, 1.0])
