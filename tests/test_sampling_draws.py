"""Draws: the generator's numbers, and tokens as often as their probability says."""

import pytest
import torch
from scipy.stats import chisquare, kstest

from fastllama import Sampling, SamplingProcessor
from fastllama.kernels.sampling.draw import drawn, only
from fastllama.kernels.sampling.uniform import _STEP, _mixed, uniform
from tests import plain_sampling
from tests.plain_sampling import LlamaCpp

UNLIKELY = 1e-4
MANY = 2**16


def numbers(seed, counter):
    seed, counter = torch.broadcast_tensors(torch.as_tensor(seed), torch.as_tensor(counter))
    return uniform(seed, counter)


def assert_even(cells, count):
    assert chisquare(torch.bincount(cells, minlength=count).numpy()).pvalue > UNLIKELY


def test_the_mixer_is_splitmix64():
    # the numbers of the reference implementation for the seed 1234567
    states = torch.tensor(1234567) + torch.arange(1, 4) * _STEP
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [number % 2**64 for number in _mixed(states).tolist()] == expected


def test_numbers_are_those_of_plain_arithmetic():
    for seed in (0, 1, 987654321, 2**62):
        for counter in (0, 1, 50):
            assert float(numbers(seed, counter)) == plain_sampling.uniform(seed, counter)


@pytest.mark.parametrize("along", ["counters", "seeds", "both"])
def test_numbers_are_uniform(along):
    n = torch.arange(MANY)
    u = numbers(*{"counters": (7, n), "seeds": (n, 3), "both": (n % 256, n // 256)}[along])
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    assert kstest(u.numpy(), "uniform").pvalue > UNLIKELY
    assert_even((u * 256).long(), 256)
    assert_even((u * 2**20).long() % 64, 64)  # bits further down


@pytest.mark.parametrize("pair", ["next counter", "next seed", "both", "far seed"])
def test_neighbours_are_independent(pair):
    n = torch.arange(MANY)
    seed, counter, other_seed, other = {
        "next counter": (5, n, 5, n + 1),
        "next seed": (n, 2, n + 1, 2),
        "both": (n, 2, n + 1, 3),
        "far seed": (n, 0, n + 2**40, 0),
    }[pair]
    first, second = (numbers(seed, counter) * 16).long(), (numbers(other_seed, other) * 16).long()
    assert_even(first * 16 + second, 256)


def test_streams_of_neighbouring_seeds_do_not_overlap():
    seeds, counters = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    assert len(numbers(seeds.flatten(), counters.flatten()).unique()) == 200 * 200


# draws


def test_a_draw_is_the_first_token_beyond_the_number():
    scores = torch.tensor([[3.0, 3.0, -torch.inf, 3.0, 3.0]])
    for u, token in ((0.0, 0), (0.2499, 0), (0.25, 1), (0.4999, 1), (0.5, 3), (0.75, 4), (1 - 2**-53, 4)):
        assert int(drawn(scores, torch.tensor([u], dtype=torch.float64))) == token


@pytest.mark.parametrize("size", [1, 7, 128_000])
def test_what_is_ruled_out_is_never_drawn(size):
    scores = torch.full((3, size), -torch.inf)
    scores[0, 0] = scores[1, size // 2] = scores[2, size - 1] = -50.0
    for u in (0.0, 0.5, 1 - 2**-53):
        expected = [0, size // 2, size - 1]
        assert drawn(scores, torch.full((3,), u, dtype=torch.float64)).tolist() == expected


def test_the_last_number_takes_the_last_token_that_can_be():
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(50, 1000, generator=generator)
    scores[:, 700:] = -torch.inf
    assert (drawn(scores, torch.full((50,), 1 - 2**-53, dtype=torch.float64)) == 699).all()


def test_only():
    assert only(torch.ones(2, 3), torch.tensor([2, 0])).softmax(-1).tolist() == [[0, 0, 1], [1, 0, 0]]


LOGITS = [1.5, 0.0, 1.0, -0.5, 0.75, -2.0, 0.25]
KINDS = {
    "plain": {},
    "llama.cpp": {"sampler_order": "llama.cpp", "top_k": 6, "top_p": 0.97, "min_p": 0.1, "temperature": 1.3},
    "tail-free": {"sampler_order": "llama.cpp", "tfs_z": 0.9},
    "typical": {"sampler_order": "llama.cpp", "typical_p": 0.7, "temperature": 0.7},
    "mirostat": {"mirostat": 2, "mirostat_tau": 1.1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_drawn_as_often_as_they_should(kind):
    options = KINDS[kind]
    plain = LlamaCpp(LOGITS)
    if kind == "mirostat":
        plain.mirostat_2(2.2)
    for name in Sampling(**options).order if options.get("sampler_order") else ():
        if name in options:
            getattr(plain, name)(options[name])
    expected = torch.tensor(plain_sampling.softmax(plain.scores()), dtype=torch.float64)
    processor = SamplingProcessor(Sampling(**options, seed=11))
    rows = 20_000
    scores = processor(torch.zeros(rows, 1, dtype=torch.int64), torch.tensor([LOGITS] * rows))
    assert ((scores > -torch.inf).sum(-1) == 1).all()
    counts = torch.bincount(scores.argmax(-1), minlength=len(LOGITS))
    possible = expected > 0
    assert counts[~possible].sum() == 0 and possible.sum() >= 2
    assert chisquare(counts[possible].numpy(), (rows * expected[possible]).numpy()).pvalue > UNLIKELY


def test_draws_along_a_text_are_as_often_as_they_should():
    processor = SamplingProcessor(Sampling(seed=4))
    ids, scores = torch.zeros(8, 1, dtype=torch.int64), torch.tensor([LOGITS] * 8)
    for _ in range(1500):
        ids = torch.cat((ids, processor(ids, scores).argmax(-1, keepdim=True)), 1)
    expected = torch.tensor(plain_sampling.softmax(LOGITS), dtype=torch.float64) * 8 * 1500
    counts = torch.bincount(ids[:, 1:].flatten(), minlength=len(LOGITS))
    assert chisquare(counts.numpy(), expected.numpy()).pvalue > UNLIKELY
    pairs = torch.bincount((ids[:, 1:-1] * 7 + ids[:, 2:]).flatten(), minlength=49).reshape(7, 7)
    together = torch.outer(expected, expected) / expected.sum() ** 2 * pairs.sum()
    assert chisquare(pairs.flatten().numpy(), together.flatten().numpy()).pvalue > UNLIKELY


def test_torchs_own_draw_of_what_a_processor_leaves():
    sampling = Sampling.llama_cpp(temperature=1.0, top_k=5)
    scores = SamplingProcessor(sampling)(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([LOGITS]))
    plain = LlamaCpp(LOGITS)
    for name in ("top_k", "top_p", "min_p"):
        getattr(plain, name)(getattr(sampling, name))
    expected = torch.tensor(plain_sampling.softmax(plain.scores()), dtype=torch.float64)
    torch.manual_seed(0)
    counts = torch.bincount(torch.multinomial(scores[0].softmax(-1), 20_000, replacement=True), minlength=7)
    possible = expected > 0
    assert chisquare(counts[possible].numpy(), (20_000 * expected[possible]).numpy()).pvalue > UNLIKELY
    assert counts[~possible].sum() == 0
