"""Assisted generation beside the same model without assistance, and beside transformers."""

import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.models.llama.modeling_llama import LlamaForCausalLM as Vanilla

import fastllama
from fastllama.decode.assisted.schedule import Constant
from fastllama.decode.cache_name import CACHE_NAME
from fastllama.decode.engine import Engine
from fastllama.demo.names import demo_folder
from fastllama.kernels.linear import NATIVE_ROWS
from tests import drafts, small
from tests.drafts import assistance, noisy
from tests.tiny import GREEDY, SAMPLED, config, generate, pair, prompt

NEW = 30


@pytest.fixture(scope="module")
def models():
    return drafts.trio()


@pytest.fixture(scope="module")
def looping():
    return drafts.looping_pair()


@pytest.fixture(autouse=True)
def as_before(request):
    """The shared models start each test without a reservation and with their own generation configs."""
    yield
    for shared in {"models", "looping"}.intersection(request.fixturenames):
        for model in request.getfixturevalue(shared)[1:]:
            model.free()
            model.generation_config = type(model.generation_config).from_model_config(model.config)


def reserve(model, rows: int, length: int, compile: str | None) -> None:
    model.free()
    if compile is not None:
        model.preallocate(rows, length, compile=compile, products="native" if compile == "native" else "stock")


# greedy, in fp32: the text without assistance


@pytest.mark.parametrize("compile", [None, "no", "native"])
@pytest.mark.parametrize("tokens", [1, 4, 7])
@pytest.mark.parametrize("batch", ["one", "three", "padded"])
@pytest.mark.parametrize("mode", ["draft", "lookup"])
def test_greedy_text_is_the_same(models, looping, mode, batch, tokens, compile):
    vanilla, ours, draft = models if mode == "draft" else (*looping, models[2])
    inputs = prompt(batch)
    rows, width = inputs["input_ids"].shape
    expected = generate(vanilla, inputs, max_new_tokens=NEW, **GREEDY)
    reserve(ours, rows, width + NEW - 1, compile)  # not a position to spare
    reserve(draft, rows, width + NEW, compile)
    found = generate(ours, inputs, max_new_tokens=NEW, **assistance(mode, draft, tokens), **GREEDY)
    assert torch.equal(found, expected)
    done = ours.assisted
    assert done.mode == mode
    assert done.new_tokens == rows * NEW
    assert 0 < done.accepted_tokens < done.draft_tokens + (mode == "lookup")
    assert done.acceptance == done.accepted_tokens / done.draft_tokens
    assert done.tokens_per_target_forward == done.new_tokens / done.target_forwards
    assert done.target_forwards < NEW
    assert (done.draft_forwards > 0) == (mode == "draft")
    assert "assisted by" in ours.path
    assert generate(ours, inputs, max_new_tokens=4, **GREEDY).shape == (rows, width + 4)
    assert ours.assisted is None


def test_compiled_steps(models):
    vanilla, ours, draft = models
    inputs = prompt("padded")
    expected = generate(vanilla, inputs, max_new_tokens=NEW, **GREEDY)
    ours.preallocate(3, 48, compile="static", products="stock")
    found = generate(ours, inputs, max_new_tokens=NEW, **assistance("draft", draft), **GREEDY)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["draft", "lookup"])
def test_small_weights_and_caches(tmp_path, mode):
    folder = small.write(tmp_path, max_position_embeddings=256, head_dim=32, initializer_range=0.1)
    ours, draft = small.load(folder, "int8"), small.load(folder, "int4")
    for compile in ("no", "native"):
        for model in (ours, draft):
            products = "native" if compile == "native" else "auto"
            model.preallocate(3, 48, compile=compile, products=products, cache_k="q8_0", cache_v="q8_0")
        expected = generate(ours, prompt("padded"), max_new_tokens=NEW, **GREEDY)
        found = generate(ours, prompt("padded"), max_new_tokens=NEW, **assistance(mode, draft), **GREEDY)
        assert torch.equal(found, expected)
        assert ours.assisted.accepted_tokens > 0


def test_half_precision_with_a_draft_in_another_dtype(models):
    _, ours, draft = models
    half = copy.deepcopy(ours).to(torch.bfloat16)
    generate(half, prompt("three"), max_new_tokens=NEW, **assistance("draft", draft), **GREEDY)
    assert half.assisted.accepted_tokens > 0
    # The other way round, what is written is the fp32 model's own.
    expected = generate(ours, prompt("three"), max_new_tokens=NEW, **GREEDY)
    found = generate(ours, prompt("three"), max_new_tokens=NEW, **assistance("draft", half), **GREEDY)
    assert torch.equal(found, expected)
    assert ours.assisted.acceptance > 0.5


@pytest.fixture(scope="module")
def demo():
    """The demo and its draft."""
    return [
        fastllama.LlamaForCausalLM.from_pretrained(demo_folder(which), dtype=torch.float32)
        for which in ("target", "draft")
    ]


def test_the_demo_and_its_draft(demo):
    ours, draft = demo
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, 800, (1, 24), generator=generator)
    for model in (ours, draft):
        model.preallocate(1, 128, compile="native")
    options = {"max_new_tokens": 60, "min_new_tokens": 60, **GREEDY}
    expected = ours.generate(ids, **options)
    for schedule in ("constant", "heuristic", "adaptive"):
        kind = assistance("draft", draft, 6, num_assistant_tokens_schedule=schedule)
        assert torch.equal(ours.generate(ids, **kind, **options), expected)
        kind = assistance("lookup", None, 6, num_assistant_tokens_schedule=schedule)
        assert torch.equal(ours.generate(ids, **kind, **options), expected)


# what else takes part

PROCESSED = {
    "penalty": {"repetition_penalty": 1.3},
    "ngrams": {"no_repeat_ngram_size": 2},
    "penalty and length": {"repetition_penalty": 1.2, "min_new_tokens": 20},
    "suppressed": {"suppress_tokens": [5, 6, 7]},
}


@pytest.mark.parametrize("options", PROCESSED)
@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("mode", ["draft", "lookup"])
def test_processors_see_the_text_before_each_position(models, mode, batch, options):
    _, ours, draft = models
    inputs = prompt(batch)
    usual = generate(ours, inputs, max_new_tokens=NEW, **GREEDY)
    text = set(usual[0, 14:].tolist())
    ends = {"eos_token_id": sorted(text)[:2], "pad_token_id": 0}
    options = {"max_new_tokens": NEW, **ends, **PROCESSED[options], **GREEDY}
    expected = generate(ours, inputs, **options)
    assert torch.equal(generate(ours, inputs, **options, **assistance(mode, draft)), expected)
    assert ours.assisted is not None


@pytest.mark.parametrize("mode", ["draft", "lookup"])
@pytest.mark.parametrize("batch", ["one", "padded"])
def test_an_end_of_text_within_the_proposals(models, mode, batch):
    vanilla, ours, draft = models
    inputs = prompt(batch)
    text = generate(vanilla, inputs, max_new_tokens=NEW, **GREEDY)[:, 14:]
    for place in range(4, 10):  # whatever the proposals' borders are, some are hit within
        options = {"max_new_tokens": NEW, "eos_token_id": text[:, place].tolist(), "pad_token_id": 0, **GREEDY}
        for shortest in (None, place + 3):
            options["min_new_tokens"] = shortest
            expected = generate(vanilla, inputs, **options)
            found = generate(ours, inputs, **options, **assistance(mode, draft, 7))
            assert torch.equal(found, expected)
            assert ours.assisted.new_tokens <= expected[:, 14:].numel()


class Remembering(LogitsProcessor):
    """Forbids what it has seen win, and notes the lengths that it was shown."""

    def __init__(self):
        self.lengths, self.won = [], []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        scores[:, self.won[-5:]] -= 3.0
        self.won.append(int(scores[0].argmax()))
        return scores


class After(StoppingCriteria):
    """Stops the rows in which a token has come up; notes the lengths that it was shown."""

    def __init__(self, token: int):
        self.token, self.lengths = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return (input_ids[:, 14:] == self.token).any(1)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mode", ["draft", "lookup"])
def test_one_row_takes_any_processor_and_criterion_and_gives_every_score(models, mode, sampling):
    _, ours, draft = models
    inputs, seen = prompt("one"), []
    token = int(generate(ours, inputs, max_new_tokens=NEW, **GREEDY)[0, 14 + 20])
    for kind in ({}, assistance(mode, draft)):
        processor, criterion = Remembering(), After(token)
        out = generate(
            ours,
            inputs,
            max_new_tokens=NEW,
            logits_processor=LogitsProcessorList([processor]),
            stopping_criteria=StoppingCriteriaList([criterion]),
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            **kind,
            **sampling,
        )
        seen.append((out, processor, criterion))
    (expected, *them), (found, *us) = seen
    assert ours.assisted is not None
    assert torch.equal(found.sequences, expected.sequences)
    assert [each.lengths for each in us] == [each.lengths for each in them]
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(found[name]), torch.stack(expected[name]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", ["one", "padded"])
def test_the_cache_handed_out_is_the_one_without_assistance(models, batch):
    _, ours, draft = models
    inputs = prompt(batch)
    text = generate(ours, inputs, max_new_tokens=NEW, **GREEDY)
    options = {"max_new_tokens": NEW, "eos_token_id": int(text[0, 20]), "pad_token_id": 0, **GREEDY}
    options["return_dict_in_generate"] = True
    expected, found = generate(ours, inputs, **options), generate(ours, inputs, **options, **assistance("draft", draft))
    assert torch.equal(found.sequences, expected.sequences)
    for layer, other in zip(found[CACHE_NAME].layers, expected[CACHE_NAME].layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.values, other.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["draft", "lookup"])
def test_stop_strings_and_time(demo, demo_tokenizer, mode):
    ours, draft = demo
    for model in demo:
        model.free()
    demo_tokenizer.padding_side = "left"
    texts = ["def main(argv):\n", "class Reader:\n    def read(self):\n        return"]
    inputs = demo_tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    for stopping in ({"stop_strings": ["right (\n#", "_nul"], "tokenizer": demo_tokenizer}, {"max_time": 1e-9}):
        options = {"max_new_tokens": 60, **stopping, **GREEDY}
        for rows in (slice(0, 2), slice(1, 2)):
            some = {name: tensor[rows] for name, tensor in inputs.items()}
            expected = generate(ours, some, **options)
            assert expected.shape[1] < inputs["input_ids"].shape[1] + 60
            found = generate(ours, some, **options, **assistance(mode, draft, 6))
            assert torch.equal(found, expected)
            assert ours.assisted.mode == mode


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.got, self.ended = [], False

    def put(self, value):
        self.got.append(value.clone())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("mode", ["draft", "lookup"])
def test_a_streamer_gets_the_tokens_in_order(models, mode, batch):
    _, ours, draft = models
    inputs = prompt(batch)
    text = generate(ours, inputs, max_new_tokens=NEW, **GREEDY)
    options = {"max_new_tokens": NEW, "eos_token_id": int(text[0, 14 + 9]), "pad_token_id": 0, **GREEDY}
    plain, assisted = Recorder(), Recorder()
    generate(ours, inputs, streamer=plain, **options)
    generate(ours, inputs, streamer=assisted, **options, **assistance(mode, draft))
    assert assisted.ended
    assert len(assisted.got) == len(plain.got)
    assert all(torch.equal(ours_, theirs) for ours_, theirs in zip(assisted.got, plain.got, strict=True))


@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("mode", ["draft", "lookup"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2, "min_new_tokens": 12}], ids=["warped", "penalty"])
def test_sampled_runs(models, mode, batch, options):
    _, ours, draft = models
    inputs = prompt(batch)
    options = {"max_new_tokens": NEW, "eos_token_id": [7, 8, 9], "pad_token_id": 0, **SAMPLED, **options}
    first, again = (generate(ours, inputs, **options, **assistance(mode, draft)) for _ in range(2))
    assert torch.equal(first, again)  # the seed decides
    assert torch.equal(first[:, :14], inputs["input_ids"])
    assert ours.assisted.new_tokens > 0


def test_long_calls_grow_both_caches():
    ours, draft = pair(max_position_embeddings=2048)[1], noisy(pair(max_position_embeddings=2048)[1])
    expected = generate(ours, prompt("one"), max_new_tokens=1100, **GREEDY)
    found = generate(ours, prompt("one"), max_new_tokens=1100, **assistance("draft", draft, 7), **GREEDY)
    assert torch.equal(found, expected)


# who drafts, and how much


def test_a_draft_of_transformers_own_is_left_as_it_is(models):
    _, ours, draft = models
    plain = Vanilla(config(max_position_embeddings=256)).eval()
    plain.load_state_dict(draft.state_dict())
    before = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in plain.named_parameters()}
    expected = generate(ours, prompt("padded"), max_new_tokens=NEW, **GREEDY)
    found = generate(ours, prompt("padded"), max_new_tokens=NEW, **assistance("draft", plain), **GREEDY)
    assert torch.equal(found, expected)
    assert ours.assisted.accepted_tokens > 0
    for name, parameter in plain.named_parameters():
        assert (parameter.data_ptr(), True) == (before[name][0], torch.equal(parameter, before[name][1]))


@pytest.mark.parametrize("size", [300, 450])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, {"do_sample": True, "repetition_penalty": 1.2}], ids=str)
def test_a_vocabulary_that_is_shorter_or_longer(models, demo_tokenizer, sampling, size):
    _, ours, _ = models
    draft = pair(max_position_embeddings=256, vocab_size=size)[1]
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            known = min(len(parameter), len(draft.get_parameter(name)))
            draft.get_parameter(name)[:known] = parameter[:known]
        draft.lm_head.weight[min(size, 384) :] *= 3  # what the target has not got would win
    both = {"tokenizer": demo_tokenizer, "assistant_tokenizer": demo_tokenizer}
    for batch in ("one", "padded"):
        options = {"max_new_tokens": NEW, **sampling}
        found = generate(ours, prompt(batch), **options, **assistance("draft", draft), **both)
        # The longer one knows all that the target does, so that everything it draws from the same scores stands.
        assert ours.assisted.accepted_tokens > 0
        if size == 450 and "repetition_penalty" not in sampling:
            assert ours.assisted.acceptance > 0.99
        if sampling is GREEDY:
            assert torch.equal(found, generate(ours, prompt(batch), **options))


def test_tokenizers_are_compared_by_what_ids_mean(models, demo_tokenizer):
    companions, other = models[1]._companions, copy.deepcopy(demo_tokenizer)
    assert companions.same_tokenizer(demo_tokenizer, None)
    assert companions.same_tokenizer(None, None)
    assert companions.same_tokenizer(demo_tokenizer, other)
    other = copy.deepcopy(demo_tokenizer)
    other.add_tokens(["something new"])
    assert not companions.same_tokenizer(demo_tokenizer, other)
    assert not companions.same_tokenizer(demo_tokenizer, other)


def test_k_and_schedule_come_from_the_draft_as_in_transformers(models):
    _, ours, draft = models
    inputs = prompt("one")
    draft.generation_config.num_assistant_tokens = 3
    draft.generation_config.assistant_confidence_threshold = 0.0
    generate(ours, inputs, max_new_tokens=NEW, assistant_model=draft, **GREEDY)
    assert "constant K of 3" in ours.path
    for schedule, kept in (("heuristic", True), ("heuristic_transient", False)):
        draft.generation_config.num_assistant_tokens = 20
        draft.generation_config.num_assistant_tokens_schedule = schedule
        generate(ours, inputs, max_new_tokens=NEW, assistant_model=draft, **GREEDY)
        assert (draft.generation_config.num_assistant_tokens < 20) == kept
    generate(ours, inputs, max_new_tokens=NEW, assistant_model=draft, num_assistant_tokens=2, **GREEDY)
    assert "K of 2" in ours.path


def test_a_draft_that_doubts_stops_early(models):
    _, ours, draft = models
    counts = []
    for threshold in (0.0, 0.9):
        kind = assistance("draft", draft, 7, assistant_confidence_threshold=threshold)
        generate(ours, prompt("one"), max_new_tokens=NEW, **kind, **GREEDY)
        counts.append(ours.assisted.draft_tokens)
    assert counts[1] < counts[0]


@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("pause", [2, 16, 17, 31, 40])
def test_a_draft_that_was_paused_catches_up(models, monkeypatch, batch, pause):
    """In native steps where few of them do, and as the step for any number of tokens does."""
    vanilla, ours, draft = models
    inputs, counts = prompt(batch), []
    rows, width = inputs["input_ids"].shape
    plain, fed = Engine.step, []

    def noted(self, ids, *more):
        fed.append(ids.shape[1] * (self is not ours._engine))
        return plain(self, ids, *more)

    monkeypatch.setattr(Engine, "step", noted)
    expected = generate(vanilla, inputs, max_new_tokens=60, **GREEDY)
    for compile in ("no", "native"):
        rounds = itertools.count()
        monkeypatch.setattr(
            Constant, "next", lambda self, *how, rounds=rounds: 0 if next(rounds) % (pause + 2) > 1 else 3
        )
        for model in (ours, draft):
            reserve(model, rows, width + 64, compile)
        found = generate(ours, inputs, max_new_tokens=60, **assistance("draft", draft, 3), **GREEDY)
        assert torch.equal(found, expected)
        counts.append((ours.assisted.draft_tokens, ours.assisted.accepted_tokens, ours.assisted.target_forwards))
        whole, few = max(fed), NATIVE_ROWS // rows
        fed.clear()
        assert whole > pause if compile == "no" or pause + 4 > 2 * few else whole <= few
    assert counts[0] == counts[1] and counts[0][1] > 0


def test_models_with_companions_are_copied_and_pickled(models):
    _, ours, draft = models
    generate(ours, prompt("one"), max_new_tokens=4, **assistance("draft", draft), **GREEDY)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        generate(twin, prompt("one"), max_new_tokens=4, **assistance("draft", draft), **GREEDY)
        assert twin.assisted.mode == "draft"
    with pytest.raises(dataclasses.FrozenInstanceError):
        twin.assisted.new_tokens = 0


def test_a_cancelled_call_leaves_both_engines_free(models):
    _, ours, draft = models

    class Cancel(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.got) == 8:
                raise KeyboardInterrupt

    kind = assistance("draft", draft)
    with pytest.raises(KeyboardInterrupt):
        generate(ours, prompt("one"), max_new_tokens=NEW, streamer=Cancel(), **kind, **GREEDY)
    generate(draft, prompt("one"), max_new_tokens=4, **GREEDY)
    assert not draft.path.startswith("parent")
    expected = generate(ours, prompt("one"), max_new_tokens=NEW, **GREEDY)
    assert torch.equal(generate(ours, prompt("one"), max_new_tokens=NEW, **kind, **GREEDY), expected)


# the parent's, and errors


def test_what_the_parent_runs_is_equal_and_named(models):
    vanilla, ours, draft = models
    inputs = prompt("one")
    expected = generate(vanilla, inputs, max_new_tokens=8, **GREEDY)
    other = Vanilla(config(max_position_embeddings=256)).eval()
    other.forward = other.forward
    for kind, reason in (
        ({"assistant_model": ours}, "the draft is the model itself"),
        ({"assistant_model": other}, "the draft: a module's forward was replaced"),
        ({"assistant_early_exit": 1}, "assistant_early_exit"),
    ):
        assert torch.equal(generate(ours, inputs, max_new_tokens=8, **kind, **GREEDY), expected)
        assert ours.path == f"parent: {reason}"
        assert ours.assisted is None
    draft.train()
    generate(ours, inputs, max_new_tokens=8, assistant_model=draft, **GREEDY)
    assert ours.path == "parent: the draft: the model is in training mode"
    draft.eval()


def test_a_rotary_embedding_that_looks_ahead_is_the_parents():
    _, ours = pair(rope="dynamic")
    generate(ours, prompt("one"), max_new_tokens=8, prompt_lookup_num_tokens=3, **GREEDY)
    assert ours.path.startswith("parent: rope_type 'dynamic'")


def test_several_rows_with_what_must_be_shown_one_row_at_a_time_are_refused(models):
    _, ours, draft = models
    for more in (
        {"logits_processor": LogitsProcessorList([Remembering()])},
        {"stopping_criteria": StoppingCriteriaList([After(3)])},
        {"return_dict_in_generate": True, "output_scores": True},
    ):
        with pytest.raises(ValueError, match="batch_size = 1"):
            generate(ours, prompt("three"), max_new_tokens=8, **more, **assistance("draft", draft), **GREEDY)


BAD = {
    "num_assistant_tokens": [0, -1, 2.5, "4", True],
    "num_assistant_tokens_schedule": ["sometimes"],
    "assistant_confidence_threshold": [1.5, -0.1],
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_allowed(models, name):
    _, ours, draft = models
    for value in BAD[name]:
        with pytest.raises(ValueError, match=f"{name}={value!r} is not allowed"):
            generate(ours, prompt("one"), max_new_tokens=4, **(assistance("draft", draft) | {name: value}), **GREEDY)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens=0 is not allowed"):
        generate(ours, prompt("one"), max_new_tokens=4, prompt_lookup_num_tokens=0, **GREEDY)


def test_what_does_not_fit(models):
    _, ours, draft = models
    ours.preallocate(1, 24, products="stock")
    with pytest.raises(ValueError, match="24 proposed tokens do not fit the target's cache of 24 positions"):
        generate(ours, prompt("one"), max_new_tokens=8, **assistance("draft", draft, 24), **GREEDY)
    draft.preallocate(1, 16, products="stock")
    with pytest.raises(ValueError, match="the draft: this call needs 1 x 21 cache positions"):
        generate(ours, prompt("one"), max_new_tokens=8, **assistance("draft", draft), **GREEDY)
    other = pair(max_position_embeddings=256, vocab_size=300)[1]
    with pytest.raises(ValueError, match="different tokenizers"):
        generate(ours, prompt("one"), max_new_tokens=8, **assistance("draft", other), **GREEDY)
