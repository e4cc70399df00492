"""Sampling in generate: on the fast path and, as a processor, in transformers' own; per-row seeds; mirostat's state."""

import inspect

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.utils import GenerationMixin

import fastllama
from fastllama import Sampling, SamplingProcessor
from fastllama.decode.loop import sample_loop
from fastllama.decode.sampling.processor import StatelessSamplingProcessor
from fastllama.decode.stop import lag_for
from tests.plain_sampling import LlamaCpp
from tests.tiny import generate, pair, prompt

NEW = 16
# Ours, and the same in the parent's words.
BOTH_KNOW = {
    "plain": ({}, {}),
    "temperature": ({"temperature": 0.7}, {"temperature": 0.7}),
    "top_k": ({"top_k": 12}, {"top_k": 12}),
    "top_p": ({"top_p": 0.8}, {"top_p": 0.8}),
    "min_p": ({"min_p": 0.1}, {"min_p": 0.1}),
    "typical": ({"typical_p": 0.8}, {"typical_p": 0.8}),
    "repeat": ({"repeat_penalty": 1.4}, {"repetition_penalty": 1.4}),
    "filters": (
        {"temperature": 1.3, "top_k": 60, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9},
        {"temperature": 1.3, "top_k": 60, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9},
    ),
    "all": (
        {"temperature": 1.3, "top_k": 60, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9, "repeat_penalty": 1.2},
        {"temperature": 1.3, "top_k": 60, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9, "repetition_penalty": 1.2},
    ),
}
OURS_ALONE = {
    "llama.cpp": Sampling.llama_cpp(repeat_penalty=1.3, frequency_penalty=0.1),
    "tail-free": Sampling(tfs_z=0.9),
    "mirostat 1": Sampling(mirostat=1, mirostat_tau=4.0),
    "mirostat 2": Sampling(mirostat=2, mirostat_tau=4.0, mirostat_eta=0.3),
    "seeds": Sampling(temperature=1.5, top_k=50, seed=3),
    "mirostat and seeds": Sampling(mirostat=2, mirostat_tau=4.0, seed=3, repeat_penalty=1.1),
    "cold": Sampling(temperature=0, repeat_penalty=1.5),
}


# Older versions of transformers penalise the padding too.
_PARENT_SEES_PADDING = "padding_lengths" not in inspect.getsource(GenerationMixin._get_logits_processor)


@pytest.fixture(scope="module")
def models():
    return pair()


@pytest.fixture(scope="module")
def compiled():
    vanilla, ours = pair()
    ours.preallocate(3, 64, compile="static")
    return vanilla, ours


@pytest.fixture(scope="module")
def native():
    vanilla, ours = pair()
    ours.preallocate(3, 64, compile="native")
    return vanilla, ours


def as_processor(sampling, inputs):
    """The parent's arguments with which a processor decides alone."""
    processors = LogitsProcessorList([SamplingProcessor(sampling, inputs["attention_mask"])])
    return {"logits_processor": processors, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


@pytest.mark.parametrize("batch", ["one", "padded", "three"])
@pytest.mark.parametrize("kind", BOTH_KNOW)
def test_what_both_know_is_vanillas_seed_for_seed(models, kind, batch):
    vanilla, ours = models
    inputs, (options, parents) = prompt(batch), BOTH_KNOW[kind]
    if _PARENT_SEES_PADDING and batch == "padded" and "repeat_penalty" in options:
        pytest.skip("this version of transformers penalises padding")
    expected = generate(vanilla, inputs, max_new_tokens=NEW, do_sample=True, **{"top_k": 0, **parents})
    assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, sampling=Sampling(**options)), expected)
    assert ours.path.startswith("preallocated")
    processed = generate(vanilla, inputs, max_new_tokens=NEW, **as_processor(Sampling(**options), inputs))
    assert torch.equal(processed, expected)


@pytest.mark.parametrize("which", ["compiled", "native"])
@pytest.mark.parametrize("batch", ["one", "padded", "three"])
def test_compiled_steps_draw_the_same(which, batch, request):
    vanilla, ours = request.getfixturevalue(which)
    inputs, (options, parents) = prompt(batch), BOTH_KNOW["filters"]
    expected = generate(vanilla, inputs, max_new_tokens=NEW, do_sample=True, **parents)
    assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, sampling=Sampling(**options)), expected)


def test_changed_values_compile_nothing(compiled):
    inputs = prompt("padded")
    generate(compiled[1], inputs, max_new_tokens=NEW, sampling=Sampling(top_k=5))
    with torch.compiler.set_stance("fail_on_recompile"):
        for sampling in (Sampling(top_k=9, temperature=[0.5, 1.0, 2.0]), *OURS_ALONE.values()):
            generate(compiled[1], inputs, max_new_tokens=NEW, sampling=sampling)


@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("kind", OURS_ALONE)
def test_the_fast_path_and_a_processor_in_vanilla_agree(models, kind, batch):
    vanilla, ours = models
    inputs, sampling = prompt(batch), OURS_ALONE[kind]
    expected = generate(vanilla, inputs, max_new_tokens=NEW, **as_processor(sampling, inputs))
    assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, sampling=sampling), expected)
    # and as a processor on the fast path, which gives it the mask
    options = as_processor(sampling, inputs) | {"logits_processor": [SamplingProcessor(sampling)]}
    assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, **options), expected)


def test_temperature_0_is_greedy(models):
    vanilla, ours = models
    inputs = prompt("padded")
    expected = generate(vanilla, inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, sampling=Sampling(temperature=0, seed=5)), expected)
    expected = generate(vanilla, inputs, max_new_tokens=NEW, do_sample=False, repetition_penalty=1.5)
    cold = Sampling(temperature=-1.0, repeat_penalty=1.5)
    assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, sampling=cold), expected)


# seeds by row


def rows_of(inputs, rows):
    return {name: tensor[rows] for name, tensor in inputs.items()}


@pytest.mark.parametrize("kind", ["seeds", "mirostat and seeds"])
@pytest.mark.parametrize("batch", ["three", "padded"])
def test_a_rows_text_is_its_text_alone(models, kind, batch):
    inputs, sampling = prompt(batch), OURS_ALONE[kind]
    together = generate(models[1], inputs, max_new_tokens=NEW, sampling=sampling)
    assert len({tuple(row) for row in together[:, -NEW:].tolist()}) == 3
    options = {name: getattr(sampling, name) for name in Sampling.__dataclass_fields__ if name != "seed"}
    for row in range(3):
        alone = Sampling(**options, seed=3 + row)
        found = generate(models[1], rows_of(inputs, [row]), seed=row, max_new_tokens=NEW, sampling=alone)
        assert torch.equal(found[0], together[row])
    mixed = generate(models[1], rows_of(inputs, [2, 0]), max_new_tokens=NEW, sampling=Sampling(**options, seed=(5, 3)))
    assert torch.equal(mixed, together[[2, 0]])


def test_a_row_does_not_see_what_another_is_asked(models):
    inputs = prompt("three")
    first = generate(
        models[1], inputs, max_new_tokens=NEW, sampling=Sampling(seed=8, temperature=[0.9, 0.5, 2.0], top_k=[0, 4, 60])
    )
    second = generate(
        models[1], inputs, max_new_tokens=NEW, sampling=Sampling(seed=8, temperature=[0.9, 1.0, 0.0], top_k=[0, 9, 1])
    )
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


def test_seeds_leave_torchs_generator_alone(models):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    models[1].generate(**prompt("padded"), max_new_tokens=4, sampling=Sampling(seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_several_texts_of_a_prompt_have_seeds_of_their_own(models):
    inputs = prompt("one")
    several = generate(
        models[1], inputs, max_new_tokens=NEW, num_return_sequences=3, sampling=Sampling(seed=7, repeat_penalty=1.1)
    )
    for row in range(3):
        alone = generate(models[1], inputs, max_new_tokens=NEW, sampling=Sampling(seed=7 + row, repeat_penalty=1.1))
        assert torch.equal(alone[0], several[row])


# state


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_is_the_plain_one_token_by_token(version):
    steps, size, tau, eta = 60, 40, (2.0, 3.5), (0.1, 0.6)
    generator = torch.Generator().manual_seed(version)
    sampling = Sampling(mirostat=version, mirostat_tau=tau, mirostat_eta=eta, temperature=(1.0, 1.7), seed=(1, 9))
    processor = SamplingProcessor(sampling)
    ids, mu = torch.zeros(2, 3, dtype=torch.int64), [2 * each for each in tau]
    for _ in range(steps):
        logits = 3 * torch.randn(2, size, generator=generator)
        token = processor(ids, logits).argmax(-1)
        for row in range(2):
            plain = LlamaCpp(logits[row].tolist())
            plain.temperature(sampling.temperature[row])
            getattr(plain, f"mirostat_{version}")(mu[row])
            assert int(token[row]) in {id for _, id in plain.all}
            assert float(processor.mu[row]) == pytest.approx(mu[row], abs=1e-4)
            mu[row] -= eta[row] * (plain.surprise(int(token[row])) - tau[row])
        ids = torch.cat((ids, token[:, None]), 1)


def test_mirostat_holds_the_surprise():
    sampling, steps = Sampling(mirostat=2, mirostat_tau=3.0, mirostat_eta=0.1, seed=0), 400
    processor, generator = SamplingProcessor(sampling), torch.Generator().manual_seed(0)
    ids, surprise = torch.zeros(4, 1, dtype=torch.int64), []
    for _ in range(steps):
        logits = 2 * torch.randn(4, 500, generator=generator)
        token = processor(ids, logits).argmax(-1, keepdim=True)
        surprise.append(-logits.log_softmax(-1).gather(1, token) / torch.log(torch.tensor(2.0)))
        ids = torch.cat((ids, token), 1)
    left = processor.mu  # what is learnt is the mean surprise among the candidates, not among all
    assert 3.0 < float(left.mean()) < 6.0 and 3.0 < float(torch.stack(surprise)[100:].mean()) < 6.0


def test_a_processor_starts_anew_with_each_text(models):
    vanilla, _ = models
    inputs = prompt("one")
    sampling = OURS_ALONE["mirostat and seeds"]
    again = as_processor(sampling, inputs)
    first, second = (generate(vanilla, inputs, max_new_tokens=NEW, **again) for _ in range(2))
    assert torch.equal(first, second)
    # a call that goes on where another ended goes on with its state
    half = generate(vanilla, inputs, max_new_tokens=NEW // 2, **again)
    rest = {"input_ids": half, "attention_mask": torch.ones_like(half)}
    assert torch.equal(generate(vanilla, rest, max_new_tokens=NEW // 2, **again), first)
    again["logits_processor"][0].reset()
    again["logits_processor"][0].mask = None
    assert not torch.equal(generate(vanilla, rest, max_new_tokens=NEW // 2, **again), first)


@pytest.mark.parametrize("lag", [1, 2, 5])
@pytest.mark.parametrize("kind", OURS_ALONE)
def test_surplus_steps_are_taken_back(models, lag, kind, monkeypatch):
    """What an accelerator does, on a CPU: tokens, generator and mirostat's state are as if each step were checked."""
    vanilla, ours = models
    inputs, sampling = prompt("padded"), OURS_ALONE[kind]
    eos = generate(vanilla, inputs, max_new_tokens=NEW, **as_processor(sampling, inputs))[:, 14 + 5].unique().tolist()
    options = {"max_new_tokens": NEW, "eos_token_id": eos, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    processors = []
    found = []
    for each in (0, lag):

        def lagging(*args, each=each, **kwargs):
            return sample_loop(*args, **kwargs, lag=each)

        monkeypatch.setattr(fastllama.llama, "sample_loop", lagging)
        processors.append(SamplingProcessor(sampling))
        found.append(generate(ours, inputs, logits_processor=[processors[-1]], do_sample=True, top_k=0, **options))
        found.append(torch.get_rng_state())
    assert torch.equal(found[0].sequences, found[2].sequences) and torch.equal(found[1], found[3])
    assert found[0].sequences.shape[1] < 14 + NEW and len(found[0].scores) == len(found[2].scores)
    states = [each._state for each in processors]
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_our_processors_may_run_ahead_on_an_accelerator():
    cuda = torch.device("cuda")
    for sampling in OURS_ALONE.values():
        for kind in (StatelessSamplingProcessor, SamplingProcessor):
            assert lag_for(cuda, [kind(sampling)], [], None, False) > 0

    class Own(SamplingProcessor):
        pass

    assert lag_for(cuda, [Own(Sampling())], [], None, False) == 0


# what cannot be combined

REFUSED = [
    ({"temperature": 0.5}, "temperature=0.5 cannot be combined with sampling"),
    ({"top_k": 0}, "top_k=0 cannot be combined with sampling"),
    ({"repetition_penalty": 1.1}, "repetition_penalty=1.1 cannot be combined with sampling"),
    ({"do_sample": False}, "do_sample=False cannot be combined with sampling"),
    ({"num_beams": 3}, "num_beams=3 cannot be combined with sampling"),
    ({"sampling": "greedy"}, "sampling='greedy' is not allowed"),
    ({"sampling": Sampling(top_k=[1, 2])}, "are for 2 rows, and the call has 3"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_contradictions_are_refused_by_name(models, arguments, words):
    with pytest.raises(ValueError, match=words):
        models[1].generate(**prompt("three"), max_new_tokens=2, **{"sampling": Sampling(top_k=5), **arguments})


def test_sampling_goes_before_generation_configs(models):
    vanilla, ours = models
    inputs = prompt("one")
    sampling, parents = Sampling(top_k=7), {"do_sample": True, "top_k": 7}
    expected = generate(vanilla, inputs, max_new_tokens=NEW, **parents)
    saved = ours.generation_config
    ours.generation_config = GenerationConfig(
        temperature=0.2, min_p=0.9, repetition_penalty=5.0, do_sample=True, pad_token_id=0, bos_token_id=1
    )
    try:
        assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, sampling=sampling), expected)
        config = GenerationConfig(max_new_tokens=NEW, temperature=0.4, top_p=0.3, pad_token_id=0)
        torch.manual_seed(5)
        found = ours.generate(inputs["input_ids"], config, attention_mask=inputs["attention_mask"], sampling=sampling)
        assert torch.equal(found, expected) and config.temperature == 0.4
    finally:
        ours.generation_config = saved


def test_the_parents_path_samples_alike(models):
    ours = models[1]
    inputs, sampling = prompt("padded"), OURS_ALONE["llama.cpp"]
    expected = generate(ours, inputs, max_new_tokens=NEW, sampling=sampling)
    found = generate(ours, inputs, max_new_tokens=NEW, sampling=sampling, use_cache=False)
    assert ours.path.startswith("parent") and torch.equal(found, expected)


def test_embeddings_have_no_ids_to_penalise(models):
    vanilla, ours = models
    inputs = prompt("padded")
    embeds = {"inputs_embeds": vanilla.model.embed_tokens(inputs["input_ids"]).detach()}
    embeds["attention_mask"] = inputs["attention_mask"]
    sampling = Sampling(repeat_penalty=1.5, seed=2)
    found = generate(ours, embeds, max_new_tokens=NEW + 10, sampling=sampling)
    processors = [SamplingProcessor(sampling)]
    expected = generate(vanilla, embeds, max_new_tokens=NEW + 10, logits_processor=processors, do_sample=True, top_k=0)
    assert torch.equal(found, expected)


# assistance

PROPOSING = {"prompt_lookup_num_tokens": 4}


@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize("kind", ["llama.cpp", "tail-free"])
def test_stateless_sampling_works_with_assistance(models, kind, batch):
    vanilla, ours = models
    inputs = prompt(batch)
    found = generate(ours, inputs, max_new_tokens=NEW, sampling=OURS_ALONE[kind], **PROPOSING)
    assert ours.path.startswith("preallocated") and found.shape[1] == 14 + NEW
    # with the best token alone left, it is deterministic: equal without assistance
    best = Sampling.llama_cpp(top_k=1, repeat_penalty=1.3, repeat_last_n=5)
    expected = generate(vanilla, inputs, max_new_tokens=NEW, **as_processor(best, inputs))
    for proposing in (PROPOSING, {"assistant_model": vanilla, "num_assistant_tokens": 3}):
        assert torch.equal(generate(ours, inputs, max_new_tokens=NEW, sampling=best, **proposing), expected)
        assert ours.path.startswith("preallocated")


@pytest.mark.parametrize("kind", ["mirostat 1", "seeds", "mirostat and seeds"])
def test_stateful_sampling_works_with_assistance_in_one_row(models, kind):
    inputs, sampling = prompt("one"), OURS_ALONE[kind]
    expected = generate(models[1], inputs, max_new_tokens=NEW, sampling=sampling)
    assert torch.equal(generate(models[1], inputs, max_new_tokens=NEW, sampling=sampling, **PROPOSING), expected)
    with pytest.raises(ValueError, match="mirostat and seeds by row cannot be combined with assisted generation here"):
        generate(models[1], prompt("three"), max_new_tokens=NEW, sampling=sampling, **PROPOSING)
