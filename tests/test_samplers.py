"""Each sampler: vectors worked out by hand, edges, and plain implementations of llama.cpp's and transformers' rules."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as parents

from fastllama.kernels.sampling import filters, mirostat, penalties, warpers
from fastllama.kernels.sampling.candidates import _best_by_key, _best_on_host, candidates, compacted, scattered
from tests.plain_sampling import LlamaCpp, Transformers, penalised

OUT = -math.inf
EXAMPLES = settings(max_examples=50, deadline=None)
OURS = {
    "top_k": filters.top_k,
    "top_p": filters.top_p,
    "min_p": filters.min_p,
    "tfs_z": filters.tfs,
    "typical_p": filters.typical,
}
THEIRS = {"top_k": warpers.top_k, "top_p": warpers.top_p, "min_p": warpers.min_p, "typical_p": warpers.typical}
# A grid has ties; the thresholds lie beside every sum of shares that a grid of ties gives.
scores = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=12)
shares = st.integers(0, 63).map(lambda n: n / 64 + 0.00317)


def logits_of(*probabilities):
    return [math.log(p) if p > 0 else OUT for p in probabilities]


def kept(filter, logits, value, min_keep=1, dtype=torch.float64):
    """Ids that stay, by llama.cpp's filter."""
    logits_BN, index_BN = candidates(torch.tensor([logits], dtype=dtype))
    out_BV = scattered(filter(logits_BN, value, min_keep), index_BN, len(logits))
    stay = out_BV[0] > OUT
    assert torch.equal(out_BV[0][stay], torch.tensor(logits, dtype=dtype)[stay])  # a filter changes no score
    return stay.nonzero()[:, 0].tolist()


HAND = [
    # 0.5 + 0.3 is the first sum of at least 0.7; ids are not in the order of their probability
    ("top_p", (0.05, 0.5, 0.15, 0.3), 0.7, [1, 3]),
    ("top_p", (0.25, 0.25, 0.25, 0.25), 0.5, [0, 1]),  # inclusive
    ("top_p", (0.05, 0.5, 0.15, 0.3), 0.0, [1]),
    ("top_p", (0.05, 0.5, 0.15, 0.3), 1.0, [0, 1, 2, 3]),
    ("top_p", (0.05, 0.5, 0.15, 0.3), 1e30, [0, 1, 2, 3]),
    ("top_p", (0.05, 0.5, 0.15, 0.3), -1.0, [1]),
    ("top_p", (0, 1.0, 0, 0), 0.99, [1]),
    ("top_k", (0.05, 0.5, 0.15, 0.3), 2, [1, 3]),
    ("top_k", (0.05, 0.5, 0.15, 0.3), 0, [0, 1, 2, 3]),
    ("top_k", (0.05, 0.5, 0.15, 0.3), -7, [0, 1, 2, 3]),
    ("top_k", (0.05, 0.5, 0.15, 0.3), 10**12, [0, 1, 2, 3]),
    ("top_k", (0.2, 0.2, 0.4, 0.2), 2, [0, 2]),  # of equal ones the first
    ("top_k", (0.5, 0, 0.5, 0), 3, [0, 2]),
    # a share of 0.5 * 0.29 = 0.145
    ("min_p", (0.05, 0.5, 0.15, 0.3), 0.29, [1, 2, 3]),
    ("min_p", (0.05, 0.5, 0.15, 0.3), 0.31, [1, 3]),
    ("min_p", (0.05, 0.5, 0.15, 0.3), 0.0, [0, 1, 2, 3]),
    ("min_p", (0.25, 0.25, 0.25, 0.25), 1.0, [0, 1, 2, 3]),  # equal to the best
    ("min_p", (0.05, 0.5, 0.15, 0.3), 2.0, [1]),
    # slopes 0.2, 0.15, 0.1 and 0.04 (of 0.5, 0.3, 0.15, 0.05, 0.01 up to a factor): bends 0.05, 0.05, 0.06
    # of 0.16: sums 0.3125, 0.625, 1
    ("tfs_z", (0.05, 0.5, 0.15, 0.3, 0.01), 0.5, [1]),
    ("tfs_z", (0.05, 0.5, 0.15, 0.3, 0.01), 0.61, [1]),
    ("tfs_z", (0.05, 0.5, 0.15, 0.3, 0.01), 0.64, [1, 3]),
    ("tfs_z", (0.05, 0.5, 0.15, 0.3, 0.01), 0.0, [1]),
    ("tfs_z", (0.05, 0.5, 0.15, 0.3, 0.01), 1.0, [0, 1, 2, 3, 4]),
    ("tfs_z", (0.7, 0.3), 0.0, [0, 1]),  # no bend in two
    ("tfs_z", (0.7, 0.3, 0, 0), 0.0, [0, 1]),
    # no bend at all: three shares of a third, and 2/3 > 0.5 at the second
    ("tfs_z", (0.2, 0.2, 0.2, 0.2, 0.2), 0.5, [0]),
    ("tfs_z", (0.2, 0.2, 0.2, 0.2, 0.2), 0.7, [0, 1]),
    # entropy 1.142 nats; distances: 0.05 1.854, 0.5 0.449, 0.15 0.755, 0.3 0.062: the order is 3, 1, 2, 0
    ("typical_p", (0.05, 0.5, 0.15, 0.3), 0.0, [3]),
    ("typical_p", (0.05, 0.5, 0.15, 0.3), 0.31, [1, 3]),
    ("typical_p", (0.05, 0.5, 0.15, 0.3), 0.81, [1, 2, 3]),
    ("typical_p", (0.05, 0.5, 0.15, 0.3), 1.0, [0, 1, 2, 3]),
    ("typical_p", (0, 0, 1.0, 0), 0.5, [2]),
    ("typical_p", (0.25, 0.25, 0.25, 0.25), 0.3, [0, 1]),
]


@pytest.mark.parametrize(("name", "probabilities", "value", "expected"), HAND)
def test_by_hand(name, probabilities, value, expected):
    assert kept(OURS[name], logits_of(*probabilities), value) == expected


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("min_keep", [1, 2, 3, 100])
def test_min_keep_and_the_hardest_value(name, min_keep):
    logits = logits_of(0.05, 0.5, 0.15, 0.27, 0.03, 0)
    value = {"top_k": 1, "top_p": 0.0, "min_p": 1.0, "tfs_z": 0.0, "typical_p": 0.0}[name]
    left = 5 if name == "tfs_z" and min_keep == 3 else min(min_keep, 5)  # three bends: none at the place of a fourth
    assert len(kept(OURS[name], logits, value, min_keep)) == left


@pytest.mark.parametrize("name", OURS)
def test_one_survivor_survives(name):
    for value in (0.0, 0.5, 1.0):
        assert kept(OURS[name], [OUT, OUT, -3.0, OUT], value, dtype=torch.float32) == [2]
        assert kept(OURS[name], [4.0], value) == [0]


@pytest.mark.parametrize("name", OURS)
@EXAMPLES
@given(scores, shares, st.integers(1, 4), st.sets(st.integers(0, 11)))
def test_filters_are_llama_cpps(name, logits, value, min_keep, out):
    logits = [OUT if id in out and id else logit for id, logit in enumerate(logits)]
    value = round(value * 8) if name == "top_k" else value
    plain = LlamaCpp(logits, min_keep)
    getattr(plain, name)(value)
    assert kept(OURS[name], logits, value, min_keep) == sorted(id for _, id in plain.all)


@pytest.mark.parametrize("name", THEIRS)
@EXAMPLES
@given(scores, shares, st.integers(1, 4), st.sets(st.integers(0, 11)))
def test_warpers_are_transformers(name, logits, value, min_keep, out):
    logits = [OUT if id in out and id else logit for id, logit in enumerate(logits)]
    value = round(value * 8) + 1 if name == "top_k" else value
    plain = Transformers(logits, min_keep)
    getattr(plain, name)(value)
    most = {"most_kept": min_keep} if name == "min_p" else {}
    found_BV = THEIRS[name](torch.tensor([logits], dtype=torch.float64), value, min_keep, **most)
    if name == "min_p" and min_keep > 1:  # of equal ones, which are spared is nobody's rule
        assert sorted(found_BV[0].tolist()) == sorted(plain.scores)
    else:
        assert found_BV[0].tolist() == plain.scores


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("ruled_out", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_warpers_are_the_parents_to_the_bit(ties, ruled_out, seed):
    generator = torch.Generator().manual_seed(seed)
    logits_BV = 3 * torch.randn(4, 500, generator=generator)
    logits_BV = (logits_BV * 2).round() / 2 if ties else logits_BV
    if ruled_out:
        logits_BV[torch.rand(4, 500, generator=generator) < 0.3] = OUT
    ids = torch.randint(0, 500, (4, 30), generator=generator)
    every = torch.ones_like(ids, dtype=torch.bool)
    for value in (0.01, 0.1, 0.35, 0.7, 0.9, 0.999):
        for keep in (1, 3):
            for name, parent in (("top_p", "TopP"), ("min_p", "MinP"), ("typical_p", "Typical")):
                expected = getattr(parents, f"{parent}LogitsWarper")(value, min_tokens_to_keep=keep)(None, logits_BV)
                most = {"most_kept": keep} if name == "min_p" else {}
                assert torch.equal(THEIRS[name](logits_BV, torch.full((4,), value).double(), keep, **most), expected)
            k = int(value * 600) + 1
            expected = parents.TopKLogitsWarper(k, min_tokens_to_keep=keep)(None, logits_BV)
            assert torch.equal(warpers.top_k(logits_BV, torch.full((4,), k), keep, k + 2), expected)
        warm = torch.full((4,), value, dtype=torch.float64)
        assert torch.equal(
            filters.temperature(logits_BV, warm), parents.TemperatureLogitsWarper(value)(None, logits_BV)
        )
        counts_BV = penalties.counts(ids, every, 500)
        expected = parents.RepetitionPenaltyLogitsProcessor(1 + value)(ids, logits_BV)
        assert torch.equal(penalties.repeat_penalty(logits_BV, counts_BV, 1 + warm, zero_divides=True), expected)


@EXAMPLES
@given(st.permutations(range(6)), st.sampled_from(sorted(OURS)), shares)
def test_the_order_of_ids_does_not_matter(order, name, value):
    logits = [2.0, -1.0, 0.5, 0.25, -3.0, 1.0]
    value = round(value * 6) if name == "top_k" else value
    stay = {logits[id] for id in kept(OURS[name], logits, value)}
    mixed = [logits[id] for id in order]
    assert {mixed[id] for id in kept(OURS[name], mixed, value)} == stay


@EXAMPLES
@given(st.lists(scores, min_size=2, max_size=4), st.lists(shares, min_size=4, max_size=4))
def test_rows_have_values_of_their_own(rows, values):
    width = max(map(len, rows))
    logits_BV = torch.tensor([row + [OUT] * (width - len(row)) for row in rows], dtype=torch.float64)
    value_B = torch.tensor(values[: len(rows)], dtype=torch.float64)
    logits_BN, _ = candidates(logits_BV)
    for name, filter in OURS.items():
        of_name_B = (value_B * 8).round() if name == "top_k" else value_B
        together_BN = filter(logits_BN, of_name_B)
        alone = [filter(logits_BN[row : row + 1], of_name_B[row : row + 1]) for row in range(len(rows))]
        assert torch.equal(together_BN, torch.cat(alone))


@EXAMPLES
@given(scores, st.integers(1, 12))
def test_candidates_are_the_same_however_many_are_asked_for(logits, most):
    logits_BV = torch.tensor([logits, logits[::-1]])
    few, everything = candidates(logits_BV, most), candidates(logits_BV)
    for of_few, of_all in zip(few, everything, strict=True):
        assert torch.equal(of_few, of_all[:, :most])
    if most <= len(logits):  # the two ways to find them, a CPU's and an accelerator's
        assert torch.equal(_best_by_key(logits_BV, most), _best_on_host(logits_BV, most))
    assert torch.equal(scattered(*everything, len(logits)), logits_BV)


def test_candidates_order_every_float():
    logits_BV = torch.tensor([[0.0, -0.0, OUT, 3e38, -3e38, 1e-45, -1e-45, 1.0, -1.0, 1.0]])
    for best in (_best_by_key, _best_on_host):
        assert best(logits_BV, 9).tolist() == [[3, 7, 9, 5, 0, 1, 6, 8, 4]]


def test_compacted_moves_up_what_is_left():
    logits_BN, index_BN = compacted(torch.tensor([[5.0, OUT, 3.0, OUT, 1.0]]), torch.tensor([[4, 3, 2, 1, 0]]))
    assert logits_BN.tolist() == [[5.0, 3.0, 1.0, OUT, OUT]] and index_BN[0, :3].tolist() == [4, 2, 0]


# penalties


def test_penalties_by_hand():
    logits = [2.0, -2.0, 0.0, 1.0, 4.0]
    ids, real = torch.tensor([[4, 1, 1, 2, 0, 0]]), torch.tensor([[0, 1, 1, 1, 1, 1]]) != 0
    logits_BV = torch.tensor([logits])

    def found(last_n, **values):
        counts_BV = penalties.counts(ids, penalties.window(real, last_n), 5)
        out_BV = penalties.repeat_penalty(logits_BV, counts_BV, values.get("repeat", 1.0), zero_divides=False)
        return penalties.occurrence_penalty(out_BV, counts_BV, values.get("f", 0.0), values.get("p", 0.0))[0].tolist()

    # token 4 is padding; each token once, whatever its count
    assert found(-1, repeat=2.0) == [1.0, -4.0, 0.0, 1.0, 4.0]
    assert found(2, repeat=2.0) == [1.0, -2.0, 0.0, 1.0, 4.0]
    assert found(10**9, repeat=2.0) == found(-1, repeat=2.0)
    assert found(0, repeat=2.0, f=1.0, p=1.0) == logits
    assert found(-1, f=0.5, p=0.25) == [0.75, -3.25, -0.75, 1.0, 4.0]
    assert found(1, f=0.5, p=0.25) == [1.25, -2.0, 0.0, 1.0, 4.0]
    assert found(3, repeat=0.5, f=-1.0) == [6.0, -2.0, 1.0, 1.0, 4.0]


def test_penalties_keep_what_is_ruled_out_and_numbers_too_large():
    counts_BV = torch.tensor([[3, 0, 1, 2]])
    logits_BV = torch.tensor([[OUT, OUT, 0.0, 5.0]])
    out_BV = penalties.repeat_penalty(logits_BV, counts_BV, 1e300, zero_divides=False)
    out_BV = penalties.occurrence_penalty(out_BV, counts_BV, 1e300, 0.0)
    assert not out_BV.isnan().any() and out_BV[0, :2].tolist() == [OUT, OUT]
    assert penalties.counts(torch.tensor([[7, 3]]), torch.ones(1, 2, dtype=torch.bool), 4).tolist() == [[0, 0, 0, 1]]


@EXAMPLES
@given(
    st.lists(st.integers(-16, 16).map(lambda n: n / 4), min_size=5, max_size=5),
    st.lists(st.integers(0, 4), min_size=1, max_size=9),
    st.integers(0, 3),
    st.integers(-1, 10),
    st.sampled_from([0.5, 1.0, 1.5, 4.0]),
    st.sampled_from([-0.5, 0.0, 0.75]),
    st.booleans(),
)
def test_penalties_are_the_plain_ones(logits, ids, padding, last_n, repeat, both, zero_divides):
    padded = torch.tensor([[0] * padding + ids])
    real = torch.arange(padded.shape[1])[None] >= padding
    counts_BV = penalties.counts(padded, penalties.window(real, last_n), 5)
    logits_BV = torch.tensor([logits], dtype=torch.float64)
    out_BV = penalties.repeat_penalty(logits_BV, counts_BV, repeat, zero_divides)
    out_BV = penalties.occurrence_penalty(out_BV, counts_BV, both, both / 2)
    assert out_BV[0].tolist() == penalised(logits, ids, repeat, last_n, both, both / 2, zero_divides)


# mirostat


def test_mirostat_2_by_hand():
    logits_BN = torch.tensor([logits_of(0.5, 0.25, 0.125, 0.125)], dtype=torch.float64)  # 1, 2, 3, 3 bits
    for mu, left in ((-4.0, 1), (0.5, 1), (1.5, 1), (2.5, 2), (3.5, 4), (1e9, 4), (-math.inf, 1)):
        assert (mirostat.cut_2(logits_BN, torch.tensor([mu])) > OUT).sum() == left


def test_mirostat_1_by_hand():
    # p_i = 1/i up to a factor: s = 1, where k is 2^mu / ln N
    logits_BN = torch.tensor([[-math.log(i) for i in range(1, 9)]], dtype=torch.float64)
    for mu in (-10.0, 2.0, 3.0, 4.0, 5.0, 2000.0):
        expected = max(min(int(min(2**mu, 1e9) / math.log(8)), 8), 1) if mu < 1000 else 8
        assert (mirostat.cut_1(logits_BN, torch.tensor([mu]).double(), 8) > OUT).sum() == expected
    # p_i = 1/i^2: s = 2, e = 1, k = sqrt(2^mu / (1 - 1/8))
    for mu, left in ((2.0, 2), (3.0, 3), (4.0, 4), (5.0, 6)):
        assert (mirostat.cut_1(2 * logits_BN, torch.tensor([mu]).double(), 8) > OUT).sum() == left


@pytest.mark.parametrize("logits", [[0.0] * 5, [1.0, OUT, OUT], [3.0], [1e30, 0.0, -1e30]])
@pytest.mark.parametrize("mu", [-50.0, 0.0, 1.0, 50.0])
def test_mirostat_leaves_one_at_least(logits, mu):
    logits_BN = torch.tensor([logits])
    mu_B = torch.tensor([mu], dtype=torch.float64)
    for left_BN in (mirostat.cut_1(logits_BN, mu_B, len(logits)), mirostat.cut_2(logits_BN, mu_B)):
        assert left_BN[0, 0] > OUT and not left_BN.isnan().any()


@EXAMPLES
@given(st.lists(st.integers(-40, 40).map(lambda n: n / 7), min_size=2, max_size=12), shares)
def test_mirostat_is_the_plain_one(logits, share):
    mu = 6 * share
    logits_BN, _ = candidates(torch.tensor([logits], dtype=torch.float64))
    mu_B = torch.tensor([mu], dtype=torch.float64)
    plain = LlamaCpp(logits)
    plain.mirostat_2(mu)
    assert (mirostat.cut_2(logits_BN, mu_B) > OUT).sum() == len(plain.all)
    if len(set(logits)) > 1:  # the formula divides by the slope
        plain = LlamaCpp(logits)
        plain.mirostat_1(mu)
        assert (mirostat.cut_1(logits_BN, mu_B, len(logits)) > OUT).sum() == len(plain.all)


def test_mirostat_learns_from_what_was_drawn():
    logp_BV = torch.tensor([logits_of(0.25, 0, 0.75)] * 3)
    mu_B = torch.full((3,), 10.0, dtype=torch.float64)
    found_B = mirostat.updated(mu_B, logp_BV, torch.tensor([0, 2, 1]), 5.0, torch.tensor([0.1, 0.5, 1.0]))
    # 2 bits, 0.415 bits, and a token that was no candidate
    torch.testing.assert_close(found_B, torch.tensor([10.3, 10 + 0.5 * (5 + math.log2(0.75)), 10.0]).double())
