"""Sampling: what it allows, what it means, and its chain against plain implementations of both orders."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as parents

from fastllama import Sampling, SamplingProcessor
from fastllama.decode.sampling.options import SAMPLERS
from tests.plain_sampling import LlamaCpp, Transformers, penalised

EXAMPLES = settings(max_examples=50, deadline=None)
OUT = -math.inf
WARPERS = ("Temperature", "TopK", "TopP", "MinP", "Typical")
REFUSED = {
    "temperature": (math.nan, math.inf, "hot", None, True, (0.5, "x"), ()),
    "top_k": (1.5, "40", None, True),
    "top_p": (-0.1, math.nan, None, (0.5, -1)),
    "min_p": (-0.01, 1.01, math.nan),
    "tfs_z": (-0.1, None),
    "typical_p": (-0.1, math.inf),
    "repeat_penalty": (0, -1.0, math.inf, (1.1, 0.0)),
    "repeat_last_n": (-2, 1.5),
    "frequency_penalty": (math.inf, "a"),
    "presence_penalty": (-math.inf, None),
    "mirostat": (3, -1, True, (1, 2)),
    "mirostat_tau": (-1.0, math.nan),
    "mirostat_eta": (-0.1, math.inf),
    "min_keep": (0, -3, 1.5),
    "sampler_order": ("llama", ("top_k", "top_k"), ("top_q",), 7, None),
    "seed": (-1, 1.5, 2**63, (3, None), (), True),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_what_is_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}=.*is not allowed; allowed: ") as refusal:
        Sampling(**{name: value})
    assert repr(value) in str(refusal.value)


def test_every_option_is_refused_somewhere_and_says_what_it_is():
    assert set(REFUSED) == set(Sampling.__dataclass_fields__)
    for option in Sampling.__dataclass_fields__.values():
        assert option.metadata["help"] and option.metadata["allowed"]


def test_typical_0_is_llama_cpps_alone():
    with pytest.raises(ValueError, match=r"typical_p=0\.0 is not allowed.*above 0 in transformers"):
        Sampling(typical_p=0.0)
    assert Sampling(typical_p=0.0, sampler_order="llama.cpp").acts("typical_p")


def test_rows_must_agree():
    assert Sampling(top_k=[1, 2], temperature=(0.5, 1)).rows == 2 and Sampling().rows is None
    with pytest.raises(ValueError, match="the same number of rows: top_k has 2, seed has 3"):
        Sampling(top_k=[1, 2], seed=[1, 2, 3])
    with pytest.raises(ValueError, match="are for 2 rows, and the call has 3"):
        SamplingProcessor(Sampling(top_k=[1, 2]))(torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 5))


def test_llama_cpp_has_its_defaults():
    sampling = Sampling.llama_cpp(top_k=7)
    assert (sampling.top_k, sampling.top_p, sampling.min_p, sampling.temperature) == (7, 0.95, 0.05, 0.8)
    assert (sampling.repeat_last_n, sampling.order, sampling.min_keep) == (64, SAMPLERS, 1)


IGNORED = [
    ({}, []),
    ({"mirostat": 2, "top_k": 40, "min_p": 0.05}, ["top_k has no effect beside mirostat", "min_p has no effect"]),
    ({"temperature": 0, "mirostat": 1, "top_p": 0.5}, ["top_p has no effect at temperature 0", "mirostat has no"]),
    ({"sampler_order": ("top_k",), "top_p": 0.5, "temperature": 2.0}, ["top_p has", "temperature has no effect out"]),
    ({"repeat_penalty": 1.5, "repeat_last_n": 0}, ["penalties have no effect with repeat_last_n 0"]),
    ({"repeat_penalty": 1.5, "sampler_order": ("top_k",)}, ["penalties have no effect outside sampler_order"]),
]


@pytest.mark.parametrize(("options", "words"), IGNORED)
def test_what_has_no_effect_is_said(options, words):
    found = Sampling(**options).ignored
    assert len(found) == len(words) and all(map(str.startswith, found, words))


def process(sampling, logits, ids=((0,),), mask=None):
    processor = SamplingProcessor(sampling, mask)
    return processor(torch.tensor(ids), torch.tensor(logits, dtype=torch.float32))


def test_neutral_changes_nothing():
    logits = [[1.0, -2.5, OUT, 7.0]]
    for order in ("transformers", "llama.cpp", ()):
        assert process(Sampling(sampler_order=order), logits).tolist() == logits


@pytest.mark.parametrize("order", ["transformers", "llama.cpp"])
@pytest.mark.parametrize("temperature", [0, -1.0, 1e-200])
def test_cold_rows_take_the_best_after_penalties(temperature, order):
    options = {"repeat_penalty": 10.0, "sampler_order": order, "top_k": 3, "typical_p": 0.1}
    logits = [[1.0, 3.0, 2.0, 2.0]] * 2
    found = process(Sampling(temperature=temperature, **options), logits, [[1], [1]])
    assert [row.index(0.0) for row in found.tolist()] == [2, 2] and (found > OUT).sum() == 2
    mixed = process(Sampling(temperature=(temperature, 5.0), **options), logits, [[1], [1]])
    assert torch.equal(mixed[0], found[0])
    assert torch.equal(mixed[1:], process(Sampling(temperature=5.0, **options), logits[:1], [[1]]))


scores = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=3, max_size=10)
shares = st.integers(0, 63).map(lambda n: n / 64 + 0.00317)
options = st.fixed_dictionaries(
    {
        "top_k": st.integers(0, 10),
        "top_p": shares,
        "min_p": shares.map(lambda share: share / 2),
        "typical_p": shares,
        "temperature": st.sampled_from([0.5, 1.0, 2.0]),
        "repeat_penalty": st.sampled_from([1.0, 1.5, 0.75]),
        "frequency_penalty": st.sampled_from([0.0, 0.25]),
        "presence_penalty": st.sampled_from([0.0, -0.5]),
        "repeat_last_n": st.integers(-1, 4),
        "min_keep": st.integers(1, 3),
    }
)
texts = st.lists(st.integers(0, 2), min_size=1, max_size=6)
PENALTIES = ("repeat_penalty", "repeat_last_n", "frequency_penalty", "presence_penalty")


def penalties_of(chosen):
    return [chosen[name] for name in PENALTIES]


@EXAMPLES
@given(scores, options, shares, texts, st.sampled_from(["llama.cpp", *[None] * 3]), st.permutations(SAMPLERS[1:]))
def test_llama_cpps_order_and_any_other(logits, chosen, z, ids, order, names):
    names = SAMPLERS[1:] if order else names
    chosen = {**chosen, "tfs_z": z}
    sampling = Sampling(**chosen, sampler_order=order or ("penalties", *names))
    plain = LlamaCpp(penalised(logits, ids, *penalties_of(chosen)), chosen["min_keep"])
    for name in names:
        getattr(plain, name)(chosen[name])
    found = process(sampling, [logits], [ids])
    torch.testing.assert_close(found, torch.tensor([plain.scores()]), rtol=1e-5, atol=1e-5)
    assert (found > OUT).sum() >= min(chosen["min_keep"], len(logits))
    torch.testing.assert_close(found.softmax(-1).sum(), torch.tensor(1.0))


@EXAMPLES
@given(scores, options, texts, st.integers(0, 2))
def test_transformers_order(logits, chosen, ids, padding):
    sampling = Sampling(**chosen)
    plain = Transformers(penalised(logits, ids, *penalties_of(chosen), zero_divides=True), chosen["min_keep"])
    for name in ("temperature", "top_k", "top_p", "min_p", "typical_p"):
        getattr(plain, name)(chosen[name])
    mask = torch.tensor([[0] * padding + [1] * len(ids)])
    found = process(sampling, [logits], [[2] * padding + ids], mask)
    finite = torch.isfinite(found[0])
    if chosen["min_keep"] == 1:  # of equal ones, which are spared is nobody's rule
        torch.testing.assert_close(found, torch.tensor([plain.scores]), rtol=1e-5, atol=1e-5)
    assert int(finite.sum()) == sum(score > OUT for score in plain.scores)
    torch.testing.assert_close(found.softmax(-1).sum(), torch.tensor(1.0))


def test_tail_free_in_transformers_order_is_between_top_k_and_top_p():
    logits = [[3.0, 2.5, 1.0, 0.5, -1.0, -2.0]]
    plain = LlamaCpp(logits[0])
    plain.temperature(1.5)
    plain.top_k(5)
    plain.tfs_z(0.6)
    plain.top_p(0.95)
    found = process(Sampling(temperature=1.5, top_k=5, tfs_z=0.6, top_p=0.95), logits)
    torch.testing.assert_close(found, torch.tensor([plain.scores()]))


PLAIN = {"typical_p": 1.0, "repeat_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "repeat_last_n": 0}
# After top-k the row alone has fewer candidates than beside the other; min-p spares two, one of them among equals, and
# transformers' call for it, topk, takes another one of those from fewer.
SPARED = {"top_k": 1, "top_p": 0.737545, "min_p": 0.11096, "temperature": 2.0, "min_keep": 2} | PLAIN
NEIGHBOUR = {"top_k": 0, "top_p": 0.00317, "min_p": 0.001585, "temperature": 0.5, "min_keep": 1} | PLAIN


@EXAMPLES
@given(st.lists(scores, min_size=2, max_size=3), st.lists(options, min_size=3, max_size=3), st.booleans())
@example([[0.0] * 5 + [4.5], [0.0] * 7], [SPARED, NEIGHBOUR], True)
def test_a_row_has_what_it_has_alone(rows, chosen, of_transformers):
    width = max(map(len, rows))
    logits = [row + [OUT] * (width - len(row)) for row in rows]
    order = {"sampler_order": "transformers" if of_transformers else "llama.cpp"}
    chosen = chosen[: len(rows)]
    by_row = {name: tuple(each[name] for each in chosen) for name in chosen[0]}
    ids = [[row, 1] for row in range(len(rows))]
    together = process(Sampling(**by_row, **order), logits, ids)
    for row, each in enumerate(chosen):
        found, alone = together[row : row + 1], process(Sampling(**each, **order), logits[row : row + 1], [ids[row]])
        if of_transformers and each["min_keep"] > 1:  # of equal ones, which are spared is nobody's rule
            found, alone = (scores.sort().values for scores in (found, alone))
        assert torch.equal(found, alone)


KINDS = {
    "transformers": {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9, "tfs_z": 0.9},
    "llama.cpp": {"sampler_order": "llama.cpp", "top_k": 9, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9, "tfs_z": 0.9},
    "any": {"sampler_order": ("typical_p", "top_k", "temperature"), "typical_p": 0.5, "temperature": (0.5, 0.0)},
    "mirostat 1": {"mirostat": 1, "seed": 1},
    "mirostat 2": {"mirostat": 2, "seed": (1, 7)},
    "penalties": {"repeat_penalty": (1.5, 1.0), "repeat_last_n": 4, "frequency_penalty": 0.5, "seed": 1},
    "cold": {"temperature": 0.0, "repeat_penalty": 1.5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_asks_an_accelerator(kind):
    """Tensors without data, on a device that is no CPU: who asks one for a value raises."""
    ids = torch.zeros(2, 6, dtype=torch.int64, device="meta")
    processor = SamplingProcessor(Sampling(**KINDS[kind]), torch.ones(2, 6, dtype=torch.int64, device="meta"))
    for _ in range(3):
        scores = processor(ids, torch.zeros(2, 50, device="meta"))
        ids = torch.cat((ids, scores.argmax(-1, keepdim=True)), 1)
    for ask in (torch.Tensor.item, bool, torch.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            ask(scores.max())


def test_what_is_left_by_top_k_is_filtered_as_everything_is():
    """A CPU narrows before the other filters; the result is the parent's, over the whole vocabulary, ties included."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(6, 3000, generator=generator) * 4).round() / 4
    ids = torch.zeros(6, 1, dtype=torch.int64)
    options = {"temperature": 0.8, "top_k": 40, "top_p": 0.9137, "min_p": 0.0213, "typical_p": 0.8341}
    expected = logits
    for warper, name in zip(WARPERS, options, strict=True):
        expected = getattr(parents, f"{warper}LogitsWarper")(options[name])(ids, expected)
    assert torch.equal(SamplingProcessor(Sampling(**options))(ids, logits), expected)
    assert (expected > OUT).sum(-1).unique().numel() > 1


def test_padding_is_not_penalised():
    mask = torch.tensor([[0, 0, 1], [0, 1, 1]])
    processor = SamplingProcessor(Sampling(repeat_penalty=2.0, frequency_penalty=0.5), mask)
    ids, scores = torch.tensor([[1, 1, 0], [1, 2, 0]]), torch.full((2, 3), 2.0)
    assert processor(ids, scores).tolist() == [[0.5, 2.0, 2.0], [0.5, 2.0, 0.5]]
    ids = torch.cat((ids, torch.tensor([[1], [2]])), 1)
    assert processor(ids, scores).tolist() == [[0.5, 0.5, 2.0], [0.5, 2.0, 0.0]]
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 3\] and the prompt is \[2, 9\]"):
        processor(torch.zeros(2, 9, dtype=torch.int64), scores)
