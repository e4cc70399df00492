"""A draft that reads only the first token of a long prompt and the last ones."""

import copy

import pytest
import torch
from transformers import GenerationConfig

from fastllama.decode.assisted.proposer import DraftProposer
from fastllama.decode.engine import Engine
from fastllama.decode.prompt import recent, unpad
from fastllama.demo import names
from fastllama.demo.refine import DRAFT_WINDOW
from fastllama.lab.measuring import drafting
from fastllama.lab.points.workload import Prompt
from fastllama.lab.tasks import cost
from tests import drafts
from tests.drafts import assistance
from tests.tiny import GREEDY, generate, prompt

NEW = 24


@pytest.fixture(scope="module")
def models():
    return drafts.trio()


@pytest.fixture(autouse=True)
def as_before(models):
    """The shared models start each test without a reservation and with their own generation configs."""
    yield
    for model in models[1:]:
        model.free()
        model.generation_config = GenerationConfig.from_model_config(model.config)


@pytest.fixture
def read(models, monkeypatch) -> list:
    """The prompts [B, P] and lengths that the draft reads."""
    seen, plain = [], Engine.prefill

    def prefill(self, prompt, *rest):
        if self is models[2]._engine:
            seen.append((prompt.tokens.tolist(), prompt.lengths.tolist()))
        return plain(self, prompt, *rest)

    monkeypatch.setattr(Engine, "prefill", prefill)
    return seen


def test_the_first_token_and_the_last_ones():
    ids = torch.tensor([[9, 9, 1, 2, 3], [4, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    whole = unpad(ids, mask)
    assert recent(whole, None) is whole and recent(whole, 5) is whole
    short = recent(whole, 4)
    assert short.tokens[0, :3].tolist() == [1, 2, 3] and short.tokens[1].tolist() == [4, 6, 7, 8]
    assert (short.lengths.tolist(), short.longest) == ([3, 4], 4)
    assert recent(whole, 2).tokens.tolist() == [[1, 3], [4, 8]]


@pytest.mark.parametrize("compile", [None, "no", "native"])
@pytest.mark.parametrize("window", [2, 4, 5, 100])
@pytest.mark.parametrize("batch", ["one", "three", "padded"])
@pytest.mark.parametrize("more", [{}, {"p_split": 0.02, "draft_branches": 3}], ids=["draft", "tree"])
def test_greedy_text_is_the_same(models, read, more, batch, window, compile):
    vanilla, ours, draft = models
    inputs = prompt(batch)
    rows, width = inputs["input_ids"].shape
    expected = generate(vanilla, inputs, max_new_tokens=NEW, **GREEDY)
    if compile is not None:
        how = {"compile": compile, "products": "native" if compile == "native" else "stock"}
        ours.preallocate(rows, width + NEW - 1, **how)
        draft.preallocate(rows, min(width, window) + NEW - 1, **how)  # less than the text where it reads less
    asked = assistance("draft", draft) | more | {"draft_window": window}
    assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, **asked, **GREEDY), expected)
    assert ours.assisted.draft_tokens > 0
    assert f"reads at most {window} tokens of a prompt" in ours.path
    ((tokens, lengths),) = read
    real = unpad(inputs["input_ids"], inputs.get("attention_mask"))
    for row, length in enumerate(lengths):
        text = real.tokens[row, : real.lengths[row]].tolist()
        assert tokens[row][:length] == (text if len(text) <= window else [text[0], *text[1 - window :]])


def test_a_window_that_holds_the_prompt_changes_nothing(models):
    _, ours, draft = models
    inputs = prompt("padded")
    done = []
    for window in (None, 100):
        generate(ours, inputs, max_new_tokens=NEW, **assistance("draft", draft), draft_window=window, **GREEDY)
        done.append((ours.assisted.draft_tokens, ours.assisted.accepted_tokens, ours.assisted.draft_forwards))
    assert done[0] == done[1]


def test_what_it_proposes_is_what_it_would_say_after_those_tokens(models, monkeypatch):
    """The first proposal of each call, beside the draft's own greedy text after the shorter prompt."""
    _, ours, draft = models
    first, plain = [], DraftProposer.propose

    def propose(self, *args, **kwargs):
        proposal = plain(self, *args, **kwargs)
        first.append(proposal.ids.tolist())
        return proposal

    monkeypatch.setattr(DraftProposer, "propose", propose)
    inputs = prompt("one")
    ids = inputs["input_ids"]
    new = generate(ours, inputs, max_new_tokens=NEW, **assistance("draft", draft), draft_window=3, **GREEDY)
    shown = torch.cat((ids[:, :1], ids[:, -2:], new[:, ids.shape[1] : ids.shape[1] + 1]), 1)
    count = len(first[0][0])
    own = draft.generate(shown, attention_mask=torch.ones_like(shown), max_new_tokens=count, **GREEDY)
    assert first[0] == own[:, 4:].tolist()


def test_drawn_tokens_are_judged_by_what_the_draft_drew_them_from(models, monkeypatch):
    _, ours, draft = models
    proposals, plain = [], DraftProposer.propose

    def propose(self, *args, **kwargs):
        proposals.append(plain(self, *args, **kwargs))
        return proposals[-1]

    monkeypatch.setattr(DraftProposer, "propose", propose)
    ids = prompt("one")["input_ids"]
    asked = assistance("draft", draft) | {"draft_window": 4, "do_sample": True, "top_k": 0}
    new = generate(ours, prompt("one"), max_new_tokens=NEW, **asked)[:, ids.shape[1] :]
    shown = torch.cat((ids[:, :1], ids[:, -3:], new[:, :1]), 1)
    expected = draft(shown).logits[:, -1].softmax(-1)
    torch.testing.assert_close(proposals[0].probabilities[:, 0], expected, rtol=1e-4, atol=1e-6)


def test_the_draft_says_how_much_it_reads(models, read):
    _, ours, draft = models
    draft.generation_config.draft_window = 3
    generate(ours, prompt("one"), max_new_tokens=NEW, **assistance("draft", draft), **GREEDY)
    assert read[0][1] == [3]
    generate(ours, prompt("one"), max_new_tokens=NEW, **assistance("draft", draft), draft_window=0, **GREEDY)
    assert read[1][1] == [14] and "at most" not in ours.path.replace("K of at most", "")


def test_prompt_lookup_on_a_model_that_is_a_draft_elsewhere(models):
    vanilla, ours, _ = models
    expected = generate(vanilla, prompt("one"), max_new_tokens=NEW, **GREEDY)
    ours.generation_config.draft_window = 3
    found = generate(ours, prompt("one"), max_new_tokens=NEW, **assistance("lookup", None), **GREEDY)
    assert torch.equal(found, expected) and ours.assisted.mode == "lookup"
    with pytest.raises(ValueError, match="draft_window=4 needs assistant_model"):
        generate(ours, prompt("one"), max_new_tokens=2, **assistance("lookup", None), draft_window=4, **GREEDY)


@pytest.mark.parametrize("cache_k", [None, "int8"])
def test_a_draft_of_the_same_model(models, read, cache_k):
    """On the target's own keys it reads no prompt; where its cache is of another kind, what the window leaves of it."""
    vanilla, ours, _ = models
    twin = copy.deepcopy(ours)
    width = prompt("one")["input_ids"].shape[1]
    expected = generate(vanilla, prompt("one"), max_new_tokens=NEW, **GREEDY)
    length = (width if cache_k is None else 4) + NEW
    twin.preallocate(1, length, compile="no", products="stock", cache_k=cache_k)
    found = generate(ours, prompt("one"), max_new_tokens=NEW, **assistance("draft", twin), draft_window=4, **GREEDY)
    assert torch.equal(found, expected)
    assert ours.assisted.shares_cache == (cache_k is None) == ("at most 4 tokens" not in ours.path)


@pytest.mark.parametrize("batch", ["one", "padded"])
def test_the_adaptive_schedule(models, batch):
    vanilla, ours, draft = models
    expected = generate(vanilla, prompt(batch), max_new_tokens=100, **GREEDY)
    draft.generation_config.num_assistant_tokens_schedule = "adaptive"
    for _ in range(3):  # what it has learnt changes what it does
        found = generate(ours, prompt(batch), max_new_tokens=100, assistant_model=draft, draft_window=4, **GREEDY)
        assert torch.equal(found, expected)


def test_costs_and_bytes_are_of_what_the_draft_reads(models):
    _, ours, draft = models
    inputs = prompt("one")
    given = Prompt(inputs["input_ids"], inputs["attention_mask"])
    assert drafting.window(ours, draft) is None and cost._shown(given, None) is given
    draft.generation_config.draft_window = 4
    twin = copy.deepcopy(ours)
    twin.generation_config.draft_window = 4
    assert drafting.window(ours, draft) == 4 and drafting.window(ours, twin) is None
    ids = given.input_ids
    assert torch.equal(cost._shown(given, 4).input_ids, torch.cat((ids[:, :1], ids[:, -3:]), 1))


def test_the_demos_draft_reads_what_it_learned_from(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    windows = [
        getattr(GenerationConfig.from_pretrained(names.resolve(name, torch.float32)), "draft_window", None)
        for name in ("demo", "demo-draft", "inflated-draft:llama-27m")
    ]
    assert windows == [None, DRAFT_WINDOW, DRAFT_WINDOW]


@pytest.mark.parametrize("window", [1, -1, 2.0, True, "4"])
def test_a_wrong_window_is_refused(models, window):
    _, ours, draft = models
    with pytest.raises(
        ValueError, match=r"^draft_window=.* is not allowed; allowed: None, 0 for all, or an integer >= 2"
    ):
        generate(ours, prompt("one"), max_new_tokens=2, **assistance("draft", draft), draft_window=window, **GREEDY)


def test_it_needs_a_draft(models):
    _, ours, _ = models
    with pytest.raises(ValueError, match="draft_window=4 needs assistant_model"):
        generate(ours, prompt("one"), max_new_tokens=2, draft_window=4, **GREEDY)
