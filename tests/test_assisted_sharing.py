"""A draft that is its target in fewer bits: it goes on from the target's keys and values."""

import copy

import pytest
import torch

import fastllama
from fastllama.decode.assisted.sharing import is_same_model
from tests import small
from tests.drafts import assistance, noisy
from tests.tiny import GREEDY, SAMPLED, generate, pair, prompt

NEW = 24


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def models(request, tmp_path_factory):
    """(ours, the same in int4, another model)."""
    folder = small.write(tmp_path_factory.mktemp("small"), tie_word_embeddings=request.param)
    ours = fastllama.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return ours, small.load(folder, "int4"), noisy(copy.deepcopy(ours))


@pytest.fixture
def prefills(monkeypatch):
    """The engines that read a prompt."""
    found = []
    plain = fastllama.decode.engine.Engine.prefill

    def noted(self, *arguments):
        found.append(self)
        return plain(self, *arguments)

    monkeypatch.setattr(fastllama.decode.engine.Engine, "prefill", noted)
    return found


def test_which_models_are_the_same(models):
    ours, own, other = models
    assert is_same_model(ours, own) and is_same_model(own, ours) and not is_same_model(ours, other)
    assert not is_same_model(ours, pair(num_hidden_layers=1)[1])
    assert not is_same_model(ours, copy.deepcopy(own).to(torch.bfloat16))


@pytest.mark.parametrize("compile", [None, "no", "native"])
@pytest.mark.parametrize("batch", ["one", "three", "padded"])
@pytest.mark.parametrize("schedule", ["constant", "adaptive"])
def test_greedy_text_is_the_same_and_the_draft_reads_no_prompt(models, prefills, batch, compile, schedule):
    ours, own, _ = models
    for model in (ours, own):
        model.free()
        if compile is not None:
            model.preallocate(3, 64, compile=compile, products="auto")
    expected = generate(ours, prompt(batch), max_new_tokens=NEW, **GREEDY)
    assert len(expected[:, -NEW:].unique()) > 6
    prefills.clear()
    kind = assistance("draft", own, 4, num_assistant_tokens_schedule=schedule)
    assert torch.equal(generate(ours, prompt(batch), max_new_tokens=NEW, **GREEDY, **kind), expected)
    assert prefills == [ours._engine]
    assert ours.assisted.accepted_tokens > 0 and ours.assisted.shares_cache
    assert "assisted by a draft on the target's keys and values" in ours.path


def test_what_it_proposes_is_what_it_would_say_after_the_targets_keys(models):
    """A draft that computes what the target does proposes nothing else, which its own keys would give too; one whose
    keys are of another text would not."""
    ours, _, _ = models
    twin = copy.deepcopy(ours)
    kind = assistance("draft", twin, 5)
    for batch in ("one", "padded"):
        generate(ours, prompt(batch), max_new_tokens=NEW, **GREEDY, **kind)
        if batch == "one":
            assert ours.assisted.accepted_tokens == ours.assisted.draft_tokens
    assert ours.assisted.accepted_tokens > 0.8 * ours.assisted.draft_tokens


def test_another_model_and_another_cache_read_the_prompt(models, prefills):
    ours, own, other = models
    expected = generate(ours, prompt("one"), max_new_tokens=NEW, **GREEDY)
    for draft, switches in ((other, {}), (own, {"cache_k": "int8", "cache_v": "int8"})):
        prefills.clear()
        draft.free()
        draft.preallocate(1, 64, **switches)
        kind = assistance("draft", draft, 4)
        assert torch.equal(generate(ours, prompt("one"), max_new_tokens=NEW, **GREEDY, **kind), expected)
        assert prefills == [ours._engine, draft._engine]
        assert not ours.assisted.shares_cache and "assisted by a draft, constant" in ours.path
        draft.free()


def test_both_caches_in_few_bits(models, prefills):
    ours, own, _ = models
    for model in (ours, own):
        model.free()
        model.preallocate(3, 64, cache_k="int8", cache_v="int8")
    expected = generate(ours, prompt("padded"), max_new_tokens=NEW, **GREEDY)
    prefills.clear()
    kind = assistance("draft", own, 4)
    assert torch.equal(generate(ours, prompt("padded"), max_new_tokens=NEW, **GREEDY, **kind), expected)
    assert prefills == [ours._engine]
    for model in (ours, own):
        model.free()


def test_long_calls_trees_and_draws(models):
    """Growing caches, branches and drawn tokens run on taken-over keys too."""
    ours, own, _ = models
    for model in (ours, own):
        model.free()
    expected = generate(ours, prompt("padded"), max_new_tokens=60, **GREEDY)
    for more in ({}, {"p_split": 0.05, "draft_branches": 3}):
        kind = assistance("draft", own, 4, **more)
        assert torch.equal(generate(ours, prompt("padded"), max_new_tokens=60, **GREEDY, **kind), expected)
    drawn = generate(ours, prompt("padded"), max_new_tokens=NEW, **SAMPLED, **assistance("draft", own, 4))
    assert drawn.shape == (3, expected.shape[1] - 60 + NEW) and ours.assisted.accepted_tokens > 0
