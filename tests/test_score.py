"""Scores: pure formulas beside naive ones, windows of a text, and logits that are really our cache's."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from fastllama.kernels import native
from fastllama.lab.measuring.contestant import Contestant
from fastllama.lab.measuring.parity import top_margin
from fastllama.lab.points.workload import Prompt
from fastllama.lab.quality import quality, score, windows
from fastllama.lab.quality.windows import Window
from tests.tiny import VOCAB, pair

# pure formulas


def logits(positions: int, vocabulary: int, seed: int, width: float = 3.0) -> torch.Tensor:
    return width * torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(40,), (1,), (7, 1, 12)])
def test_scores_are_those_of_naive_formulas(sizes, dtype):
    parts, surprises, reference_surprises, divergences, same = [], [], [], [], []
    for seed, positions in enumerate(sizes):
        subject, reference = logits(positions, 11, seed).to(dtype), logits(positions, 11, 100 + seed)
        targets = torch.arange(positions) % 11
        parts.append(score.compare_logits(subject, reference, targets))
        for mine, theirs, target in zip(subject.double().numpy(), reference.double().numpy(), targets, strict=True):
            q, p = (np.exp(values) / np.exp(values).sum() for values in (mine, theirs))
            surprises.append(-math.log(q[target]))
            reference_surprises.append(-math.log(p[target]))
            divergences.append(entropy(p, q))
            same.append(p.argmax() == q.argmax())
    found = score.summarise(parts)
    assert found.perplexity == pytest.approx(math.exp(np.mean(surprises)), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(math.exp(np.mean(reference_surprises)), rel=1e-5)
    assert found.mean_kl == pytest.approx(np.mean(divergences), rel=1e-5)
    assert found.p99_kl == pytest.approx(np.percentile(divergences, 99), rel=1e-5)
    assert found.top1_agreement == pytest.approx(np.mean(same))
    assert found.positions == sum(sizes)


def test_equal_logits_cost_nothing():
    same = logits(50, 20, 3)
    found = score.summarise([score.compare_logits(same, same + 5.0, torch.zeros(50, dtype=torch.int64))])
    assert found.perplexity == pytest.approx(found.reference_perplexity) and found.top1_agreement == 1.0
    assert 0 <= found.mean_kl < 1e-6 and 0 <= found.p99_kl < 1e-6


def test_the_divergence_is_of_the_reference_from_the_subject():
    sure, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    target = torch.tensor([0])
    assert score.compare_logits(unsure, sure, target).kl_T.item() == pytest.approx(math.log(2), abs=2e-3)
    assert score.compare_logits(sure, unsure, target).kl_T.item() == pytest.approx(3.8, abs=0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_have_no_score(value):
    broken = logits(5, 4, 0)
    broken[2, 1] = broken[4, 0] = value
    with pytest.raises(ValueError, match="not finite at 2 of 5 positions"):
        score.compare_logits(broken, logits(5, 4, 1), torch.zeros(5, dtype=torch.int64))


def test_a_perplexity_beyond_numbers_is_refused():
    wrong = torch.tensor([[1e4, 0.0]])
    with pytest.raises(ValueError, match="perplexity"):
        score.summarise([score.compare_logits(wrong, torch.zeros(1, 2), torch.tensor([1]))])


def test_words():
    stored = {
        "perplexity": 41.0,
        "reference_perplexity": 40.0,
        "mean_kl": 0.01234,
        "p99_kl": 2.5e-7,
        "top1_agreement": 0.9375,
        "positions": 4096,
    }
    assert score.words(stored) == (
        "perplexity 41 (+2.50 %), mean KL 0.012, 99 % of 4096 positions below 2e-07, top-1 agreement 93.8 %"
    )
    assert score.change({"perplexity": 40.0 - 1e-9, "reference_perplexity": 40.0}) == "+0.00 %"


# windows


@settings(deadline=None)
@given(count=st.integers(0, 80), length=st.integers(2, 24), begin=st.sampled_from([[], [7]]))
def test_every_token_is_predicted_once_and_late_ones_have_half_a_window_before_them(count, length, begin):
    tokens = list(range(1000, 1000 + count))
    if count + len(begin) < 2:
        with pytest.raises(ValueError, match="none to predict"):
            windows.cut(tokens, begin, length)
        return
    made = windows.cut(tokens, begin, length)
    text = begin + tokens
    assert [token for window in made for token in window.targets.tolist()] == text[1:]
    for number, window in enumerate(made):
        ids = window.ids.tolist()
        assert len(ids) <= length + 1 and ids[: len(begin)] == begin
        inside = ids[len(begin) :]
        start = text.index(inside[0])
        assert text[start : start + len(inside)] == inside
        assert window.first == 1 or number > 0
        assert number == 0 or window.first >= length // 2


def test_a_window_of_one_token_cannot_move():
    with pytest.raises(ValueError, match="a window of 1 tokens is too short"):
        windows.cut([1, 2, 3], [], 1)


def test_the_text_is_the_start_of_what_is_there(demo_tokenizer, tmp_path):
    whole, part = windows.text(demo_tokenizer), windows.text(demo_tokenizer, 300, 64)
    assert whole.positions == whole.tokens > 100_000 and part.positions == part.tokens == 300
    first = torch.cat([window.targets for window in part.windows])
    assert torch.equal(first, torch.cat([window.targets for window in whole.windows])[:300])
    assert all(window.ids[0] == demo_tokenizer.bos_token_id for window in part.windows)
    assert part.sha256 == windows.text(demo_tokenizer, 300, 128).sha256 != whole.sha256
    file = tmp_path / "own.txt"
    file.write_text("def main():\n    return 1\n")
    own = windows.text(demo_tokenizer, file=str(file))
    assert own.name == "own.txt" and own.tokens == own.positions < 20
    for content, message in (("", "has 0 tokens"), ("a", "has 1 tokens")):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            windows.text(demo_tokenizer, file=str(file))
    for tokens in (0, 1, -5, 10**9):
        with pytest.raises(ValueError, match=f"has 102198 tokens: a score takes 2 to as many, not {tokens}"):
            windows.text(demo_tokenizer, tokens)


# logits of every position


def window(length: int, first: int, seed: int = 0) -> Window:
    generator = torch.Generator().manual_seed(seed)
    return Window(torch.randint(3, VOCAB, (length,), generator=generator), first)


EVERY = list(product(["no", "native"], [1, 2, 15, 29], [1, 5, 16]))


@pytest.mark.parametrize(("compile", "first", "step_tokens"), [*EVERY, ("static", 15, 1)])
def test_ours_are_vanillas_at_every_position(compile, first, step_tokens):
    if compile == "native" and native.load() is not None:
        pytest.skip(native.load())
    vanilla, ours = pair()
    ours.preallocate(1, 30, compile=compile)
    cut = window(30, first)
    expected = quality.logits(Contestant("vanilla", vanilla), cut)
    found = quality.logits(Contestant("ours", ours), cut, step_tokens)
    assert found.shape == expected.shape == (30 - first, VOCAB)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_ours_reads_its_cache():
    """What a cache loses is felt at every position that a step gives."""
    _, ours = pair()
    ours.preallocate(1, 30)
    cut = window(30, 4)
    right = quality.logits(Contestant("ours", ours), cut)
    prefill = ours.prefill

    def lossy_prefill(ids):
        logits = prefill(ids)
        for storage in ours._engine.cache.values:
            storage.mul_(1.5)
        return logits

    ours.prefill = lossy_prefill
    wrong = quality.logits(Contestant("ours", ours), cut)
    assert torch.equal(wrong[0], right[0]) and (wrong[1:] - right[1:]).abs().amax(-1).min() > 1e-3


def test_a_step_of_no_token_is_refused():
    _, ours = pair()
    ours.prefill(torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match="no token"):
        ours.step(torch.empty(1, 0, dtype=torch.int64))


def test_margins_are_the_models_own_and_the_earliest_divergence_is_named():
    vanilla, ours = pair()
    prompts = Prompt(torch.randint(3, VOCAB, (3, 9)), torch.ones(3, 9, dtype=torch.int64))
    prompts.attention_mask[1, :4] = 0
    expected = quality.greedy(Contestant("vanilla", vanilla), prompts, 6)
    assert expected.ids.shape == expected.margins.shape == (3, 6)
    real = torch.cat((prompts.input_ids[1, 4:], expected.ids[1, :3]))[None]
    with torch.no_grad():
        margin = top_margin(vanilla(real).logits[0, -1])
    assert expected.margins[1, 3].item() == pytest.approx(margin, abs=1e-4)
    found = quality.greedy(Contestant("ours", ours), prompts, 6)
    assert quality.first_divergence(found, expected) == (3, None)
    found.ids[0, 4] += 1
    found.ids[2, 2:] += 1
    same, divergence = quality.first_divergence(found, expected)
    assert same == 1 and (divergence.row, divergence.position) == (2, 2)
    assert divergence.margin == expected.margins[2, 2].item()


# measured points


def test_larger_models_are_scored_on_fewer_positions():
    sizes = {5e6: 4096, 1.6e8: 4096, 4e8: 2048, 1.1e9: 1024, 8e9: 1024}
    assert {size: quality.tokens_of(int(size)) for size in sizes} == sizes
