"""Everything that `generate` can be asked for, equal to the parent's."""

import copy

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import fastllama
from fastllama.decode.cache_name import CACHE_NAME, CACHE_NAMES
from fastllama.decode.loop import sample_loop
from tests.tiny import GREEDY, SAMPLED, generate, pair, prompt

NEW = 20


@pytest.fixture(scope="module")
def models():
    return pair()


@pytest.fixture(scope="module")
def compiled():
    vanilla, ours = pair()
    ours.preallocate(3, 64, compile="static")
    return vanilla, ours


class AddToOne(LogitsProcessor):
    """Stateful: favours another token at each call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores = scores.clone()
        scores[:, (self.calls * 7) % scores.shape[1]] += 6.0
        return scores


class StopAt(StoppingCriteria):
    """Stops each row after its own count of new tokens."""

    def __init__(self, counts, width):
        self.counts, self.width = torch.tensor(counts), width

    def __call__(self, input_ids, scores, **kwargs):
        return self.counts[: input_ids.shape[0]] <= input_ids.shape[1] - self.width


class Collector(BaseStreamer):
    def __init__(self, fail_after=None):
        self.pieces, self.ended, self.fail_after = [], False, fail_after

    def put(self, value):
        self.pieces.append(value.clone())
        if self.fail_after is not None and len(self.pieces) > self.fail_after:
            raise RuntimeError("cancelled")

    def end(self):
        self.ended = True


def eos_of(vanilla, inputs, row, step):
    """A token that greedy decoding gives `row` at `step`."""
    width = inputs["input_ids"].shape[1]
    return int(generate(vanilla, inputs, max_new_tokens=NEW, **GREEDY)[row, width + step])


VARIANTS = {
    "greedy": {},
    "sampled": SAMPLED,
    "min_p": {"do_sample": True, "min_p": 0.05},
    "typical": {"do_sample": True, "typical_p": 0.8},
    "min_new_tokens": {"min_new_tokens": 10},
    "max_length": {"max_length": 30, "max_new_tokens": None},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[5], [17, 20]]},
    "suppress": {"suppress_tokens": list(range(3, 60))},
    "num_return_sequences": {**SAMPLED, "num_return_sequences": 3},
    "forced_eos": {"forced_eos_token_id": 7},
    "sequence_bias": {"sequence_bias": [[[9], 3.0]]},
}


@pytest.mark.parametrize("batch", ["one", "padded", "three"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(models, variant, batch):
    vanilla, ours = models
    inputs = prompt(batch)
    options = {"max_new_tokens": NEW, "do_sample": False, **VARIANTS[variant]}
    options = {key: value for key, value in options.items() if value is not None}
    expected = generate(vanilla, inputs, **options)
    assert torch.equal(generate(ours, inputs, **options), expected)
    assert ours.path.startswith("preallocated")


@pytest.mark.parametrize("which", ["models", "compiled"])
@pytest.mark.parametrize("step", [0, 3, 11])
def test_rows_that_meet_eos_early(which, step, request):
    vanilla, ours = request.getfixturevalue(which)
    inputs = prompt("padded")
    eos = eos_of(vanilla, inputs, 1, step)
    options = {"max_new_tokens": NEW, "eos_token_id": eos, "pad_token_id": 0, **GREEDY}
    expected = generate(vanilla, inputs, **options)
    assert (expected[1] == eos).any()
    assert torch.equal(generate(ours, inputs, **options), expected)


def test_all_rows_finished_stops_the_loop(models):
    vanilla, ours = models
    inputs = prompt("one")
    eos = [eos_of(vanilla, inputs, 0, 4), eos_of(vanilla, inputs, 0, 9)]
    options = {"max_new_tokens": NEW, "eos_token_id": eos, "pad_token_id": 0, **GREEDY}
    expected = generate(vanilla, inputs, **options)
    assert expected.shape[1] < inputs["input_ids"].shape[1] + NEW
    assert torch.equal(generate(ours, inputs, **options), expected)


def test_custom_processors_and_criteria(models):
    vanilla, ours = models
    inputs = prompt("padded")
    outputs = []
    for model in (vanilla, ours):
        options = {
            "logits_processor": LogitsProcessorList([AddToOne()]),
            "stopping_criteria": StoppingCriteriaList([StopAt([4, 9, 6], inputs["input_ids"].shape[1])]),
        }
        outputs.append(generate(model, inputs, max_new_tokens=NEW, pad_token_id=0, **GREEDY, **options))
    assert outputs[0].shape[1] == inputs["input_ids"].shape[1] + 9
    assert torch.equal(*outputs)


def test_streamer_gets_what_vanillas_gets(models):
    inputs = prompt("one")
    streams = []
    for model in models:
        streams.append(Collector())
        generate(model, inputs, max_new_tokens=NEW, streamer=streams[-1], **GREEDY)
    assert streams[0].ended and streams[1].ended
    assert len(streams[0].pieces) == NEW + 1
    assert all(torch.equal(a, b) for a, b in zip(streams[0].pieces, streams[1].pieces, strict=True))


def test_a_streamer_that_raises_leaves_no_trace(models):
    vanilla, ours = models
    inputs = prompt("one")
    with pytest.raises(RuntimeError, match="cancelled"):
        generate(ours, inputs, max_new_tokens=NEW, streamer=Collector(fail_after=4), **GREEDY)
    expected = generate(vanilla, inputs, max_new_tokens=NEW, **GREEDY)
    assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, **GREEDY), expected)


@pytest.mark.parametrize("which", ["models", "compiled"])
@pytest.mark.parametrize("batch", ["one", "padded", "three"])
def test_return_dict(which, batch, request):
    vanilla, ours = request.getfixturevalue(which)
    inputs = prompt(batch)
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = generate(vanilla, inputs, max_new_tokens=NEW, **SAMPLED, **options)
    found = generate(ours, inputs, max_new_tokens=NEW, **SAMPLED, **options)
    assert type(found) is type(expected)
    assert torch.equal(found.sequences, expected.sequences)
    for ours_steps, steps in ((found.scores, expected.scores), (found.logits, expected.logits)):
        assert isinstance(ours_steps, tuple) and len(ours_steps) == NEW
        for a, b in zip(ours_steps, steps, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    assert isinstance(found[CACHE_NAME], DynamicCache)
    real = torch.cat((inputs["attention_mask"], torch.ones(inputs["input_ids"].shape[0], NEW - 1)), 1).bool()
    for ours_layer, layer in zip(found[CACHE_NAME].layers, expected[CACHE_NAME].layers, strict=True):
        for a, b in ((ours_layer.keys, layer.keys), (ours_layer.values, layer.values)):
            assert a.shape == b.shape
            chosen = real[:, None, :, None].expand_as(a)
            torch.testing.assert_close(a[chosen], b[chosen], rtol=1e-4, atol=1e-4)


def test_the_returned_cache_is_a_copy_and_continues(models):
    vanilla, ours = models
    inputs = prompt("padded")
    first = generate(ours, inputs, max_new_tokens=NEW, return_dict_in_generate=True, **GREEDY)
    generate(ours, prompt("padded", seed=9), max_new_tokens=NEW, **GREEDY)  # overwrites the storage
    mask = torch.cat((inputs["attention_mask"], torch.ones(3, NEW, dtype=torch.long)), 1)
    again = {"input_ids": first.sequences, "attention_mask": mask}
    expected = generate(vanilla, again, max_new_tokens=8, **GREEDY)
    for name in CACHE_NAMES[CACHE_NAMES.index(CACHE_NAME) :]:  # a newer transformers still takes the older name
        given = {name: copy.deepcopy(first[CACHE_NAME])}
        found = generate(ours, again, max_new_tokens=8, **given, **GREEDY)
        assert ours.path == "parent: a cache is given"
        assert torch.equal(found, expected)


@pytest.mark.parametrize("chunk", [1, 4, 5, 14, 50])
@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("rope", ["default", "dynamic"])
def test_chunked_prefill_of_transformers(chunk, batch, rope):
    vanilla, ours = pair(rope=rope)
    inputs = prompt(batch, length=40)
    expected = generate(vanilla, inputs, max_new_tokens=NEW, prefill_chunk_size=chunk, **GREEDY)
    found = generate(ours, inputs, max_new_tokens=NEW, prefill_chunk_size=chunk, **GREEDY)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("chunk", [16, 39, 40, 64])
@pytest.mark.parametrize("batch", ["one", "padded", "three"])
@pytest.mark.parametrize("rope", ["default", "dynamic"])
def test_chunked_prefill_of_ours(chunk, batch, rope):
    vanilla, ours = pair(rope=rope)
    inputs = prompt(batch, length=40)
    ours.preallocate(inputs["input_ids"].shape[0], 64, prefill_chunk=chunk)
    expected = generate(vanilla, inputs, max_new_tokens=NEW, **GREEDY)
    assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, **GREEDY), expected)


@pytest.mark.parametrize("which", ["models", "compiled"])
def test_the_same_cache_serves_call_after_call(which, request):
    vanilla, ours = request.getfixturevalue(which)
    for seed, length, batch in ((1, 30, "padded"), (2, 7, "one"), (3, 44, "three"), (4, 12, "padded")):
        inputs = prompt(batch, length, seed)
        expected = generate(vanilla, inputs, max_new_tokens=NEW, **SAMPLED)
        assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, **SAMPLED), expected)


@pytest.mark.parametrize("batch", ["one", "padded"])
def test_inputs_embeds(models, batch):
    vanilla, ours = models
    inputs = prompt(batch)
    embeds = vanilla.model.embed_tokens(inputs["input_ids"]).detach()
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    expected = generate(vanilla, given, max_new_tokens=NEW, **GREEDY)
    found = generate(ours, given, max_new_tokens=NEW, **GREEDY)
    assert ours.path.startswith("preallocated")
    assert torch.equal(found, expected)
    both = {**given, "input_ids": inputs["input_ids"]}
    expected = generate(vanilla, both, max_new_tokens=NEW, **GREEDY)
    assert torch.equal(generate(ours, both, max_new_tokens=NEW, **GREEDY), expected)


def test_masks_with_holes(models):
    vanilla, ours = models
    inputs = prompt("three")
    inputs["attention_mask"][0, [2, 5]] = 0
    inputs["attention_mask"][1, :6] = 0
    inputs["attention_mask"][1, 9] = 0
    expected = generate(vanilla, inputs, max_new_tokens=NEW, **GREEDY)
    assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, **GREEDY), expected)
    assert ours.path.startswith("preallocated")


def test_no_attention_mask(models):
    vanilla, ours = models
    ids = prompt("one")["input_ids"]
    expected = vanilla.generate(ids, max_new_tokens=NEW, **GREEDY)
    assert torch.equal(ours.generate(ids, max_new_tokens=NEW, **GREEDY), expected)


def test_inference_mode(compiled):
    vanilla, ours = compiled
    with torch.inference_mode():
        inputs = prompt("padded")
        expected = generate(vanilla, inputs, max_new_tokens=NEW, **GREEDY)
        assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, **GREEDY), expected)
    inputs = prompt("padded")
    assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, **GREEDY), expected)


PARENTS = {
    "beam search": {"num_beams": 2},
    "early exit": {"assistant_early_exit": 1},
    "static cache of transformers": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "attentions": {"return_dict_in_generate": True, "output_attentions": True},
    "hidden states": {"return_dict_in_generate": True, "output_hidden_states": True},
}


@pytest.mark.parametrize("mode", PARENTS)
def test_what_the_parent_runs_is_equal_and_named(models, mode):
    vanilla, ours = models
    inputs = prompt("one")
    options = {"max_new_tokens": 8, "disable_compile": True, **GREEDY, **PARENTS[mode]}
    expected = generate(vanilla, inputs, **options)
    found = generate(ours, inputs, **options)
    assert ours.path.startswith("parent: ")
    if not isinstance(expected, torch.Tensor):
        expected, found = expected.sequences, found.sequences
    assert torch.equal(found, expected)


def test_training_mode_right_padding_and_autocast_are_the_parents(models):
    vanilla, ours = models
    inputs = prompt("padded")

    def check(given, reason):
        expected = generate(vanilla, given, max_new_tokens=6, **GREEDY)
        assert torch.equal(generate(ours, given, max_new_tokens=6, **GREEDY), expected)
        assert ours.path == f"parent: {reason}"

    for model in models:
        model.train()
    check(inputs, "the model is in training mode")
    for model in models:
        model.eval()
    check({**inputs, "attention_mask": inputs["attention_mask"].flip(1)}, "padding on the right")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(inputs, "autocast is on")
    positions = torch.arange(14)[None].expand(3, -1) + 3
    check({**prompt("three"), "position_ids": positions}, "custom position_ids")
    handles = [model.model.layers[0].mlp.register_forward_hook(lambda *args: args[2] * 2) for model in models]
    check(inputs, "a module carries a forward hook")
    for handle in handles:
        handle.remove()


def test_a_call_within_a_call_is_the_parents(models):
    _, ours = models
    inputs = prompt("one")
    inner = []

    class Nested(LogitsProcessor):
        def __init__(self, model):
            self.model = model

        def __call__(self, input_ids, scores):
            inner.append((generate(self.model, prompt("one", 9, seed=8), max_new_tokens=5, **GREEDY), self.model))
            return scores

    outputs = [
        generate(model, inputs, max_new_tokens=4, logits_processor=LogitsProcessorList([Nested(model)]), **GREEDY)
        for model in models
    ]
    assert torch.equal(*outputs)
    texts = [text for text, _ in inner]
    assert len(texts) == 8 and all(torch.equal(text, texts[0]) for text in texts)
    generate(ours, inputs, max_new_tokens=4, **GREEDY)
    assert ours.path.startswith("preallocated")


def test_criteria_are_asked_before_the_streamer_is_told(models):
    inputs = prompt("one")
    orders = []
    for model in models:
        seen = []

        class Told(Collector):
            def put(self, value, seen=seen):
                seen.append("streamer")

        class Asked(StoppingCriteria):
            def __call__(self, input_ids, scores, seen=seen, **kwargs):
                seen.append("criterion")
                return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        criteria = StoppingCriteriaList([Asked()])
        generate(model, inputs, max_new_tokens=3, streamer=Told(), stopping_criteria=criteria, **GREEDY)
        orders.append(seen)
    assert orders[0] == orders[1] and len(orders[0]) == 7


@pytest.mark.parametrize("lag", [1, 2, 5])
@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("step", [0, 1, 6, NEW - 1, None])
def test_stop_checks_behind_the_work_take_surplus_steps_back(lag, decoding, step, batch, monkeypatch):
    """What an accelerator does, on a CPU: ids, scores, cache and random state are as if each step were checked."""
    vanilla, ours = pair()
    inputs = prompt(batch)
    eos = -1
    if step is not None:
        # Each row has an end of its own, at this step at the latest.
        eos = generate(vanilla, inputs, max_new_tokens=NEW, **decoding)[:, 14 + step].unique().tolist()
    options = {"max_new_tokens": NEW, "eos_token_id": eos, "pad_token_id": 0, "return_dict_in_generate": True}
    options = {**options, "output_scores": True, **decoding}
    expected = generate(vanilla, inputs, **options)
    state = torch.get_rng_state()

    def lagging(*args, **kwargs):
        return sample_loop(*args, **kwargs, lag=lag)

    monkeypatch.setattr(fastllama.llama, "sample_loop", lagging)
    found = generate(ours, inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.scores) == len(expected.scores)
    assert found[CACHE_NAME].get_seq_length() == expected[CACHE_NAME].get_seq_length()
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unbounded_call_grows_an_implicit_cache(models):
    vanilla, ours = models
    ours.free()
    inputs = prompt("padded")
    criteria = StoppingCriteriaList([StopAt([300, 280, 290], 14)])
    options = {"stopping_criteria": criteria, "pad_token_id": 0, **GREEDY}

    def endless(*args, **kwargs):
        kept = StoppingCriteriaList(criterion for criterion in args[4] if isinstance(criterion, StopAt))
        return sample_loop(*args[:4], kept, *args[5:], **kwargs)

    original = fastllama.llama.sample_loop
    fastllama.llama.sample_loop = endless
    try:
        found = generate(ours, inputs, max_new_tokens=2, **options)
    finally:
        fastllama.llama.sample_loop = original
    assert torch.equal(found, generate(vanilla, inputs, max_new_tokens=400, **options))
