"""generate_many: continuous batching, equal to one prompt at a time."""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

import fastllama
from fastllama.cache.rows import clear_row, copy_row, part_of
from fastllama.decode import reservation
from fastllama.decode.many import slots as slots_file
from fastllama.decode.many.prompts import shared
from fastllama.lab.measuring.parity import output_hash
from tests import small, tiny

LENGTHS = (3, 40, 17, 9, 60, 1, 25, 33, 12, 5)
LIMITS = [10, 3, 20, 1, 15, 30, 8, 12, 2, 25]
POSITIONS = 96


@pytest.fixture(scope="module")
def models():
    return tiny.pair(max_position_embeddings=256)


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, tiny.VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [random_ids(length, seed) for seed, length in enumerate(LENGTHS)]


def alone(model, prompt: list[int], limit: int | None, **arguments) -> list[int]:
    """The new ids of one prompt by `generate`."""
    arguments = ({} if limit is None else {"max_new_tokens": limit}) | {"do_sample": False} | arguments
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)[0, len(prompt) :].tolist()


def all_alone(model, prompts=PROMPTS, limits=LIMITS, **arguments) -> list[list[int]]:
    return [alone(model, prompt, limit, **arguments) for prompt, limit in zip(prompts, limits, strict=True)]


def hashes(rows) -> list[str]:
    return [output_hash(torch.tensor([list(row)])) for row in rows]


def ids_of(results) -> list[tuple[int, ...]]:
    assert [result.index for result in results] == list(range(len(results)))
    assert all(result.error is None for result in results)
    return [result.ids for result in results]


# equal to one by one


@pytest.mark.parametrize("compile", [None, "no", "native"])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
def test_every_prompt_is_what_it_is_alone(models, compile, slots):
    vanilla, ours = models
    expected = hashes(all_alone(vanilla))
    ours.free()
    if compile is not None:
        ours.preallocate(8, POSITIONS, compile=compile)
    for chunk in (16, None):
        results = ours.generate_many(PROMPTS, slots=slots, max_new_tokens=LIMITS, chunk=chunk, do_sample=False)
        assert hashes(ids_of(results)) == expected
        assert [result.finish for result in results] == ["length"] * len(PROMPTS)
        assert [result.prompt_tokens for result in results] == list(LENGTHS)
        assert [result.new_tokens for result in results] == LIMITS
    assert ours.path.endswith(f", {slots} slots")


def test_a_compiled_step_runs_all_rows_and_compiles_once():
    vanilla, ours = tiny.pair(max_position_embeddings=256)
    ours.preallocate(4, POSITIONS, compile="static")
    expected = all_alone(vanilla)
    made = ours._engine.reallocations
    with torch.compiler.set_stance("fail_on_recompile"):
        for slots in (4, 2):
            results = ours.generate_many(PROMPTS, slots=slots, max_new_tokens=LIMITS, chunk=16)
            assert hashes(ids_of(results)) == hashes(expected)
    assert ours._engine.reallocations == made


@pytest.mark.parametrize("switches", [{"compile": "native"}, {"products": "stock"}])
def test_small_caches_give_what_they_give_alone(models, switches):
    ours = models[1]
    ours.preallocate(3, POSITIONS, cache_k="int8", cache_v="int8", **switches)
    expected = all_alone(ours)
    results = ours.generate_many(PROMPTS, max_new_tokens=LIMITS, chunk=16)
    assert hashes(ids_of(results)) == hashes(expected)
    ours.free()


def test_small_weights_give_what_they_give_alone(tmp_path):
    ours = small.load(small.write(tmp_path, max_position_embeddings=256), "int8")
    expected = all_alone(ours)
    assert hashes(ids_of(ours.generate_many(PROMPTS, slots=3, max_new_tokens=LIMITS))) == hashes(expected)


def test_an_end_of_text_ends_its_row_alone(models):
    vanilla, ours = models
    ours.preallocate(3, POSITIONS)
    plain = all_alone(vanilla)
    eos = [plain[2][4], plain[5][7]]
    expected = all_alone(vanilla, eos_token_id=eos, pad_token_id=0)
    results = ours.generate_many(PROMPTS, max_new_tokens=LIMITS, eos_token_id=eos, pad_token_id=0)
    assert hashes(ids_of(results)) == hashes(expected)
    for result, limit in zip(results, LIMITS, strict=True):
        ended = result.ids[-1] in eos
        assert result.finish == ("eos" if ended else "length")
        assert ended or result.new_tokens == limit
    assert {"eos", "length"} == {result.finish for result in results}


PROCESSED = {
    "repetition_penalty": {"repetition_penalty": 1.5},
    "no_repeat_ngram": {"no_repeat_ngram_size": 1},
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": list(range(3, 200)), "pad_token_id": 0},
    "min_length": {"min_length": 30, "eos_token_id": list(range(3, 200)), "pad_token_id": 0},
    "suppress": {"suppress_tokens": list(range(3, 200))},
    "max_length": {"max_length": 70, "max_new_tokens": None},
    "default length": {"max_new_tokens": None},
}


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize("name", PROCESSED)
def test_processors_see_each_row_alone(models, name):
    vanilla, ours = models
    ours.preallocate(3, 128)
    arguments = dict(PROCESSED[name])
    limits = [None] * len(PROMPTS) if "max_new_tokens" in arguments else LIMITS
    arguments.pop("max_new_tokens", None)
    expected = all_alone(vanilla, limits=limits, **arguments)
    many = None if limits[0] is None else limits
    assert hashes(ids_of(ours.generate_many(PROMPTS, max_new_tokens=many, **arguments))) == hashes(expected)
    if many is not None:
        config = GenerationConfig(do_sample=False, **arguments)
        assert hashes(ids_of(ours.generate_many(PROMPTS, None, many, config))) == hashes(expected)


class AddToOne(LogitsProcessor):
    """Favours a token by the text's length."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, input_ids.shape[1] * 7 % tiny.VOCAB] += 9.0
        return scores


class StopAtSum(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.sum(1) % 5 == 0


def test_the_callers_own_processor_and_criterion(models):
    vanilla, ours = models
    ours.preallocate(3, POSITIONS)
    own = {"logits_processor": [AddToOne()], "stopping_criteria": [StopAtSum()]}
    expected = all_alone(vanilla, **own)
    results = ours.generate_many(PROMPTS, max_new_tokens=LIMITS, **own)
    assert hashes(ids_of(results)) == hashes(expected)
    assert {result.finish for result in results} == {"stop", "length"}


def test_stop_strings(models, demo_tokenizer):
    vanilla, ours = models
    words = {"stop_strings": ["e", "r"], "tokenizer": demo_tokenizer}
    expected = all_alone(vanilla, **words)
    results = ours.generate_many(PROMPTS, 3, LIMITS, **words)
    assert hashes(ids_of(results)) == hashes(expected)
    assert "stop" in {result.finish for result in results}
    config = GenerationConfig(stop_strings=["e", "r"])
    assert hashes(ids_of(ours.generate_many(PROMPTS, 3, LIMITS, config, tokenizer=demo_tokenizer))) == hashes(expected)


def test_one_slot_draws_as_calls_one_after_the_other(models):
    vanilla, ours = models
    torch.manual_seed(11)
    expected = all_alone(vanilla, **tiny.SAMPLED)
    torch.manual_seed(11)
    assert hashes(ids_of(ours.generate_many(PROMPTS, 1, LIMITS, **tiny.SAMPLED))) == hashes(expected)


SAMPLINGS = {
    "seeds": fastllama.Sampling(temperature=0.9, top_k=20, seed=7),
    "mirostat": fastllama.Sampling.llama_cpp(mirostat=2, mirostat_tau=3.0, repeat_penalty=1.3, seed=7),
    "by prompt": fastllama.Sampling(temperature=[0.0, 1.5] * 5, presence_penalty=1.0, seed=tuple(range(10))),
    "greedy": fastllama.Sampling(temperature=0.0, frequency_penalty=2.0),
}


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_seeded_text_is_its_own_whatever_runs_beside_it(models, name, slots):
    _, ours = models
    ours.free()
    sampling = SAMPLINGS[name]
    expected = [
        alone(ours, prompt, limit, do_sample=None, sampling=sampling.of_row(row))
        for row, (prompt, limit) in enumerate(zip(PROMPTS, LIMITS, strict=True))
    ]
    results = ours.generate_many(PROMPTS, slots=slots, max_new_tokens=LIMITS, sampling=sampling)
    assert hashes(ids_of(results)) == hashes(expected)
    config = GenerationConfig(eos_token_id=ours.generation_config.eos_token_id, top_k=5)
    results = ours.generate_many(PROMPTS, slots, LIMITS, config, sampling=sampling)  # sampling goes before a config
    assert hashes(ids_of(results)) == hashes(expected)


@pytest.mark.parametrize("order", [[0.0, 100.0], [100.0, 0.0]])
def test_cold_rows_take_the_best_among_rows_that_draw(models, order):
    vanilla, ours = models
    ours.free()
    torch.manual_seed(0)
    sampling = fastllama.Sampling(temperature=order * 5)  # no seed: torch's generator
    results = ids_of(ours.generate_many(PROMPTS, slots=4, max_new_tokens=LIMITS, sampling=sampling))
    same = [found == tuple(best) for found, best in zip(results, all_alone(vanilla), strict=True)]
    long = [row for row, limit in enumerate(LIMITS) if limit > 3]
    assert all(same[row] for row in range(10) if order[row % 2] == 0)
    assert not any(same[row] for row in long if order[row % 2] > 0)


def test_options_by_prompt_reach_their_own_rows(models):
    vanilla, ours = models
    ours.free()
    torch.manual_seed(0)
    sampling = fastllama.Sampling(temperature=100.0, top_k=[1, 0] * 5)
    results = ids_of(ours.generate_many(PROMPTS, slots=4, max_new_tokens=LIMITS, sampling=sampling))
    same = [found == tuple(best) for found, best in zip(results, all_alone(vanilla), strict=True)]
    assert all(same[::2]) and not any(same[row] for row in (5, 7, 9))


@pytest.mark.parametrize("switches", [{"context_shift": True}, {"grp_attn_n": 2, "grp_attn_w": 16}])
def test_a_context_that_moves_is_refused(models, switches):
    ours = models[1]
    ours.preallocate(2, POSITIONS, **switches)
    with pytest.raises(ValueError, match=f"{next(iter(switches))}=.* cannot be honoured in generate_many"):
        ours.generate_many(PROMPTS, max_new_tokens=4)
    ours.free()


def test_sampling_is_for_as_many_prompts_as_there_are(models):
    with pytest.raises(ValueError, match="options for 2 rows, and there are 10 prompts"):
        models[1].generate_many(PROMPTS, max_new_tokens=4, sampling=fastllama.Sampling(top_k=[1, 2]))
    with pytest.raises(ValueError, match=r"temperature=1\.5 cannot be combined with sampling"):
        models[1].generate_many(PROMPTS, max_new_tokens=4, temperature=1.5, sampling=fastllama.Sampling())


def test_what_all_prompts_begin_with_is_computed_once(models, monkeypatch):
    vanilla, ours = models
    begin = random_ids(40, 99)
    prompts = [begin + prompt for prompt in PROMPTS]
    ours.preallocate(4, 140)
    prefilled = []
    original = slots_file.prefill_chunk

    def spy(weights, part, hidden, *rest):
        prefilled.append(hidden.shape[0] * hidden.shape[1])
        return original(weights, part, hidden, *rest)

    monkeypatch.setattr(slots_file, "prefill_chunk", spy)
    expected = all_alone(vanilla, prompts)
    for compile in ("no", "native"):
        ours.preallocate(4, 140, compile=compile)
        prefilled.clear()
        assert hashes(ids_of(ours.generate_many(prompts, max_new_tokens=LIMITS, chunk=16))) == hashes(expected)
        assert sum(prefilled) <= 40 + sum(LENGTHS) / 0.75
        prefilled.clear()
        results = ours.generate_many(prompts, max_new_tokens=LIMITS, chunk=16, shared_prefix=None)
        assert hashes(ids_of(results)) == hashes(expected)
        assert sum(prefilled) >= 40 * len(prompts) + sum(LENGTHS)


def test_the_last_token_of_a_prompt_is_never_shared():
    assert shared([[1, 2, 3], [1, 2, 3]], 1) == 2
    assert shared([[1, 2, 3, 4], [1, 2], [1, 2, 9]], 1) == 1
    assert shared([[1, 2, 3], [1, 2, 4]], 3) == 0
    assert shared([[1, 2, 3]], 1) == 0 and shared([[1, 2], [1, 2]], None) == 0


def test_rows_that_run_out_of_prompts_are_not_stepped(models, monkeypatch):
    ours = models[1]
    ours.preallocate(4, POSITIONS)
    widths = []
    original = slots_file.Slots._narrow_step

    def spy(self, ids, used):
        widths.append(len(ids))
        return original(self, ids, used)

    monkeypatch.setattr(slots_file.Slots, "_narrow_step", spy)
    limits = [30, 2, 2, 2, 20, 10]
    expected = all_alone(ours, PROMPTS[:6], limits)
    assert hashes(ids_of(ours.generate_many(PROMPTS[:6], max_new_tokens=limits))) == hashes(expected)
    assert widths[0] == 4 and widths[-1] == 1
    assert sum(widths) <= sum(limits)  # a token each, but for a first one, which comes of the prompt


def test_running_rows_move_while_a_long_prompt_is_read(models):
    ours = models[1]
    ours.preallocate(2, 256)
    order = []
    prompts, limits = [random_ids(5, 1), random_ids(5, 2), random_ids(200, 3)], [12, 3, 2]
    results = ours.generate_many(
        prompts, max_new_tokens=limits, chunk=16, on_result=lambda index, result: order.append(index)
    )
    # 13 passes of the third prompt: the first one's 12 tokens are written meanwhile.
    assert order == [1, 0, 2]
    assert hashes(ids_of(results)) == hashes(all_alone(ours, prompts, limits))


def test_an_implicit_cache_grows(models, monkeypatch):
    vanilla, ours = models
    monkeypatch.setattr(reservation, "_AHEAD", 4)
    monkeypatch.setattr(reservation, "_ROUNDING", 8)
    ours.free()
    prompts, limits = [random_ids(length, length) for length in (5, 7, 9)], [60, 40, 50]
    expected = all_alone(vanilla, prompts, limits)
    assert hashes(ids_of(ours.generate_many(prompts, 2, limits))) == hashes(expected)
    assert ours._engine.cache.shape.cache_length >= 64
    ours.free()


def test_parts_of_a_cache_are_the_same_memory(models):
    ours = models[1]
    for formats in ({}, {"cache_k": "int8", "cache_v": "int8"}):
        ours.preallocate(3, POSITIONS, **formats)
        ours.prefill(torch.tensor([PROMPTS[1]] * 3))
        cache = ours._engine.cache
        part = part_of(cache, 1, 2)
        part.set_valid_past(torch.tensor([4, 7]))
        assert cache.valid_past_index.tolist() == [40, 4, 7] and part.shape.batch_size == 2
        before = cache.floats(1, 3, 40)
        clear_row(cache, 2, 10, 40)
        for kept, now in zip(before, cache.floats(1, 3, 40), strict=True):
            assert torch.equal(now[:2], kept[:2]) and torch.equal(now[2, :, :10], kept[2, :, :10])
            assert not now[2, :, 10:].any()
        copy_row(cache, 0, 2, 30)
        for now in cache.floats(0, 3, 40):
            assert torch.equal(now[2, :, :30], now[0, :, :30])
    ours.free()


def test_an_overflow_reaches_no_later_prompt(models, monkeypatch):
    vanilla, ours = models
    ours.preallocate(1, POSITIONS)
    original = slots_file.Slots.release

    def release(self, slot):
        self.cache.values[0][slot, :, : self.written[slot]] = float("nan")  # as a row in fp16 may leave it
        original(self, slot)

    monkeypatch.setattr(slots_file.Slots, "release", release)
    assert hashes(ids_of(ours.generate_many(PROMPTS, max_new_tokens=LIMITS))) == hashes(all_alone(vanilla))


# what cannot be


def test_a_prompt_that_cannot_run_is_an_error_and_the_others_go_on(models):
    vanilla, ours = models
    ours.preallocate(2, 64)
    good, told = PROMPTS[2], []
    prompts = [[], good, random_ids(60, 1), [3, tiny.VOCAB], "text", [1.5], torch.zeros(2, 2), 7, torch.tensor(good)]
    results = ours.generate_many(prompts, max_new_tokens=6, on_result=lambda index, result: told.append(result))
    says = [
        "the prompt is empty",
        None,
        "60 prompt and 6 new tokens need 65 cache positions, and preallocate() reserved 64",
        f"token id {tiny.VOCAB} is outside the vocabulary of {tiny.VOCAB}",
        "the prompt is text and not token ids: tokenise it first",
        "the prompt holds 1.5, which is no token id",
        "the prompt is a tensor [2, 2] of torch.float32 and not one of ids in one dimension",
        "the prompt is a int and not a list of token ids",
        None,
    ]
    assert [result.error for result in results] == says
    assert [result.finish == "error" for result in results] == [word is not None for word in says]
    assert list(results[1].ids) == list(results[8].ids) == alone(vanilla, good, 6)
    assert sorted(result.index for result in told) == list(range(9)) and told[0].index == 0
    assert all(result == results[result.index] for result in told)
    assert [result.error for result in ours.generate_many([good, []], max_length=10)] == [
        "Input length of input_ids is 17, but `max_length` is set to 10. This can lead to unexpected behavior. You "
        "should consider increasing `max_length` or, better yet, setting `max_new_tokens`.",
        "the prompt is empty",
    ]
    assert ours.generate_many([]) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompts": "text"}, "prompts is a str and not a list of prompts"),
        ({"prompts": 5}, "prompts is a int and not a list"),
        ({"slots": 0}, "slots=0 is not allowed; allowed: None or an integer >= 1"),
        ({"slots": 3}, r"this call needs 3 x \d+ cache positions and preallocate\(\) reserved 2 x"),
        ({"chunk": 8}, "chunk=8 is not allowed; allowed: None or an integer >= 16"),
        ({"shared_prefix": 0}, "shared_prefix=0 is not allowed"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is not allowed"),
        ({"max_new_tokens": "4"}, "max_new_tokens='4' is not allowed"),
        ({"max_new_tokens": [1, 2]}, "max_new_tokens has 2 numbers for 10 prompts"),
        ({"num_beams": 2}, "cannot run: the decoding mode is beam search"),
        ({"prompt_lookup_num_tokens": 2}, "cannot run: the decoding mode is assisted generation"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences is 2"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate is on"),
        ({"use_cache": False}, "use_cache is off"),
        ({"streamer": object()}, "streamer is for one prompt at a time"),
        ({"stop_strings": ["a"]}, "stop_strings need the model's tokenizer"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_what_is_refused_before_any_work(models, arguments, says):
    ours = models[1]
    ours.preallocate(2, POSITIONS)
    with pytest.raises(ValueError, match=says):
        ours.generate_many(**({"prompts": PROMPTS, "max_new_tokens": 4} | arguments))
    assert ours.generate_many([PROMPTS[0]], max_new_tokens=2)[0].new_tokens == 2


def test_models_that_only_the_parent_runs_are_refused(models):
    ours = models[1]
    ours.train()
    with pytest.raises(ValueError, match="generate_many cannot run: the model is in training mode"):
        ours.generate_many(PROMPTS, max_new_tokens=2)
    ours.eval()
    dynamic = tiny.pair(rope="dynamic")[1]
    with pytest.raises(ValueError, match="rope_type 'dynamic' depends on the longest position of all rows"):
        dynamic.generate_many(PROMPTS, max_new_tokens=2)


def test_a_cache_in_use_is_refused_and_an_interruption_leaves_the_model_usable(models):
    vanilla, ours = models
    ours.preallocate(2, POSITIONS, compile="native")

    def inside(index, result):
        with pytest.raises(ValueError, match="another call is using the cache"):
            ours.generate_many(PROMPTS)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ours.generate_many(PROMPTS, max_new_tokens=LIMITS, on_result=inside)
    with pytest.raises(ValueError, match="continues a prefill"):
        ours.step(torch.tensor([[5]]))
    assert alone(ours, PROMPTS[1], 20) == alone(vanilla, PROMPTS[1], 20)
    assert "native step" in ours.path
    assert hashes(ids_of(ours.generate_many(PROMPTS, max_new_tokens=LIMITS))) == hashes(all_alone(vanilla))


def test_results_are_frozen_and_exported(models):
    result = models[1].generate_many([PROMPTS[0]], max_new_tokens=2)[0]
    assert isinstance(result, fastllama.Generated)
    with pytest.raises(AttributeError):
        result.finish = "eos"
