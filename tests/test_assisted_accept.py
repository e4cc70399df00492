"""The rules of acceptance on numbers worked by hand, and the distribution of what assisted sampling writes.

Legend: B rows, K proposed tokens, V vocabulary.
"""

import itertools
import math

import pytest
import torch
from transformers import GenerationConfig

from fastllama.decode.assisted import verify
from fastllama.decode.assisted.accept import draw, matching, residual, speculative
from fastllama.decode.assisted.lookup import NGrams
from fastllama.decode.assisted.schedule import Adaptive
from tests.tiny import pair

# acceptance


def test_matching_counts_up_to_the_first_difference():
    draft = torch.tensor([[1, 2, 3], [1, 2, 3], [9, 2, 3], [1, 9, 3]])
    chosen = torch.tensor([[1, 2, 3, 4], [1, 2, 4, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    assert matching(draft, chosen).tolist() == [3, 2, 0, 1]


def test_the_residual_is_what_the_draft_gives_too_little():
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.7, 0.1]])
    torch.testing.assert_close(residual(p, q), torch.tensor([[0.3, 0.0, 0.1]]))
    torch.testing.assert_close(residual(p, p), p)  # nothing left of it: p itself


def rounds(p, q, draft, uniform):
    """`speculative` for one row of two proposals, from lists."""
    return speculative(torch.tensor([p]), torch.tensor([q]), torch.tensor([draft]), torch.tensor([uniform]))


# Each has one token that the last draw can be.
CASES = {
    # p / q is 0.5 / 0.8: 0.6 stands, 0.63 does not, and then only token 1 has p > q.
    "just accepted": ([0.60, 0.0], 2, 2),
    "just rejected": ([0.63, 0.0], 0, 1),
    "second rejected": ([0.0, 0.9], 1, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_speculative_by_hand(case):
    uniform, stood, following = CASES[case]
    p = [[0.5, 0.5, 0.0], [0.75, 0.25, 0.0], [0.0, 0.0, 1.0]]
    q = [[0.8, 0.2, 0.0], [0.5, 0.5, 0.0]]
    for _ in range(20):
        counts, following_B = rounds(p, q, [0, 1], uniform)
        assert counts.tolist() == [stood]
        assert following_B.tolist() == [following]


def test_a_token_that_the_target_never_writes_never_stands():
    counts, following = rounds([[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0]], [0], [0.0])
    assert (counts.tolist(), following.tolist()) == ([0], [1])


def test_draw_follows_its_weights_and_never_takes_weight_0():
    torch.manual_seed(0)
    weights = torch.tensor([1.0, 0.0, 3.0])
    counts = torch.bincount(draw(weights.expand(40_000, 3)), minlength=3)
    assert counts[1] == 0
    assert abs(counts[0] / 40_000 - 0.25) < 0.01


# the distribution, through generate: 8 tokens, 50,000 texts, the first three tokens of each

SIZE = 8
TEXTS, ROWS = 50_000, 5_000  # in so many calls, of so many rows
HOT = {"temperature": 1.5, "top_k": 0}
WARM = {"temperature": 0.7, "top_k": 0, "top_p": 0.9}
NARROW = {"temperature": 1.0, "top_k": 0, "top_p": 0.6}


@pytest.fixture(scope="module")
def small():
    """(vanilla, ours, draft): the draft is the target with noise, near enough that both verdicts are common."""
    shape = {"vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "initializer_range": 0.5, "max_position_embeddings": 64}
    vanilla, ours = pair(**shape)
    _, draft = pair(**shape)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    for model in (ours, draft):
        model.preallocate(ROWS, 16, products="stock")
    return vanilla, ours, draft


PROMPT = torch.tensor([[3, 5, 6, 3, 5]])


def exact(vanilla, options: dict) -> torch.Tensor:
    """The probability of each of 8^3 continuations, by transformers' own processors."""
    config = GenerationConfig(do_sample=True, **options)
    config._eos_token_tensor = None
    warp = vanilla._get_logits_processor(config, input_ids_seq_length=PROMPT.shape[1])
    continuations = torch.tensor(list(itertools.product(range(SIZE), repeat=3)))
    ids = torch.cat((PROMPT.expand(len(continuations), -1), continuations), 1)
    with torch.no_grad():
        logits = vanilla(ids).logits[:, PROMPT.shape[1] - 1 : -1].float()
    p = warp(None, logits.flatten(0, 1)).softmax(-1).view(len(ids), 3, SIZE)
    return p.gather(2, continuations[..., None])[..., 0].double().prod(1)


def improbability(ours, expected: torch.Tensor, options: dict, texts: int = TEXTS, **assistance) -> float:
    """How unlikely it is (chi-square) that what assisted sampling wrote is so far from `expected`."""
    torch.manual_seed(1)
    counts = torch.zeros(SIZE**3, dtype=torch.float64)
    inputs = {"input_ids": PROMPT.expand(ROWS, -1), "attention_mask": torch.ones(ROWS, PROMPT.shape[1])}
    for _ in range(texts // ROWS):
        ids = ours.generate(**inputs, do_sample=True, max_new_tokens=4, min_new_tokens=None, **options, **assistance)
        first = ids[:, PROMPT.shape[1] : PROMPT.shape[1] + 3]
        counts += torch.bincount(first @ torch.tensor([SIZE**2, SIZE, 1]), minlength=SIZE**3)
    assert ours.assisted.accepted_tokens > 0
    wanted = expected * texts
    often = wanted >= 5
    assert counts[wanted == 0].sum() == 0
    rest = (counts[~often].sum(), wanted[~often].sum())
    terms = ((counts - wanted) ** 2 / wanted.clamp_min(1e-9))[often].sum()
    degrees = int(often.sum()) - 1
    if rest[1] >= 5:
        terms, degrees = terms + (rest[0] - rest[1]) ** 2 / rest[1], degrees + 1
    return upper_tail(float(terms), degrees)


def upper_tail(chi_square: float, degrees: int) -> float:
    """P(X >= chi_square), by Wilson and Hilferty's normal approximation."""
    spread = 2 / (9 * degrees)
    z = ((chi_square / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2))


def drafted(draft, tokens: int = 3) -> dict:
    return {"assistant_model": draft, "num_assistant_tokens": tokens, "assistant_confidence_threshold": 0.0}


@pytest.mark.parametrize("options", [HOT, WARM, NARROW], ids=["hot", "warm", "narrow"])
def test_what_a_draft_assists_is_distributed_as_without(small, options):
    vanilla, ours, draft = small
    assert improbability(ours, exact(vanilla, options), options, **drafted(draft)) > 1e-3


def test_drafting_that_stops_at_doubt_changes_no_distribution(small):
    vanilla, ours, draft = small
    assistance = drafted(draft) | {"assistant_confidence_threshold": 0.5}
    assert improbability(ours, exact(vanilla, WARM), WARM, **assistance) > 1e-3


@pytest.mark.parametrize(("kind", "token_s"), [("draft", 0.2), ("lookup", 0.01)])
def test_weighing_each_token_changes_no_distribution(small, monkeypatch, kind, token_s):
    vanilla, ours, draft = small
    record, widths = Adaptive.record, set()

    def timed(self, width, target_s, drafts, draft_s, accepted):
        widths.add(width)
        record(self, width, 1 + token_s * width, drafts, 0.01 * drafts, accepted)

    monkeypatch.setattr(Adaptive, "record", timed)
    asked = drafted(draft) if kind == "draft" else {"prompt_lookup_num_tokens": 3}
    asked["num_assistant_tokens_schedule"] = "adaptive"
    assert improbability(ours, exact(vanilla, HOT), HOT, **asked) > 1e-3
    assert len(widths) > 1


def test_what_prompt_lookup_assists_is_distributed_as_without(small):
    vanilla, ours, _ = small
    assert improbability(ours, exact(vanilla, HOT), HOT, prompt_lookup_num_tokens=3) > 1e-3


def _always(p, q, draft, uniform):
    return speculative(p, q, draft, torch.zeros_like(uniform))


def _no_residual(p, q, draft, uniform):
    counts, _ = speculative(p, q, draft, uniform)
    return counts, draw(p[torch.arange(len(p)), counts])


def _ratio_upside_down(p, q, draft, uniform):
    counts, _ = speculative(torch.cat((q, p[:, -1:]), 1), p[:, :-1], draft, uniform)
    return counts, draw(p[torch.arange(len(p)), counts])


@pytest.mark.parametrize("broken", [_always, _no_residual, _ratio_upside_down])
def test_a_broken_rule_is_found(small, monkeypatch, broken):
    vanilla, ours, draft = small
    monkeypatch.setattr(verify, "speculative", broken)
    assert improbability(ours, exact(vanilla, HOT), HOT, texts=20_000, **drafted(draft)) < 1e-6


# lookup


def test_lookup_prefers_the_longest_then_the_best_agreeing_then_the_newest():
    assert NGrams([1, 2, 3, 4, 1, 2], 2).propose(2)[0] == [3, 4]
    assert NGrams([7, 2, 5, 1, 2, 6, 8, 1, 2], 2).propose(1)[0] == [6]
    assert NGrams([9, 1, 2, 5, 8, 1, 2, 6, 9, 1, 2], 2).propose(1)[0] == [5]
    assert NGrams([1, 2, 5, 1, 2, 6, 1, 2], 2).propose(1)[0] == [6]
    assert NGrams([1, 2, 3], 2).propose(4)[0] == []
    assert NGrams([4], 2).propose(4) == ([], 0)
    assert NGrams([1, 2, 3, 4, 1, 2], 2).propose(2)[1] == 2
    assert NGrams([9, 8, 1, 2, 3, 4, 9, 8, 1, 2], 1).propose(2) == ([3, 4], 4)


def test_lookup_goes_on_with_what_repeats():
    assert NGrams([5, 1, 2, 1, 2], 3).propose(5)[0] == [1, 2, 1, 2, 1]


def test_lookup_learns_what_is_written():
    text = NGrams([1, 2, 3], 2)
    text.extend([9, 1, 2])
    assert text.propose(2)[0] == [3, 9]
