"""Context shift: against a plain model that drops, turns and appends by hand."""

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

import fastllama
from fastllama.cache import moving
from fastllama.decode.cache_name import CACHE_NAME
from fastllama.decode.loop import sample_loop
from fastllama.kernels import native
from fastllama.kernels.blocks import FORMATS
from fastllama.kernels.rope import turn, turns
from fastllama.kernels.stored_attention import native_obstacle
from fastllama.model.compiled import graphs
from tests.plain_context import assert_row_as_by_hand, rows_of, shifted, turned
from tests.tiny import GREEDY, SAMPLED, VOCAB, config, generate, pair, prompt

LENGTH = 24


def preallocated(model, rows: int = 1, length: int = LENGTH, keep: int = 4, **switches):
    model.preallocate(rows, length, context_shift=True, keep=keep, **switches)
    return model


def assert_as_by_hand(vanilla, ours, inputs: dict, new: int, keeps: list[int], bound: float = 2e-5, **formats) -> None:
    """Greedy ids, logits and the words of `path`."""
    width = inputs["input_ids"].shape[1]
    out = generate(ours, inputs, max_new_tokens=new, return_dict_in_generate=True, output_logits=True, **GREEDY)
    length, times = ours._engine.cache.shape.cache_length, []
    for row, (ids, keep) in enumerate(zip(rows_of(inputs), keeps, strict=True)):
        found = out.sequences[row, width:].tolist()
        _, logits, plain = shifted(vanilla, ids, new, length, keep, forced=found, **formats)
        ours_NV = torch.stack([step[row] for step in out.logits])
        assert_row_as_by_hand(found, ours_NV, logits, bound, exact=not formats)
        assert len(plain.kept) == ours.valid_past_index[row]
        times.append(plain.shifts)
    assert min(times) > 0
    count = f"{max(times)}" if min(times) == max(times) else f"{min(times)} to {max(times)}"
    assert ours.path.endswith(f"context shifted {count} {'time' if max(times) == 1 else 'times'}")


@pytest.mark.parametrize("compile", ["no", "native"])
@pytest.mark.parametrize("batch", ["one", "padded", "three"])
@pytest.mark.parametrize("keep", [0, 4, -1, 100])
def test_text_and_logits_are_those_of_the_plain_model(keep, batch, compile):
    if compile == "native" and native.load() is not None:
        pytest.skip(native.load())
    vanilla, ours = pair()
    inputs = prompt(batch)
    rows = rows_of(inputs)
    preallocated(ours, len(rows), keep=keep, compile=compile)
    keeps = [min(keep, len(row)) if keep >= 0 else len(row) for row in rows]
    assert_as_by_hand(vanilla, ours, inputs, 60, keeps)


@pytest.mark.parametrize("rope", ["llama3", "linear", "yarn"])
def test_every_rope_type_whose_frequencies_stay(rope):
    vanilla, ours = pair(rope=rope)
    assert_as_by_hand(vanilla, preallocated(ours, 3), prompt("padded"), 40, [4, 4, 2])


def test_the_token_that_begins_a_text_is_kept_beside_keep():
    vanilla, ours = pair()
    inputs = prompt("three")
    inputs["input_ids"][1:, 0] = vanilla.config.bos_token_id
    assert_as_by_hand(vanilla, preallocated(ours, 3, keep=2), inputs, 40, [2, 3, 3])
    embedded = {"inputs_embeds": vanilla.model.embed_tokens(inputs["input_ids"])}
    ours.generate(**embedded, max_new_tokens=40, **GREEDY)  # of which nobody knows what begins it
    assert ours._engine.context.keeps == [2, 2, 2]


def test_the_demo_writes_on():
    from fastllama.demo.names import demo_folder

    vanilla = transformers.LlamaForCausalLM.from_pretrained(demo_folder("target"), dtype=torch.float32).eval()
    ours = fastllama.LlamaForCausalLM.from_pretrained(demo_folder("target"), dtype=torch.float32).eval()
    ids = torch.randint(5, 4000, (1, 30), generator=torch.Generator().manual_seed(3))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    preallocated(ours, length=48)
    found = generate(ours, inputs, max_new_tokens=100, eos_token_id=None, **GREEDY)[0, 30:].tolist()
    assert found == shifted(vanilla, ids[0].tolist(), 100, 48, 4)[0]


FORMATS_TRIED = [(name, name) for name in FORMATS] + [("q8_0", None), (None, "q4_0"), ("q4_0", "f16")]


@pytest.mark.parametrize("attention", ["torch", "C++"])
@pytest.mark.parametrize(("cache_k", "cache_v"), FORMATS_TRIED)
def test_formats_of_few_bits(cache_k, cache_v, attention):
    if attention == "C++" and native_obstacle(torch.device("cpu"), 32) is not None:
        pytest.skip(native_obstacle(torch.device("cpu"), 32))
    vanilla, ours = pair(head_dim=32, initializer_range=0.15)
    formats = {"cache_k": cache_k, "cache_v": cache_v}
    how = {"compile": "native"} if attention == "C++" else {"products": "stock"}
    preallocated(ours, 3, **formats, **how)
    assert_as_by_hand(vanilla, ours, prompt("padded"), 45, [4, 4, 2], bound=5e-4, **formats)


@pytest.mark.parametrize("format", [None, "q8_0"])
def test_a_long_tail_moves_block_by_block(format, monkeypatch):
    _, ours = pair(head_dim=32)
    preallocated(ours, 3, cache_k=format, cache_v=format)
    expected = generate(ours, prompt("padded"), max_new_tokens=45, **GREEDY)
    monkeypatch.setattr(moving, "_POSITIONS", 3)
    assert torch.equal(generate(ours, prompt("padded"), max_new_tokens=45, **GREEDY), expected)


def test_values_move_as_the_bytes_they_are():
    _, ours = pair(head_dim=32)
    preallocated(ours, 1, length=16, keep=4, cache_k="q4_1", cache_v="q4_1", products="stock")
    ours.prefill(prompt("one", 15)["input_ids"])
    ours.step(torch.tensor([[5]]))
    before = [[part.clone() for part in parts] for parts in ours._engine.cache.values.layers]
    ours._engine.grow(ours)
    assert ours.valid_past_index.tolist() == [10]
    for old, new in zip(before, ours._engine.cache.values.layers, strict=True):
        for was, now in zip(old, new, strict=True):
            assert torch.equal(now[:, :, 4:10], was[:, :, 10:16]) and torch.equal(now[:, :, :4], was[:, :, :4])


def test_compiled_steps_neither_recompile_nor_reallocate():
    vanilla, ours = pair()
    preallocated(ours, 3, bucket=16, compile="static")
    inputs = prompt("padded")
    before = graphs()
    assert_as_by_hand(vanilla, ours, inputs, 60, [4, 4, 2])
    assert graphs() == before


@pytest.mark.parametrize("switches", [{}, {"compile": "native"}, {"cache_k": "q8_0", "cache_v": "q4_0"}], ids=str)
def test_twenty_times_the_cache_in_the_same_memory(switches):
    if "compile" in switches and native.load() is not None:
        pytest.skip(native.load())
    _, ours = pair(head_dim=32)
    preallocated(ours, 2, 32, **switches)
    cache = ours._engine.cache
    tensors = cache.storages if "cache_k" in switches else [*cache.keys, *cache.values, cache.mask_B11S]
    tensors = [*tensors, cache.valid_past_index]
    places, count = [tensor.data_ptr() for tensor in tensors], ours._engine.reallocations
    inputs = prompt("one")
    text = generate(ours, inputs, max_new_tokens=20 * 32, **GREEDY)  # the second row is idle all the time
    assert text.shape[1] == 14 + 640 and ours._engine.cache is cache and ours._engine.reallocations == count
    assert [tensor.data_ptr() for tensor in tensors] == places
    assert len(set(text[0, -100:].tolist())) > 5
    assert ours.valid_past_index.max() <= 32 and "context shifted 45 times" in ours.path


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(1, 20), min_size=2, max_size=4),
    keep=st.integers(-1, 12),
    length=st.integers(21, 30),
    new=st.integers(2, 50),
    format=st.sampled_from([None, "f16"]),
    seed=st.integers(0, 99),
)
def test_rows_that_shift_at_times_of_their_own_are_each_row_alone(lengths, keep, length, new, format, seed):
    _, ours = pair()
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(1, VOCAB, (len(lengths), width), generator=generator)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    more = torch.randint(1, VOCAB, (len(lengths), new), generator=generator)

    def logits(ids, mask, more):
        preallocated(ours, len(ids), length, keep, products="stock", cache_k=format)
        found = [ours.prefill(ids, mask)]
        found += [ours.step(column[:, None])[:, 0] for column in more.unbind(1)]
        return torch.stack(found, 1), ours.valid_past_index.tolist(), ours._engine.context.times

    together, ends, times = logits(ids, mask.long(), more)
    for row in range(len(lengths)):
        one = slice(row, row + 1)
        alone, end, own = logits(ids[one, -lengths[row] :], mask[one, -lengths[row] :].long(), more[one])
        assert (together[one] - alone).abs().max() / alone.abs().max() < (1e-5 if format is None else 5e-3)
        assert end == ends[one] and own == times[one]


@pytest.mark.parametrize("counts", [[3] * 12, [1, 7, 2, 9] * 3, [12, 12, 12]], ids=str)
def test_several_tokens_at_a_time_shift_first(counts):
    _, ours = pair()
    preallocated(ours, 1, keep=4)
    ours.prefill(prompt("one")["input_ids"])
    held = 14
    for count in counts:
        while held + count > LENGTH:
            held -= (held - 4) // 2
        held += count
        assert ours.step(torch.full((1, count), 7)).isfinite().all()
        assert ours.valid_past_index.tolist() == [held]
    with pytest.raises(
        ValueError, match="21 tokens at a time do not fit beside the 4 that row 0 keeps in 24 positions"
    ):
        ours.step(torch.full((1, 21), 7))
    assert ours.valid_past_index.tolist() == [held]


@pytest.mark.parametrize("sampler", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("last", range(8, 14))
def test_surplus_steps_are_undone_around_a_shift(last, sampler):
    """The first shift comes before the eleventh new token is stored; the text ends about there."""
    _, ours = pair()
    inputs = prompt("one")
    text = generate(preallocated(ours), inputs, max_new_tokens=20, **sampler)[0, 14:].tolist()
    eos = text[last]
    found = []
    for lag in (0, 1, 2, 3):
        preallocated(ours)
        torch.manual_seed(5)
        how = ours._prepare_generation_config(None, eos_token_id=eos, pad_token_id=0, max_new_tokens=30, **sampler)[0]
        ours._prepare_special_tokens(how, True, device="cpu")
        how.max_length = 44
        processors = ours._get_logits_processor(how, 14, inputs["input_ids"], None, [], device="cpu")
        criteria = StoppingCriteriaList([MaxLengthCriteria(44), EosTokenCriteria(eos)])
        with torch.no_grad():
            ids = sample_loop(ours, ours._engine, inputs["input_ids"], processors, criteria, how, lag=lag)
        keys = [x[:, :, : ours.valid_past_index[0]].clone() for x in ours._engine.cache.keys]
        state = (ids.tolist(), ours.valid_past_index.tolist(), ours._engine.context.times, torch.rand(1).item())
        found.append((state, keys))
    assert found[0][0][0][0][14:] == text[: text.index(eos) + 1]
    for state, keys in found[1:]:
        assert state == found[0][0]
        assert all(torch.equal(a, b) for a, b in zip(keys, found[0][1], strict=True))


def test_a_finished_row_shifts_on_beside_the_others():
    _, ours = pair()
    inputs = prompt("padded")
    text = generate(preallocated(ours, 3), inputs, max_new_tokens=60, **GREEDY)[:, 14:]
    eos = text[1, 3].item()
    ended = generate(ours, inputs, max_new_tokens=60, eos_token_id=eos, **GREEDY)[:, 14:]
    for plain, row in zip(text.tolist(), ended.tolist(), strict=True):
        end = plain.index(eos) + 1 if eos in plain else len(plain)
        assert row[:end] == plain[:end] and not any(row[end:])


# without preallocate


def test_an_implicit_cache_grows_to_the_models_positions_and_then_shifts():
    vanilla, _ = pair()
    ours = fastllama.LlamaForCausalLM(config()).eval()
    ours.load_state_dict(vanilla.state_dict())
    ours._engine.default = ours._engine.config = fastllama.FastConfig(context_shift=True, keep=4, products="stock")
    inputs = prompt("one")
    found = generate(ours, inputs, max_new_tokens=80, **GREEDY)[0, 14:].tolist()
    assert found == shifted(vanilla, inputs["input_ids"][0].tolist(), 80, 32, 4)[0]
    long = prompt("one", 40)  # a prompt that is longer than that has one position to spare
    assert generate(ours, long, max_new_tokens=50, **GREEDY).shape[1] == 90
    assert ours.valid_past_index.max() <= 41


# what is left in the cache


def test_the_returned_cache_is_what_is_left():
    vanilla, ours = pair()
    inputs = prompt("padded")
    preallocated(ours, 3)
    out = generate(ours, inputs, max_new_tokens=40, return_dict_in_generate=True, **GREEDY)
    cache, lengths = out[CACHE_NAME], ours.valid_past_index.tolist()
    assert cache.get_seq_length() == max(lengths)
    more = out.sequences[:, -1:]
    mask = torch.tensor(
        [[position >= max(lengths) - n for position in range(max(lengths) + 1)] for n in lengths]
    ).long()
    with torch.no_grad():
        positions = torch.tensor(lengths)[:, None]
        expected = vanilla(more, attention_mask=mask, position_ids=positions, **{CACHE_NAME: cache}).logits
    assert (ours.step(more) - expected).abs().max() / expected.abs().max() < 1e-5


def test_a_text_that_fits_is_untouched():
    vanilla, ours = pair()
    inputs = prompt("padded")
    expected = generate(vanilla, inputs, max_new_tokens=10, **GREEDY)
    out = generate(preallocated(ours, 3), inputs, max_new_tokens=10, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, expected) and ours.path.endswith("context not shifted")
    assert out[CACHE_NAME].get_seq_length() == 23


# what is refused


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rope_types_that_follow_the_length_are_refused(rope):
    _, ours = pair(rope=rope)
    ours.preallocate(1, 16)
    cache = ours._engine.cache
    with pytest.raises(ValueError, match=f"context_shift=True cannot be honoured: rope_type '{rope}'"):
        preallocated(ours)
    assert ours._engine.cache is cache


@pytest.mark.parametrize(
    ("switches", "sentence"),
    [
        ({"context_shift": 1}, "context_shift=1 is not allowed; allowed: True, False"),
        ({"keep": -2}, "keep=-2 is not allowed; allowed: an integer >= -1"),
        ({"keep": True}, "keep=True is not allowed"),
        ({"keep": 1.5}, "keep=1.5 is not allowed"),
    ],
    ids=str,
)
def test_bad_values_are_refused_by_name(switches, sentence):
    with pytest.raises(ValueError, match=sentence):
        fastllama.FastConfig(**switches)


def test_a_prompt_needs_a_position_to_spare():
    _, ours = pair()
    preallocated(ours)
    with pytest.raises(ValueError, match="needs a position to spare: the prompt has 24 tokens"):
        generate(ours, prompt("one", 24), max_new_tokens=1, **GREEDY)
    with pytest.raises(ValueError, match="preallocate\\(\\) reserved 1 x 24: preallocate more"):
        generate(ours, prompt("one", 25), max_new_tokens=5, **GREEDY)
    generate(ours, prompt("one", 23), max_new_tokens=5, **GREEDY)
    assert "context shifted" in ours.path
    preallocated(ours, keep=-1)
    generate(ours, prompt("one", 23), max_new_tokens=5, **GREEDY)  # one position for all that follows
    assert ours.path.endswith("context shifted 3 times")


def test_assisted_generation_is_refused():
    _, ours = pair()
    preallocated(ours)
    draft = pair(seed=1)[1]
    for how in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": draft}):
        with pytest.raises(ValueError, match="context_shift=True cannot be honoured in assisted generation"):
            generate(ours, prompt("one"), max_new_tokens=5, **how)
    ours.free()
    preallocated(draft)
    with pytest.raises(ValueError, match="context_shift=True cannot be honoured in assisted generation"):
        generate(ours, prompt("one"), max_new_tokens=5, assistant_model=draft)


def test_keep_alone_is_said_to_do_nothing():
    vanilla, ours = pair()
    ours.preallocate(1, 64, keep=7)
    expected = generate(vanilla, prompt("one"), max_new_tokens=10, **GREEDY)
    assert torch.equal(generate(ours, prompt("one"), max_new_tokens=10, **GREEDY), expected)
    assert ours.path.endswith("keep=7 without effect")


# the turn alone


@pytest.mark.parametrize("rope", ["default", "llama3", "linear", "yarn"])
def test_a_turn_is_the_difference_of_two_positions(rope):
    from fastllama.model.rotary import RotaryTable

    vanilla, _ = pair(rope=rope)
    table = RotaryTable(vanilla.model.rotary_emb, 4096, torch.float32, torch.device("cpu"))
    x = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(0))
    at = torch.randint(100, 4000, (50,), generator=torch.Generator().manual_seed(1))

    def rotated(positions):
        return turn(x, *table.at(positions))

    for distance in (-100, -1, 0, 95):
        moved = turn(rotated(at), *turns(vanilla.model.rotary_emb.inv_freq, distance))
        assert (moved - rotated(at + distance)).abs().max() < 2e-3  # what fp32 angles of thousands are worth
        exact = turned(rotated(at), [distance] * 50, vanilla.model.rotary_emb.inv_freq)
        assert (moved - exact).abs().max() < 2e-6
    each = torch.arange(50) - 25
    assert torch.allclose(
        turn(x, *turns(vanilla.model.rotary_emb.inv_freq, each)),
        turned(x, each.tolist(), vanilla.model.rotary_emb.inv_freq), atol=2e-6,
    )  # fmt: skip
