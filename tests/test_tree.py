"""Drafts whose branches split, verified as a tree, beside the same model without assistance."""

import copy

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

import fastllama
from fastllama.decode.assisted import verify
from fastllama.decode.assisted.accept import draw, stands, without
from fastllama.decode.assisted.tree import Tree, drafted, verified, walked
from fastllama.decode.cache_name import CACHE_NAME
from fastllama.demo.names import demo_folder
from fastllama.model.tree import Branching
from tests import small
from tests.drafts import noisy
from tests.test_assisted_accept import HOT, NARROW, WARM, exact, improbability
from tests.test_assisted_accept import drafted as chain
from tests.test_assisted_accept import small as sampled  # noqa: F401  a fixture
from tests.test_assisted_generate import After, Recorder, Remembering, reserve
from tests.tiny import GREEDY, SAMPLED, generate, pair, prompt

NEW = 30


@pytest.fixture(scope="module")
def models():
    """(vanilla, ours, draft): the draft's second and third choices are often the target's first."""
    vanilla, ours = pair(max_position_embeddings=256)
    return vanilla, ours, noisy(pair(max_position_embeddings=256)[1], 0.05)


@pytest.fixture(autouse=True)
def as_before(request):
    yield
    if "models" in request.fixturenames:
        for model in request.getfixturevalue("models")[1:]:
            model.free()
            model.generation_config = type(model.generation_config).from_model_config(model.config)


def splitting(draft, tokens: int = 4, branches: int = 4, p_split: float = 0.02, **more) -> dict:
    """Arguments of generate. The random models are sure of little, so a branch splits above a small probability."""
    usual = {"assistant_confidence_threshold": 0.0, "num_assistant_tokens_schedule": "constant"}
    usual |= {"assistant_model": draft, "num_assistant_tokens": tokens}
    return usual | {"p_split": p_split, "draft_branches": branches, **more}


# a tree


def a_tree() -> Tree:
    """5 -> 6 -> 7 and 5 -> 8, and from the root 9 -> 10."""
    tree = Tree()
    five, nine = tree.add(0, 5), tree.add(0, 9)
    six, _, _ = tree.add(five, 6), tree.add(five, 8), tree.add(nine, 10)
    tree.add(six, 7)
    return tree


def test_a_tree_lies_branch_by_branch():
    tree = a_tree().branch_by_branch()
    assert tree.tokens[1:] == [5, 6, 7, 8, 9, 10]
    assert tree.parents == [-1, 0, 1, 2, 1, 0, 5]
    assert tree.depths == [0, 1, 2, 3, 2, 1, 2]
    assert (len(tree), tree.depth, tree.path(4)) == (6, 3, [1, 4])


def test_walking_goes_where_the_target_points():
    tree = a_tree().branch_by_branch()
    said = {0: 5, 1: 8, 4: 3, 2: 7, 3: 1, 5: 10, 6: 2}
    assert walked(tree, said.__getitem__) == ([5, 8, 3], [1, 4])
    assert walked(tree, (said | {0: 9}).__getitem__) == ([9, 10, 2], [5, 6])
    assert walked(tree, (said | {0: 4}).__getitem__) == ([4], [])
    assert walked(tree, said.__getitem__, lambda: True) == ([5], [])


def test_each_node_sees_its_own_branch():
    ids, (depth, seen) = verified([a_tree().branch_by_branch(), Tree()], [1, 2], torch.device("cpu"))
    assert ids.tolist() == [[1, 5, 6, 7, 8, 9, 10], [2, 0, 0, 0, 0, 0, 0]]
    assert depth[0].tolist() == [0, 1, 2, 3, 2, 1, 2]
    assert [row.nonzero()[:, 0].tolist() for row in seen[0]] == [
        [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 5], [0, 5, 6]
    ]  # fmt: skip
    # Behind a text of 3 tokens, of which all see all.
    mask = Branching(depth, seen).mask(torch.arange(3, 10).repeat(2, 1), torch.arange(11), torch.float32)[0, 0]
    assert mask.isinf().logical_not()[4].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 7]


def test_a_draft_is_shown_one_depth_at_a_time():
    tree = a_tree()
    drafted([tree], [[1, 2]], 0, torch.device("cpu"))
    ids, (depth, seen) = drafted([tree], [[3, 5]], 2, torch.device("cpu"))
    assert (ids.tolist(), depth.tolist()) == ([[6, 10]], [[1, 1]])
    assert seen[0].tolist() == [[True, False, True, False], [False, True, False, True]]
    assert tree.places == [None, 0, 1, 2, None, 3, None]


# greedy, in fp32: the text without assistance


@pytest.mark.parametrize("compile", [None, "no", "native"])
@pytest.mark.parametrize(("tokens", "branches"), [(1, 3), (4, 2), (5, 6)])
@pytest.mark.parametrize("batch", ["one", "three", "padded"])
def test_greedy_text_is_the_same(models, batch, tokens, branches, compile):
    vanilla, ours, draft = models
    inputs = prompt(batch)
    rows, width = inputs["input_ids"].shape
    expected = generate(vanilla, inputs, max_new_tokens=NEW, **GREEDY)
    reserve(ours, rows, width + NEW - 1, compile)  # not a position to spare
    reserve(draft, rows, width + NEW, compile)
    found = generate(ours, inputs, max_new_tokens=NEW, **splitting(draft, tokens, branches), **GREEDY)
    assert torch.equal(found, expected)
    done = ours.assisted
    assert done.mode == "tree"
    assert done.new_tokens == rows * NEW
    assert 0 < done.accepted_tokens < done.draft_tokens
    assert done.draft_tokens > tokens * (done.target_forwards - 2)  # branches count, each of their tokens
    assert f"up to {branches} branches split above 0.02, tree verified by the Python step" in ours.path


def test_what_other_branches_hold_is_used(models):
    """More branches stand for more text a pass, and the cache then holds the branch that stood."""
    vanilla, ours, draft = models
    expected = generate(vanilla, prompt("one"), max_new_tokens=60, **GREEDY)
    per_forward = []
    for branches in (1, 4):
        found = generate(ours, prompt("one"), max_new_tokens=60, **splitting(draft, branches=branches), **GREEDY)
        assert torch.equal(found, expected)
        per_forward.append(ours.assisted.tokens_per_target_forward)
    assert per_forward[1] > per_forward[0]
    assert ours.assisted.acceptance < 1


def test_one_branch_is_a_draft_as_it_was(models, monkeypatch):
    _, ours, draft = models
    monkeypatch.setattr(verify.GreedyVerifier, "tree", None)
    generate(ours, prompt("one"), max_new_tokens=NEW, **splitting(draft, branches=1), **GREEDY)
    assert ours.assisted.mode == "draft"
    # What never splits is verified as one branch, and proposed as without.
    counts = [(ours.assisted.draft_tokens, ours.assisted.accepted_tokens)]
    generate(ours, prompt("one"), max_new_tokens=NEW, **splitting(draft, p_split=1.0), **GREEDY)
    assert ours.assisted.mode == "tree"
    counts.append((ours.assisted.draft_tokens, ours.assisted.accepted_tokens))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("compile", ["no", "native"])
def test_small_weights_and_caches(tmp_path, compile):
    folder = small.write(tmp_path, max_position_embeddings=256, head_dim=32, initializer_range=0.3)
    ours, draft = small.load(folder, "int8"), small.load(folder, "int4")
    for model in (ours, draft):
        products = "native" if compile == "native" else "auto"
        model.preallocate(3, 64, compile=compile, products=products, cache_k="q8_0", cache_v="q8_0")
    expected = generate(ours, prompt("padded"), max_new_tokens=NEW, **GREEDY)
    found = generate(ours, prompt("padded"), max_new_tokens=NEW, **splitting(draft), **GREEDY)
    assert torch.equal(found, expected)
    assert ours.assisted.accepted_tokens > 0


def test_the_cache_handed_out_is_the_one_without_assistance(models):
    _, ours, draft = models
    for batch in ("one", "padded"):
        inputs = prompt(batch)
        text = generate(ours, inputs, max_new_tokens=NEW, **GREEDY)
        options = {"max_new_tokens": NEW, "eos_token_id": int(text[0, 20]), "pad_token_id": 0, **GREEDY}
        options["return_dict_in_generate"] = True
        expected, found = generate(ours, inputs, **options), generate(ours, inputs, **options, **splitting(draft))
        assert torch.equal(found.sequences, expected.sequences)
        for layer, other in zip(found[CACHE_NAME].layers, expected[CACHE_NAME].layers, strict=True):
            torch.testing.assert_close(layer.keys, other.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(layer.values, other.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", ["one", "padded"])
def test_an_end_of_text_within_a_branch(models, batch):
    vanilla, ours, draft = models
    inputs = prompt(batch)
    text = generate(vanilla, inputs, max_new_tokens=NEW, **GREEDY)[:, 14:]
    for place in range(4, 9):
        options = {"max_new_tokens": NEW, "eos_token_id": text[:, place].tolist(), "pad_token_id": 0, **GREEDY}
        for shortest in (None, place + 3):
            options["min_new_tokens"] = shortest
            expected = generate(vanilla, inputs, **options)
            plain, streamer = Recorder(), Recorder()
            generate(ours, inputs, streamer=plain, **options)
            assert torch.equal(generate(ours, inputs, streamer=streamer, **options, **splitting(draft)), expected)
            assert all(map(torch.equal, streamer.got, plain.got))


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2, "min_new_tokens": 20, "eos_token_id": [5, 6]}]
)
@pytest.mark.parametrize("batch", ["one", "padded"])
def test_processors_see_the_branch_before_each_node(models, batch, options):
    _, ours, draft = models
    options = {"max_new_tokens": NEW, "pad_token_id": 0, **options, **GREEDY}
    expected = generate(ours, prompt(batch), **options)
    assert torch.equal(generate(ours, prompt(batch), **options, **splitting(draft)), expected)
    assert ours.assisted.mode == "tree"


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_one_row_takes_any_processor_and_criterion(models, sampling):
    _, ours, draft = models
    inputs, seen = prompt("one"), []
    token = int(generate(ours, inputs, max_new_tokens=NEW, **GREEDY)[0, 14 + 20])
    for kind in ({}, splitting(draft)):
        lists = {"logits_processor": LogitsProcessorList([Remembering()])}
        lists["stopping_criteria"] = StoppingCriteriaList([After(token)])
        dicts = {"return_dict_in_generate": True, "output_scores": True}
        seen.append(generate(ours, inputs, max_new_tokens=NEW, **lists, **dicts, **kind, **sampling))
    expected, found = seen
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), rtol=1e-4, atol=1e-4)


def test_long_calls_grow_both_caches():
    ours, draft = pair(max_position_embeddings=2048)[1], noisy(pair(max_position_embeddings=2048)[1], 0.05)
    expected = generate(ours, prompt("one"), max_new_tokens=560, **GREEDY)
    assert torch.equal(generate(ours, prompt("one"), max_new_tokens=560, **splitting(draft), **GREEDY), expected)


def test_the_demo_splits_where_its_draft_is_in_two_minds():
    ours, draft = (
        fastllama.LlamaForCausalLM.from_pretrained(demo_folder(which), dtype=torch.float32)
        for which in ("target", "draft")
    )
    for model in (ours, draft):
        model.preallocate(1, 128, compile="native")
    options = {"max_new_tokens": 60, "min_new_tokens": 60, **GREEDY}
    draft.generation_config.draft_branches = 3  # as K: from the draft, where the call says nothing
    forwards = {"constant": 0, "adaptive": 0, "one branch": 0}
    for seed in range(4):
        ids = torch.randint(20, 800, (1, 24), generator=torch.Generator().manual_seed(seed))
        expected = ours.generate(ids, **options)
        for schedule in ("constant", "adaptive"):
            kind = splitting(draft, 6, None, None, num_assistant_tokens_schedule=schedule)
            assert torch.equal(ours.generate(ids, **kind, **options), expected)
            assert "up to 3 branches split above 0.1" in ours.path
            forwards[schedule] += ours.assisted.target_forwards
        ours.generate(ids, **splitting(draft, 6, 1), **options)
        forwards["one branch"] += ours.assisted.target_forwards
    assert forwards["constant"] < forwards["one branch"]


def test_a_draft_in_another_dtype_with_another_vocabulary(models, demo_tokenizer):
    _, ours, _ = models
    for size in (300, 450):
        draft = pair(max_position_embeddings=256, vocab_size=size)[1]
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                known = min(len(parameter), len(draft.get_parameter(name)))
                draft.get_parameter(name)[:known] = parameter[:known]
        draft = copy.deepcopy(draft).to(torch.bfloat16)
        both = {"tokenizer": demo_tokenizer, "assistant_tokenizer": demo_tokenizer}
        expected = generate(ours, prompt("padded"), max_new_tokens=NEW, **GREEDY)
        found = generate(ours, prompt("padded"), max_new_tokens=NEW, **splitting(draft), **both, **GREEDY)
        assert torch.equal(found, expected)
        assert ours.assisted.accepted_tokens > 0


# sampled: the distribution without assistance, over 50,000 texts


def test_siblings_stand_in_turn_by_hand():
    assert stands([0.5, 0.3], [0.49, 0.9]) == 0
    assert stands([0.5, 0.3], [0.51, 0.59]) == 1  # 0.3 of the 0.5 that are left
    assert stands([0.5, 0.3], [0.51, 0.61]) is None
    assert stands([0.0, 1.0], [0.0, 0.99]) == 1
    assert stands([], []) is None


def test_what_is_left_is_without_the_siblings():
    p = torch.tensor([0.5, 0.3, 0.2]).repeat(3, 1)
    left = without(p, [[0, 2], [], [0, 1, 2]])
    torch.testing.assert_close(left, torch.tensor([[0.0, 0.3, 0.0], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]))


def in_a_tree(draft) -> dict:
    return chain(draft, 2) | {"p_split": 0.1, "draft_branches": 3}


# A chain of drafts, which decides by the same rule where nothing splits, is counted with each every day.
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(HOT, id="hot", marks=pytest.mark.full),
        pytest.param(WARM, id="warm"),
        pytest.param(NARROW, id="narrow", marks=pytest.mark.full),
    ],
)
def test_what_a_tree_assists_is_distributed_as_without(sampled, options):  # noqa: F811
    vanilla, ours, draft = sampled
    room(ours, draft)
    assert improbability(ours, exact(vanilla, options), options, **in_a_tree(draft)) > 1e-3
    assert ours.assisted.mode == "tree"


def room(*models) -> None:
    for model in models:
        model.preallocate(5_000, 20, products="stock")


def _always(chances, uniforms):
    return stands(chances, [0.0] * len(uniforms))


def _not_in_turn(chances, uniforms):
    """As if each were the first: p(x) in place of what is left of it."""
    places = [place for place, (chance, uniform) in enumerate(zip(chances, uniforms, strict=True)) if uniform < chance]
    return places[0] if places else None


@pytest.mark.parametrize(
    ("name", "broken"), [("stands", _always), ("stands", _not_in_turn), ("without", lambda p, tokens: p)]
)
def test_a_broken_rule_is_found(sampled, monkeypatch, name, broken):  # noqa: F811
    vanilla, ours, draft = sampled
    room(ours, draft)
    monkeypatch.setattr(verify, name, broken)
    assert improbability(ours, exact(vanilla, HOT), HOT, texts=10_000, **in_a_tree(draft)) < 1e-6


def test_draws_of_what_is_left_never_repeat_a_sibling():
    torch.manual_seed(0)
    assert set(draw(without(torch.full((100, 4), 0.25), [[1, 2]] * 100)).tolist()) == {0, 3}


# refused


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"p_split": 1.5}, "p_split=1.5 is not allowed; allowed: 0 to 1"),
        ({"p_split": -0.1}, "p_split=-0.1 is not allowed; allowed: 0 to 1"),
        ({"p_split": "0.1"}, "p_split='0.1' is not allowed; allowed: 0 to 1"),
        ({"draft_branches": 0}, "draft_branches=0 is not allowed; allowed: an integer >= 1"),
        ({"draft_branches": 2.0}, "draft_branches=2.0 is not allowed; allowed: an integer >= 1"),
    ],
)
def test_what_is_not_allowed(models, given, says):
    _, ours, draft = models
    with pytest.raises(ValueError, match=says):
        generate(ours, prompt("one"), max_new_tokens=4, **(splitting(draft) | given), **GREEDY)


def test_a_tree_needs_a_draft_and_room(models):
    _, ours, draft = models
    for given in ({"p_split": 0.1}, {"draft_branches": 2}, {"draft_branches": 2, "prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="needs assistant_model: it says how that model drafts"):
            generate(ours, prompt("one"), max_new_tokens=4, **given, **GREEDY)
    ours.preallocate(1, 24, products="stock")
    with pytest.raises(ValueError, match="24 proposed tokens do not fit the target's cache of 24 positions"):
        generate(ours, prompt("one"), max_new_tokens=8, **splitting(draft, 6, 4), **GREEDY)
    expected = generate(ours, prompt("one"), max_new_tokens=8, **GREEDY)
    draft.preallocate(1, 22, products="stock")  # two positions beyond the prompt: smaller trees
    found = generate(ours, prompt("one"), max_new_tokens=8, **splitting(draft, 5, 4), **GREEDY)
    assert torch.equal(found, expected)
