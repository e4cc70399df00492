"""Self-extend: its closed form against llama.cpp's loop, and the model against a plain one that it moves."""

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.utils import logging

import fastllama
from fastllama.decode.loop import sample_loop
from fastllama.kernels import native
from fastllama.kernels.blocks import FORMATS
from fastllama.kernels.stored_attention import native_obstacle
from fastllama.model.compiled import graphs
from tests.plain_context import assert_row_as_by_hand, grouped, rows_of
from tests.tiny import GREEDY, VOCAB, generate, pair, prompt

LENGTH = 96


def extended(model, rows: int = 1, n: int = 4, w: int = 8, **switches):
    model.preallocate(rows, LENGTH, grp_attn_n=n, grp_attn_w=w, **switches)
    return model


def closed_form(tokens: int, n: int, w: int) -> list[int]:
    whole = tokens // w
    return [i // n if i < whole * w else i - whole * (w - w // n) for i in range(tokens)]


def simulated(tokens: int, n: int, w: int) -> tuple[list[int], int]:
    """(positions of the tokens, the next one's) by llama.cpp's loop (main.cpp), a token at a time."""
    positions, n_past, ga_i = [], 0, 0

    def group():
        nonlocal n_past, ga_i
        while n_past >= ga_i + w:
            ib, bd = (n * ga_i) // w, (w // n) * (n - 1)
            dd = (w // n) - ib * bd - w
            for i, p in enumerate(positions):
                if ga_i <= p < n_past:
                    positions[i] = p + ib * bd
            for i, p in enumerate(positions):
                if ga_i + ib * bd <= p < ga_i + ib * bd + w:
                    positions[i] = p // n
            for i, p in enumerate(positions):
                if ga_i + ib * bd + w <= p < n_past + ib * bd:
                    positions[i] = p + dd
            n_past -= bd
            ga_i += w // n

    for _ in range(tokens):
        group()
        positions.append(n_past)
        n_past += 1
    group()
    return positions, n_past


@settings(max_examples=200, deadline=None)
@given(tokens=st.integers(0, 150), n=st.integers(1, 8), times=st.integers(1, 8))
def test_the_closed_form_is_llama_cpps_loop(tokens, n, times):
    w = n * times
    positions, following = simulated(tokens, n, w)
    assert positions == closed_form(tokens, n, w)
    assert following == tokens - tokens // w * (w - w // n)


def assert_as_by_hand(vanilla, ours, inputs: dict, new: int, n: int, w: int, bound: float = 2e-5, **formats) -> None:
    width = inputs["input_ids"].shape[1]
    out = generate(ours, inputs, max_new_tokens=new, return_dict_in_generate=True, output_logits=True, **GREEDY)
    most = 0
    for row, ids in enumerate(rows_of(inputs)):
        found = out.sequences[row, width:].tolist()
        _, logits, plain = grouped(vanilla, ids, new, n, w, forced=found, **formats)
        ours_NV = torch.stack([step[row] for step in out.logits])
        assert_row_as_by_hand(found, ours_NV, logits, bound, exact=not formats)
        assert len(plain.kept) == ours.valid_past_index[row]
        whole = (len(plain.kept) - 1) // w
        most = max(most, whole)
        assert ours._engine.context.offset_B[row] == whole * (w - w // n)
    assert most > 0 and f"self-extend {n} x {w}, {most} window" in ours.path


@pytest.mark.parametrize("compile", ["no", "native"])
@pytest.mark.parametrize("batch", ["one", "padded", "three"])
@pytest.mark.parametrize(("n", "w"), [(2, 4), (4, 8), (8, 8), (3, 15), (2, 64)])
def test_text_and_logits_are_those_of_the_plain_model(n, w, batch, compile):
    if compile == "native" and native.load() is not None:
        pytest.skip(native.load())
    vanilla, ours = pair()
    inputs = prompt(batch, 22)
    extended(ours, len(inputs["input_ids"]), n, w, compile=compile)
    assert_as_by_hand(vanilla, ours, inputs, 60, n, w)
    assert "native step" in ours.path if compile == "native" else "no compile" in ours.path


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("rope", ["llama3", "linear", "yarn"])
def test_rope_types_and_chunks_of_a_prompt(rope, chunk):
    vanilla, ours = pair(rope=rope)
    extended(ours, 3, 3, 12, prefill_chunk=chunk)
    assert_as_by_hand(vanilla, ours, prompt("padded", 40), 40, 3, 12)


@pytest.mark.parametrize("attention", ["torch", "C++"])
@pytest.mark.parametrize("format", FORMATS)
def test_formats_of_few_bits(format, attention):
    if attention == "C++" and native_obstacle(torch.device("cpu"), 32) is not None:
        pytest.skip(native_obstacle(torch.device("cpu"), 32))
    vanilla, ours = pair(head_dim=32, initializer_range=0.15)
    formats = {"cache_k": format, "cache_v": format}
    extended(ours, 3, **formats, **({"compile": "native"} if attention == "C++" else {"products": "stock"}))
    assert_as_by_hand(vanilla, ours, prompt("padded", 22), 40, 4, 8, bound=1e-3, **formats)


def test_compiled_steps_neither_recompile_nor_reallocate():
    vanilla, ours = pair()
    extended(ours, 3, bucket=32, compile="static")
    cache, places = ours._engine.cache, [x.data_ptr() for x in (*ours._engine.cache.keys, *ours._engine.cache.values)]
    before = graphs()
    assert_as_by_hand(vanilla, ours, prompt("padded", 22), 60, 4, 8)
    assert graphs() == before
    assert ours._engine.cache is cache and [x.data_ptr() for x in (*cache.keys, *cache.values)] == places


def test_the_demo_reads_far_beyond_its_window():
    from fastllama.demo.names import demo_folder

    vanilla = transformers.LlamaForCausalLM.from_pretrained(demo_folder("target"), dtype=torch.float32).eval()
    ours = fastllama.LlamaForCausalLM.from_pretrained(demo_folder("target"), dtype=torch.float32).eval()
    ids = torch.randint(5, 4000, (1, 70), generator=torch.Generator().manual_seed(3))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    extended(ours, n=4, w=16)
    found = generate(ours, inputs, max_new_tokens=25, eos_token_id=None, **GREEDY)[0, 70:].tolist()
    assert found == grouped(vanilla, ids[0].tolist(), 25, 4, 16)[0]


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(1, 30), min_size=2, max_size=4),
    n=st.integers(2, 4),
    times=st.integers(1, 5),
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
def test_rows_whose_windows_fill_at_times_of_their_own_are_each_row_alone(lengths, n, times, counts, seed):
    _, ours = pair()
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(1, VOCAB, (len(lengths), width), generator=generator)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    more = torch.randint(1, VOCAB, (len(lengths), sum(counts)), generator=generator)

    def logits(ids, mask, more):
        extended(ours, len(ids), n, n * times, products="stock")
        found = [ours.prefill(ids, mask)[:, None], *(ours.step(part) for part in more.split(counts, 1))]
        return torch.cat(found, 1), ours._engine.context.windows

    together, windows = logits(ids, mask.long(), more)
    for row in range(len(lengths)):
        one = slice(row, row + 1)
        alone, own = logits(ids[one, -lengths[row] :], mask[one, -lengths[row] :].long(), more[one])
        assert (together[one] - alone).abs().max() / alone.abs().max() < 1e-5
        assert own == windows[one]


@pytest.mark.parametrize("last", range(7, 13))
def test_surplus_steps_are_undone_around_a_window(last):
    """The second window fills with the eleventh token that is stored behind the prompt; the text ends about there."""
    _, ours = pair()
    ids = prompt("one", 13)["input_ids"]
    text = generate(extended(ours, n=4, w=12), prompt("one", 13), max_new_tokens=20, **GREEDY)[0, 13:].tolist()
    found = []
    for lag in (0, 1, 2, 3):
        extended(ours, n=4, w=12)
        how = ours._prepare_generation_config(None, eos_token_id=text[last], pad_token_id=0, max_new_tokens=30)[0]
        ours._prepare_special_tokens(how, True, device="cpu")
        criteria = StoppingCriteriaList([MaxLengthCriteria(43), EosTokenCriteria(text[last])])
        with torch.no_grad():
            out = sample_loop(ours, ours._engine, ids, transformers.LogitsProcessorList(), criteria, how, lag=lag)
        keys = [x[:, :, : ours.valid_past_index[0]].clone() for x in ours._engine.cache.keys]
        found.append(((out.tolist(), ours.valid_past_index.tolist(), ours._engine.context.windows), keys))
    for state, keys in found[1:]:
        assert state == found[0][0]
        assert all(torch.equal(a, b) for a, b in zip(keys, found[0][1], strict=True))


def test_one_token_a_position_is_no_self_extend():
    vanilla, ours = pair()
    extended(ours, n=1, w=8)
    expected = generate(vanilla, prompt("one"), max_new_tokens=40, **GREEDY)
    assert torch.equal(generate(ours, prompt("one"), max_new_tokens=40, **GREEDY), expected)
    assert ours._engine.context is None and "self-extend" not in ours.path


def test_before_a_window_fills_nothing_changes():
    vanilla, ours = pair()
    extended(ours, n=4, w=64)
    expected = generate(vanilla, prompt("one"), max_new_tokens=40, **GREEDY)
    assert torch.equal(generate(ours, prompt("one"), max_new_tokens=40, **GREEDY), expected)
    assert ours.path.endswith("self-extend 4 x 64, no window filled")


def test_beside_it_context_shift_is_ignored_and_that_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(logging.get_logger("fastllama"), "warning_once", said.append)
    _, ours = pair()
    expected = generate(extended(ours), prompt("one"), max_new_tokens=40, **GREEDY)
    extended(ours, context_shift=True, keep=4)
    assert torch.equal(generate(ours, prompt("one"), max_new_tokens=40, **GREEDY), expected)
    assert said == ["fastllama: context_shift is ignored beside grp_attn_n=4"]
    assert "context_shift ignored beside it" in ours.path
    with pytest.raises(ValueError, match="preallocate more"):  # the text must fit
        generate(ours, prompt("one"), max_new_tokens=LENGTH, **GREEDY)


@pytest.mark.parametrize(
    ("switches", "sentence"),
    [
        ({"grp_attn_n": 3}, "grp_attn_w=512 is not a multiple of grp_attn_n=3"),
        ({"grp_attn_n": 4, "grp_attn_w": 6}, "grp_attn_w=6 is not a multiple of grp_attn_n=4"),
        ({"grp_attn_n": 0}, "grp_attn_n=0 is not allowed; allowed: an integer >= 1"),
        ({"grp_attn_w": 0}, "grp_attn_w=0 is not allowed"),
        ({"grp_attn_n": 2.0}, "grp_attn_n=2.0 is not allowed"),
    ],
    ids=str,
)
def test_bad_values_are_refused_by_name(switches, sentence):
    with pytest.raises(ValueError, match=sentence):
        fastllama.FastConfig(**switches)


def test_positions_that_the_model_was_made_for_bring_no_warning(monkeypatch):
    said = []
    monkeypatch.setattr(logging.get_logger("fastllama"), "warning", said.append)
    _, ours = pair()  # made for 32 positions
    extended(ours, n=8, w=16)
    assert not said and max(closed_form(LENGTH, 8, 16)) < 32
    extended(ours, n=2, w=16)
    assert "longer than max_position_embeddings 32" in said[0]


def test_what_cannot_be_turned_or_taken_back_is_refused():
    _, ours = pair(rope="dynamic")
    with pytest.raises(ValueError, match="grp_attn_n=4 cannot be honoured: rope_type 'dynamic'"):
        extended(ours)
    _, ours = pair()
    extended(ours)
    with pytest.raises(ValueError, match="grp_attn_n=4 cannot be honoured in assisted generation"):
        generate(ours, prompt("one"), max_new_tokens=5, prompt_lookup_num_tokens=3)
