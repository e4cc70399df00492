"""How many tokens are proposed: by schedule, by how sure the proposer is, and never at the text's expense."""

import itertools
import math

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from fastllama.decode.assisted import proposer
from fastllama.decode.assisted.chances import Chances
from fastllama.decode.assisted.schedule import Adaptive, Constant, Heuristic, Weighing, expected_tokens
from fastllama.decode.assisted.starts import Starts
from tests import drafts
from tests.tiny import GREEDY, SAMPLED, generate, pair, prompt

NEW = 24


def round_of(schedule, tokens: int, stood: int, step_s=1.0, draft_s=0.0):
    """Records a round whose step costs `step_s` and a tenth of it for each token more."""
    schedule.record(tokens + 1, step_s * (1 + 0.1 * tokens), tokens, draft_s * tokens, [(stood, tokens)])


def test_constant_and_heuristic():
    constant, heuristic = Constant(5), Heuristic(5)
    for stood, expected in ((5, 7), (7, 9), (3, 8), (0, 7)):
        round_of(constant, 5, stood)
        round_of(heuristic, heuristic.next(), stood)
        assert (constant.next(), heuristic.next()) == (5, expected)
    low = Heuristic(1)
    round_of(low, 1, 0)
    assert low.next() == 1
    low.record(1, 1.0, 0, 0.0, [])  # nothing was proposed
    assert low.next() == 1


def test_expected_tokens():
    assert expected_tokens(1.0, 4) == 5
    assert expected_tokens(0.0, 4) == 1
    assert expected_tokens(0.5, 2) == 1.75


def drive(schedule, rounds: int, acceptance: float, draft_s: float, widest=None) -> list[int]:
    """What it proposes over some rounds in which each token stands with `acceptance`."""
    generator, proposed = torch.Generator().manual_seed(0), []
    for _ in range(rounds):
        tokens = schedule.next(widest)
        stands = torch.rand(max(tokens, 1), generator=generator) < acceptance
        stood = int(stands.long().cumprod(0).sum()) if tokens else 0
        proposed.append(tokens)
        if tokens:
            round_of(schedule, tokens, stood, draft_s=draft_s)
        else:
            schedule.record(1, 1.0, 0, 0.0, [])
    return proposed


def test_adaptive_measures_a_plain_step_first_and_grows_with_acceptance():
    high, low = Adaptive(12), Adaptive(12)
    many, few = drive(high, 60, 0.95, 0.02), drive(low, 60, 0.4, 0.02)
    assert many[0] == few[0] == 0
    assert min(many[-20:]) > max(few[-20:])
    assert high.switched_off == 0
    assert max(many) <= 12
    assert max(drive(Adaptive(12), 40, 0.95, 0.02, widest=5)) == 4


def test_adaptive_switches_off_where_it_does_not_pay_and_tries_ever_less():
    schedule = Adaptive(8)
    proposed = drive(schedule, 600, 0.05, 0.3)
    assert schedule.switched_off >= 3
    assert sum(tokens > 0 for tokens in proposed) < 40
    tries = [place for place, tokens in enumerate(proposed) if tokens]
    gaps = [after - before for before, after in itertools.pairwise(tries) if after - before > 2]
    assert gaps == sorted(gaps)
    assert gaps[0] < gaps[-1]


def test_adaptive_comes_back_when_the_text_is_easier():
    schedule = Adaptive(8)
    drive(schedule, 100, 0.0, 0.1)
    assert schedule.switched_off
    later = drive(schedule, 200, 0.95, 0.02)
    assert min(later[-50:]) >= 4


def test_one_disturbed_timing_changes_no_verdict():
    schedule = Adaptive(4)
    drive(schedule, 10, 0.9, 0.02)
    round_of(schedule, 4, 4, step_s=50.0, draft_s=5.0)
    assert schedule.next() > 0


# weighing


def test_chances_begin_with_the_guess_and_follow_what_happens():
    chances = Chances()
    assert chances.of(0.3) == pytest.approx(0.3)
    for _ in range(60):
        chances.learn([0.35, 0.95], 1)  # the first stands, the second does not
    assert chances.of(0.35) > 0.9 and chances.of(0.95) < 0.1
    assert chances.of(0.65) == pytest.approx(0.65)
    before = chances.of(0.15)
    chances.learn([0.35, 0.95, 0.15], 0)  # nobody knows what the third would have been
    assert chances.of(0.15) == before


@pytest.mark.parametrize("guess", [0.0, 0.1, 0.9999, 1.0])
def test_every_guess_has_a_chance(guess):
    chances = Chances()
    chances.learn([guess], 0)
    assert 0 <= chances.of(guess) <= guess


def known(most: int = 12, draft_s: float = 0.0, step_s=lambda width: 0.9 + 0.1 * width) -> Adaptive:
    """A schedule that knows what steps of every width cost; a plain one takes a second."""
    schedule = Adaptive(most)
    for width in [*range(1, most + 2)] * 2:
        schedule.record(width, step_s(width), 0, 0.0, [])
    if draft_s:
        schedule.record(2, step_s(2), 1, draft_s, [])
    return schedule


def proposed(schedule, guesses, rows: int = 1) -> int:
    """Tokens of a round in which the proposer is as sure as `guesses` say, of one row's tokens after the other."""
    most, count = schedule.next(weighed=True), 0
    weighing = schedule.weighing(rows)
    for guess in itertools.islice(guesses, most):
        if not weighing.worth_verifying([guess] * rows):
            break
        count += 1
        if not weighing.worth_drafting():
            break
    return count


def test_a_round_ends_where_the_proposer_becomes_unsure():
    assert proposed(known(), itertools.repeat(1.0)) == 12
    assert proposed(known(), [1.0, 0.9, 0.9, 0.01, 1.0]) == 3
    assert proposed(known(), [0.0, 1.0]) == 1  # the first was drafted anyhow
    assert proposed(known(most=3), itertools.repeat(1.0)) == 3


def test_what_costs_more_must_be_surer():
    cheap, dear = known(), known(step_s=lambda width: 0.5 * width + 0.5)
    guesses = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    assert proposed(dear, guesses) < proposed(cheap, guesses)
    assert proposed(known(draft_s=0.6), itertools.repeat(0.8)) < proposed(known(draft_s=0.01), itertools.repeat(0.8))


def test_a_step_that_looks_free_does_not_let_hopeless_tokens_in():
    free = known(step_s=lambda width: 1.0)
    assert proposed(free, [0.5] * 12) == 4


def test_rows_are_weighed_together():
    schedule = known()
    assert schedule.next(weighed=True) == 12
    weighing = schedule.weighing(2)
    assert weighing.worth_verifying([1.0, 0.5])
    assert weighing.worth_verifying([1.0, 1.0])
    assert weighing.stand == [1.0, 0.5]
    assert not weighing.worth_verifying([0.05, 0.05])
    schedule.record(3, 1.2, 0, 0.0, [(2, 2), (0, 2)])
    assert schedule.written == pytest.approx(2.0)  # tokens a row: one is the target's own
    weighing.judged([(2, 2), (0, 2)])
    assert schedule.chances.of(0.5) < 0.5 and schedule.chances.of(1.0) == 1.0


def test_one_disturbed_timing_of_a_wide_step_does_not_keep_others_narrow():
    schedule = Adaptive(12)
    for width, seconds in ((1, 1.0), (13, 50.0), (2, 1.05)):
        schedule.record(width, seconds, 0, 0.0, [])
    counts = []
    for _ in range(8):
        counts.append(proposed(schedule, itertools.repeat(0.95)))
        schedule.record(counts[-1] + 1, 1 + 0.05 * counts[-1], 0, 0.0, [(counts[-1], counts[-1])])
    assert counts[0] >= 2 and counts == sorted(counts) and counts[-1] >= 7


def test_a_round_that_caught_up_is_charged_its_drafts():
    schedule = known(draft_s=0.4)
    proposed(schedule, itertools.repeat(0.9))
    schedule.record(4, 1.3, 0, 0.0, [(3, 3)])  # its drafts' seconds say nothing of a step
    assert schedule.spent == pytest.approx(1.3 + 3 * 0.4)


def drive_weighed(schedule, rounds: int, stands: float, guess: float, draft_s: float) -> list[int]:
    generator, counts = torch.Generator().manual_seed(0), []
    for _ in range(rounds):
        most = schedule.next(weighed=True)
        count = 0
        if most:
            weighing = schedule.weighing(1)
            while count < most and weighing.worth_verifying([guess]):
                count += 1
                if not weighing.worth_drafting():
                    break
        counts.append(count)
        right = torch.rand(max(count, 1), generator=generator) < stands
        judged = [(int(right.long().cumprod(0).sum()), count)] if count else []
        if count:
            weighing.judged(judged)
        schedule.record(count + 1, 1 + 0.1 * count, count, draft_s * count, judged)
    return counts


def test_a_proposer_that_is_wrong_is_found_out_and_switched_off():
    schedule = Adaptive(8)
    counts = drive_weighed(schedule, 400, 0.02, guess=0.9, draft_s=0.3)
    assert counts[0] == 0 and max(counts) > 1  # a plain step is timed first
    assert schedule.switched_off >= 3
    assert sum(count > 0 for count in counts) < 40
    back = drive_weighed(schedule, 300, 0.98, guess=0.9, draft_s=0.02)
    assert min(back[-50:]) >= 4


def test_a_proposer_that_is_too_modest_is_found_out_too():
    schedule = Adaptive(8)
    counts = drive_weighed(schedule, 80, 0.99, guess=0.15, draft_s=0.02)
    assert max(counts[:3]) <= 2 and min(counts[-20:]) >= 5
    assert schedule.switched_off == 0


def test_one_disturbed_step_changes_no_weighed_verdict():
    schedule = Adaptive(4)
    drive_weighed(schedule, 10, 0.95, guess=0.9, draft_s=0.02)
    width = max(schedule.step_s, key=lambda each: len(schedule.step_s[each]) * (each > 1))
    assert len(schedule.step_s[width]) > 2 and schedule.next(weighed=True)
    weighing = schedule.weighing(1)
    for _ in range(width - 1):
        weighing.worth_verifying([0.9])
    schedule.record(width, 90.0, width - 1, 90.0, [(0, width - 1)])
    assert schedule.next(weighed=True) > 0


# through generate


@pytest.fixture(scope="module")
def models():
    return drafts.trio()


@pytest.fixture(scope="module")
def looping():
    return drafts.looping_pair()


def adaptive(draft, **more) -> dict:
    return drafts.assistance("draft", draft, 8, num_assistant_tokens_schedule="adaptive", **more)


@pytest.fixture
def unclocked(monkeypatch):
    """What a step takes is made up, so that nothing follows the clock."""
    record = Adaptive.record

    def timed(self, width, target_s, drafts, draft_s, accepted):
        record(self, width, 0.9 + 0.1 * width, drafts, 0.01 * drafts, accepted)

    monkeypatch.setattr(Adaptive, "record", timed)


@pytest.fixture
def rounds(unclocked, monkeypatch):
    """Every answer that a weighing gave."""
    answers, verify = [], Weighing.worth_verifying

    def noted(self, guesses):
        assert all(0 <= guess <= 1 for guess in guesses)
        answers.append(verify(self, guesses))
        return answers[-1]

    monkeypatch.setattr(Weighing, "worth_verifying", noted)
    return answers


def reserve(models, length: int, compile: str) -> None:
    for model in models:
        model.free()
        model.preallocate(3, length, compile=compile, products="native" if compile == "native" else "stock")


@pytest.mark.parametrize("compile", ["no", "native"])
@pytest.mark.parametrize("batch", ["one", "three", "padded"])
@pytest.mark.parametrize("spare", [0, 30])
def test_weighed_drafts_write_the_text_without_assistance(models, rounds, batch, compile, spare):
    vanilla, ours, draft = models
    inputs = prompt(batch)
    expected = generate(vanilla, inputs, max_new_tokens=NEW, **GREEDY)
    assert len(expected[:, -NEW:].unique()) > 6
    reserve((ours, draft), inputs["input_ids"].shape[1] + NEW + spare, compile)
    for _ in range(2):  # what was learnt is kept for the next call
        assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, **GREEDY, **adaptive(draft)), expected)
    assert ours.path.endswith("adaptive K of at most 8")
    assert True in rounds and (False in rounds or batch != "one")


@pytest.mark.parametrize("compile", ["no", "native"])
@pytest.mark.parametrize("batch", ["one", "three", "padded"])
def test_weighed_lookups_write_the_text_without_assistance(looping, rounds, batch, compile):
    vanilla, ours = looping
    expected = generate(vanilla, prompt(batch), max_new_tokens=60, **GREEDY)
    reserve((ours,), 80, compile)
    kind = {"prompt_lookup_num_tokens": 8, "num_assistant_tokens_schedule": "adaptive"}
    assert torch.equal(generate(ours, prompt(batch), max_new_tokens=60, **GREEDY, **kind), expected)
    assert ours.assisted.accepted_tokens > 0 and True in rounds and False in rounds


@pytest.mark.parametrize("place", [3, NEW // 2, NEW - 2])
def test_an_end_of_text_in_a_weighed_draft(models, rounds, place):
    vanilla, ours, draft = models
    plain = generate(vanilla, prompt("three"), max_new_tokens=NEW, **GREEDY)
    asked = {"eos_token_id": int(plain[1, place - NEW]), "pad_token_id": 0, "max_new_tokens": NEW, "do_sample": False}
    expected = generate(vanilla, prompt("three"), **asked)
    assert torch.equal(generate(ours, prompt("three"), **asked, **adaptive(draft)), expected)
    assert rounds and ours.assisted.accepted_tokens > 0


def test_a_processor_that_remembers_sees_each_position_once(models, rounds):
    class Remembers(LogitsProcessor):
        def __init__(self):
            self.lengths = []

        def __call__(self, input_ids, scores):
            self.lengths.append(input_ids.shape[1])
            return scores

    vanilla, ours, draft = models
    expected = generate(vanilla, prompt("one"), max_new_tokens=NEW, **GREEDY)
    remembers = Remembers()
    asked = {"logits_processor": LogitsProcessorList([remembers]), **GREEDY, **adaptive(draft)}
    assert torch.equal(generate(ours, prompt("one"), max_new_tokens=NEW, **asked), expected)
    assert remembers.lengths == sorted(set(remembers.lengths)) and len(remembers.lengths) == NEW and rounds


def test_a_draft_of_nothing_but_nan_changes_no_token(models, rounds):
    vanilla, ours, _ = models
    broken = pair(max_position_embeddings=256)[1]
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    expected = generate(vanilla, prompt("one"), max_new_tokens=NEW, **GREEDY)
    assert torch.equal(generate(ours, prompt("one"), max_new_tokens=NEW, **GREEDY, **adaptive(broken)), expected)
    assert rounds and ours.assisted.accepted_tokens == 0


def test_what_is_not_worth_verifying_was_not_drawn(models, unclocked, monkeypatch):
    """Else which tokens are looked at would depend on what they are, and with them what is written."""
    _, ours, draft = models
    drawn, answers = [], []
    draw = proposer.draw

    def noted(q_BV):
        drawn.append(len(answers))
        return draw(q_BV)

    def refusing(self, guesses):
        answers.append(len(self.guesses[0]) < 2)
        for known, guess in zip(self.guesses, guesses, strict=True):
            known.append(guess)
        return answers[-1]

    monkeypatch.setattr(proposer, "draw", noted)
    monkeypatch.setattr(Weighing, "worth_verifying", refusing)
    generate(ours, prompt("one"), max_new_tokens=NEW, **SAMPLED, **adaptive(draft))
    assert answers.count(False) > 1
    # One draw right after each answer that let a token in, and none after the others.
    assert drawn == [number for number, answer in enumerate(answers, 1) if answer]


def learnt(acceptance: float, draft_s: float) -> Adaptive:
    schedule = Adaptive(8)
    drive(schedule, 40, acceptance, draft_s)
    return schedule


def test_a_draft_is_not_started_where_its_prompt_costs_more_than_the_call_can_save():
    schedule = learnt(0.9, 0.05)
    for _ in range(2):
        assert schedule.worth_starting(1000, 5)  # a first prompt takes longer than others do: one says nothing
        schedule.has_started(1000, 4.0)  # plain steps take a second
    before = schedule.switched_off
    assert schedule.worth_starting(1000, 50) and schedule.worth_starting(1000, None)
    assert schedule.worth_starting(10, 3)  # a prompt of a hundredth of the length
    loses = learnt(0.05, 0.3)
    for _ in range(2):
        loses.has_started(1000, 4.0)
    assert not loses.worth_starting(1000, 500)
    assert loses.worth_starting(10, 3)  # it is less than a step: whether to pause is asked in the call
    assert not schedule.worth_starting(1000, 3)
    assert schedule.switched_off == before + 1
    assert Constant(4).worth_starting(1000, 1)


def test_what_is_not_started_is_tried_again_ever_less_often():
    starts = Starts()
    starts.took(100, 1.0)
    assert starts.worth(100, 0.5)
    starts.took(100, 1.0)
    tried = [place for place in range(60) if starts.worth(100, 0.5)]
    assert tried == [1, 4, 9, 18, 35, 52]
    assert starts.worth(100, 2.0) and not starts.worth(100, 0.5) and starts.worth(100, 0.5)


def test_what_a_prompt_costs_is_known_by_its_length():
    starts = Starts()
    assert starts.cost(50) == 0
    for seconds in (9.0, 0.4, 0.5):  # the first was disturbed
        starts.took(4, seconds)
    starts.took(1000, 10.0)
    assert starts.cost(1000) == pytest.approx(1000 * 0.125)
    starts.took(1000, 10.0)
    assert starts.cost(5) == pytest.approx(5 * 0.125)
    assert starts.cost(900) == pytest.approx(9.0) and starts.cost(4000) == pytest.approx(40.0)


@pytest.mark.parametrize("batch", ["one", "padded"])
def test_a_call_that_does_not_start_its_draft_is_the_unassisted_one(batch, monkeypatch):
    vanilla, ours, draft = drafts.trio()
    inputs = prompt(batch)
    expected = generate(vanilla, inputs, max_new_tokens=NEW, **GREEDY)
    adaptive = {"assistant_model": draft, "num_assistant_tokens_schedule": "adaptive"}
    monkeypatch.setattr(Starts, "cost", lambda self, tokens: 1e9)
    monkeypatch.setattr(proposer.DraftProposer, "start", lambda self: pytest.fail("it was started"))
    assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, **adaptive, **GREEDY), expected)
    told = ours.assisted
    assert (told.draft_tokens, told.draft_prefill_s, told.switched_off) == (0, 0.0, 1)
