"""Where a trace says that time and bytes went: on made-up events with known sums, and on live tiny models."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from fastllama.kernels import native
from fastllama.kernels.linear import can_pack
from fastllama.lab.measuring import ceiling, checkpoint
from fastllama.lab.measuring.contestant import Contestant
from fastllama.lab.points.workload import Prompt
from fastllama.lab.tracing import breakdown as module
from fastllama.lab.tracing.breakdown import breakdown, bytes_of
from fastllama.lab.tracing.breakdown_words import Measured, decode_words, prefill_words, rows
from fastllama.lab.tracing.marks import PREFIX, marked
from fastllama.lab.tracing.parts import PRODUCTS, Shape, shape_of
from fastllama.model import forward
from fastllama.model.compiled import graphs
from tests import tiny

NEW = 4
PACKS = can_pack(torch.empty(1))
SEPARATE = {"qkv": 1, "o": 1, "gate_up": 1, "down": 1}


def shape(layers=1, lengths=(5,), new_tokens=2, **changes) -> Shape:
    return Shape(tiny.config(num_hidden_layers=layers, **changes), 4, tuple(lengths), new_tokens, SEPARATE)


# made-up events


def event(name, start, end, *children, kernels=(), device=DeviceType.CPU):
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start),
        cpu_children=list(children),
        kernels=[SimpleNamespace(name=f"kernel{duration}", duration=duration) for duration in kernels],
        device_type=device,
        is_user_annotation=False,
    )


def call(*children, end=100):
    return event("ProfilerStep#1", 0, end, *children)


def prefill(start, end, *children):
    return event(f"{PREFIX}prefill", start, end, *children)


def times(phase) -> dict:
    return {part: row.us for part, row in phase.rows.items()}


def test_the_innermost_mark_owns_an_operator():
    norm = event(f"{PREFIX}norm:0", 12, 20, event("aten::mul", 13, 18))
    mlp = event(f"{PREFIX}activation", 10, 30, norm, event("aten::silu", 21, 28))
    first, none = breakdown(
        [call(event("aten::ones", 1, 3), prefill(5, 40, mlp, event("aten::add", 31, 35)))], shape(), False
    )
    assert none is None
    assert times(first) == {"norm": 5, "activation": 7, "other": 2 + 4, "between": 100 - 18}
    assert first.rows["norm"].calls == 1 and first.layers_us == {0: 5}


def test_operators_inside_operators_count_once():
    inner = event("aten::addmm", 12, 18)
    product = event(f"{PREFIX}o:0", 10, 20, event("aten::linear", 11, 19, inner))
    first, _ = breakdown([call(prefill(5, 40, product))], shape(), False)
    assert times(first)["o"] == 8 and dict(first.rows["o"].operators) == {"aten::linear": 8}


def test_a_border_lies_at_the_first_step():
    steps = [event(f"{PREFIX}step", at, at + 10, event("aten::add", at, at + 4)) for at in (50, 70)]
    choosing = [event(f"{PREFIX}sampling", at, at + 5) for at in (41, 61, 81)]
    first, decode = breakdown([call(prefill(5, 40), *steps, *choosing)], shape(), False)
    assert (first.us, decode.us, decode.steps) == (50, 50, 2)
    assert times(first)["sampling"] == 5 and times(decode)["sampling"] == 10 and times(decode)["other"] == 8


def test_products_of_compiled_code_are_told_by_their_order():
    names = [
        "aten::mm",
        "mkldnn::_linear_pointwise",
        "fastllama::linear_packed",
        "fastllama_native::linear_rows",
        "aten::addmm",
    ]
    operators = [event(name, 52 + 4 * i, 54 + 4 * i) for i, name in enumerate(names)]
    operators.insert(1, event("aten::_scaled_dot_product_flash_attention_for_cpu", 54, 56))
    graph = event("## Call CompiledFxGraph abc ##", 51, 81, *operators)
    region = event("Torch-Compiled Region: 0/0", 50, 85, graph)
    _, decode = breakdown([call(prefill(5, 40), event(f"{PREFIX}step", 49, 90, region))], shape(), False)
    assert decode.told_apart
    found = times(decode)
    assert {part: found[part] for part in (*PRODUCTS, "attention")} == dict.fromkeys((*PRODUCTS, "attention"), 2)
    assert found["compiled"] == 35 - 12
    assert "products, so that" not in " ".join(words(decode))


def test_products_that_a_compiler_merged_are_not_guessed_at():
    graph = event("Torch-Compiled Region: 0/0", 50, 80, event("aten::mm", 52, 60))
    _, decode = breakdown([call(prefill(5, 40), event(f"{PREFIX}step", 49, 90, graph))], shape(), False)
    assert not decode.told_apart and times(decode)["compiled"] == 30 and "qkv" not in times(decode)
    assert "could not be told apart either" in " ".join(words(decode))


def test_on_an_accelerator_kernels_count():
    product = event(f"{PREFIX}o:0", 10, 20, event("aten::linear", 11, 19, event("cublas", 12, 13, kernels=[7])))
    graph = event("cudaGraphLaunch", 51, 53)
    on_device = [event("gemm", 14, 21, device=DeviceType.CUDA), event("gemv", 55, 85, device=DeviceType.CUDA)]
    events = [call(prefill(5, 40, product), event(f"{PREFIX}step", 50, 90, graph)), *on_device]
    first, decode = breakdown(events, shape(), True)
    assert times(first) == {"o": 7, "between": 43}
    assert times(decode) == {"captured": 30, "between": 20}
    assert "without saying which part" in " ".join(words(decode))
    assert bytes_of(decode, shape()) == {"captured": sum(shape().step_bytes().values())}
    assert dict(first.rows["o"].operators) == {"kernel7": 7}


def test_kernels_of_a_replayed_graph_are_the_graph_s():
    graph = event("cudaGraphLaunch", 51, 53, kernels=[20, 10])
    on_device = [event("gemv", 55, 75, device=DeviceType.CUDA), event("norm", 75, 85, device=DeviceType.CUDA)]
    step = event(f"{PREFIX}step", 50, 90, event("aten::copy_", 50, 51), graph)
    _, decode = breakdown([call(prefill(5, 40), step), *on_device], shape(), True)
    assert times(decode) == {"captured": 30, "between": 20}
    assert decode.rows["captured"].calls == 1


@pytest.mark.parametrize(
    ("events", "why"),
    [([], "it holds 0"), ([call(), call()], "it holds 2"), ([call(event("aten::mm", 1, 2))], "no prefill")],
)
def test_what_is_no_trace_of_a_call_is_refused(events, why):
    with pytest.raises(ValueError, match=why):
        breakdown(events, shape(), False)


def words(phase) -> list[str]:
    return decode_words(phase, shape(), Measured(1.0, 2.0, 10.0, 0.1))


# bytes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"kv_heads": 4, "num_hidden_layers": 3},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32},
    ],
    ids=str,
)
def test_bytes_are_those_of_the_weights(changes):
    model, _ = tiny.pair(**changes)
    lengths, new_tokens = [9, 5], 6
    made = Shape(model.config, 4, tuple(lengths), new_tokens, SEPARATE)
    assert sum(made.weight_bytes.values()) == ceiling.step_bytes(model, [0], 0)
    moved = made.step_bytes()
    rows_and_writes = moved.pop("embedding") + moved.pop("cache write")
    assert sum(moved.values()) == ceiling.step_bytes(model, lengths, new_tokens)
    assert rows_and_writes == 2 * (64 * 4 + checkpoint.position_bytes(model.config, 4))


def test_a_prefill_reads_a_weight_with_every_call():
    made = shape(layers=2)
    once = made.prefill_bytes({part: made.calls(part) for part in (*PRODUCTS, "norm")})
    twice = made.prefill_bytes({part: 2 * made.calls(part) for part in (*PRODUCTS, "norm")})
    assert {part: once[part] for part in made.weight_bytes} == made.weight_bytes
    assert all(twice[part] == 2 * once[part] for part in made.weight_bytes)


# live


def prompt_of(batch: str) -> Prompt:
    inputs = tiny.prompt(batch)
    return Prompt(inputs["input_ids"], inputs["attention_mask"])


def traced(contestant, prompt):
    """(events, prefill, decode, ids)"""
    contestant.generate(prompt, NEW)
    with marked(contestant) as restart, profile(activities=[ProfilerActivity.CPU]) as profiler:
        restart()
        with record_function("ProfilerStep#0"):
            ids, _ = contestant.generate(prompt, NEW)
    events = list(profiler.events())
    made = shape_of(contestant, prompt.lengths, NEW)
    return events, *breakdown(events, made, False), ids


def contestant(name: str, **switches) -> Contestant:
    vanilla, ours = tiny.pair()
    if name == "ours":
        ours.preallocate(batch_size=3, cache_length=24, **switches)
    return Contestant(name, ours if name == "ours" else vanilla)


def top_operators_us(events, begin: float, end: float) -> float:
    """Time of the operators that no other operator calls: what a part's operators must add up to."""

    def is_operator(event) -> bool:
        return not event.name.startswith(("ProfilerStep", PREFIX))

    def is_top(event) -> bool:
        parent = event.cpu_parent
        while parent is not None and not is_operator(parent):
            parent = parent.cpu_parent
        return is_operator(event) and parent is None

    return sum(e.time_range.elapsed_us() for e in events if is_top(e) and begin <= e.time_range.start < end)


@pytest.mark.parametrize(
    ("name", "switches", "writes"),
    [
        ("ours", {"products": "stock"}, 2),
        ("ours", {"products": "stock", "fuse": "no"}, 2),
        # Whose operator is called fastllama::linear_packed, which is no mark.
        pytest.param("ours", {"products": "packed"}, 2, marks=pytest.mark.skipif(not PACKS, reason="nothing packs")),
        ("vanilla", {}, 1),
    ],
    ids=str,
)
def test_eager_passes_are_split_by_part(name, switches, writes):
    one = contestant(name, **switches)
    plain, _ = one.generate(prompt_of("padded"), NEW)
    events, first, decode, ids = traced(one, prompt_of("padded"))
    assert torch.equal(plain, ids)
    layers, steps = 2, NEW - 1
    assert decode.steps == steps
    calls = {part: row.calls / steps for part, row in decode.rows.items() if row.calls}
    separate = shape_of(one, [1], NEW).separate
    expected = {part: layers * separate[part] for part in SEPARATE}
    expected |= {"head": 1, "embedding": 1, "norm": 2 * layers + 1, "attention": layers, "activation": layers}
    expected |= {"cache write": writes * layers, "rotary": layers * (2 if switches.get("fuse") else 1)}
    assert {part: calls.get(part) for part in expected} == expected
    border = min(event.time_range.start for event in events if event.name == f"{PREFIX}step")
    for phase, begin, end in ((first, 0, border), (decode, border, float("inf"))):
        operators = sum(row.us for part, row in phase.rows.items() if part not in ("sampling", "between"))
        marks = [
            event for event in events if event.name == f"{PREFIX}sampling" and begin <= event.time_range.start < end
        ]
        inside = sum(top_operators_us(events, mark.time_range.start, mark.time_range.end) for mark in marks)
        outside = top_operators_us(events, begin, end) - inside
        loose = phase.rows["sampling"].us - sum(mark.time_range.elapsed_us() for mark in marks)
        assert operators + loose == pytest.approx(outside)
        assert phase.rows["between"].us > 0
        assert sum(row.us for row in phase.rows.values()) == pytest.approx(phase.us)
        assert all(phase.rows[part].us > 0 for part in (*PRODUCTS, "norm", "attention", "rotary", "cache write"))
    assert sorted(decode.layers_us) == [0, 1]


@pytest.mark.skipif(native.load() is not None, reason=str(native.load()))
def test_a_native_step_is_one_row_and_the_words_say_so():
    one = contestant("ours", compile="native")
    _, first, decode, _ = traced(one, prompt_of("three"))
    made = shape_of(one, [14] * 3, NEW)
    (whole,) = (row for row in rows(decode, made, 1.0) if row["part"] == "native step")
    assert whole["calls"] == 1 and whole["bytes"] == sum(made.step_bytes().values())
    assert not any(part in decode.rows for part in PRODUCTS) and all(part in first.rows for part in PRODUCTS)
    told = " ".join(decode_words(decode, made, Measured(1.0, 2.0, 10.0, 0.1)))
    assert "its time cannot be told apart by part" in told and "down product 0.05 MB" in told


@pytest.mark.skipif(native.load() is not None, reason=str(native.load()))
def test_a_short_prompt_in_native_steps_is_one_row_too():
    one, inputs = contestant("ours", compile="native"), tiny.prompt("three", 8)
    _, first, decode, _ = traced(one, Prompt(inputs["input_ids"], inputs["attention_mask"]))
    made = shape_of(one, [8] * 3, NEW)
    (whole,) = (row for row in rows(first, made, 1.0) if row["part"] == "native step")
    assert whole["calls"] == 2 and not any(part in first.rows for part in PRODUCTS)
    twice = {part: 2 * made.calls(part) for part in (*PRODUCTS, "norm")}
    assert whole["bytes"] == sum(made.prefill_bytes(twice).values())
    assert prefill_words(first, made, Measured(1.0, 2.0, 10.0, 0.1))
    assert "native step" in decode.rows


@pytest.mark.parametrize("is_whole", [False, True], ids=["by layer", "whole"])
def test_a_compiled_step_is_neither_marked_inside_nor_compiled_again(is_whole, request):
    if native.load() is not None:
        pytest.skip(native.load())
    if is_whole:
        request.getfixturevalue("whole")
    one = contestant("ours", compile="static", products="native")
    compiled = graphs()
    _, first, decode, _ = traced(one, prompt_of("three"))
    assert graphs() == compiled
    assert decode.told_apart and decode.rows["compiled"].us > 0
    assert decode.rows["compiled"].calls / decode.steps == (1 if is_whole else 2)
    assert {part: decode.rows[part].calls / decode.steps for part in PRODUCTS} == {
        "qkv": 2, "o": 2, "gate_up": 2, "down": 2, "head": 1
    }  # fmt: skip
    made = shape_of(one, [14] * 3, NEW)
    assert sum(bytes_of(decode, made).values()) == sum(made.step_bytes().values())
    assert "activation" in first.rows and "activation" not in decode.rows
    one.model.free()
    torch._dynamo.reset()


def test_products_that_leave_no_event_in_a_compiled_layer_are_not_told_apart():
    one = contestant("ours", compile="static", products="stock")
    _, _, decode, _ = traced(one, prompt_of("three"))
    assert not decode.told_apart and "qkv" not in decode.rows and decode.rows["head"].calls == decode.steps
    one.model.free()


@pytest.mark.parametrize("name", ["ours", "vanilla"])
def test_marks_leave_nothing_behind(name):
    one = contestant(name, **({"products": "stock"} if name == "ours" else {}))
    prompt = prompt_of("one") if name == "vanilla" else prompt_of("three")
    one.generate(prompt, NEW)
    plain = {function: getattr(forward, function) for function in ("rotate", "attend_cache", "_mlp", "write_tokens")}
    with pytest.raises(RuntimeError, match="in the middle"), marked(one):
        assert name == "vanilla" or forward.rotate is not plain["rotate"]
        raise RuntimeError("in the middle")
    assert all(getattr(forward, function) is value for function, value in plain.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in one.model.modules())
    if name == "ours":
        assert not {"prefill", "step"} & vars(one.model._engine).keys()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            one.generate(prompt, NEW)
        assert not any(event.name.startswith(PREFIX) for event in profiler.events())


def test_the_words_give_rates_and_shares():
    first, decode = module.Phase(1e5, 0, {}, {}), module.Phase(4e3, 2, {}, {})
    made = shape(layers=2, new_tokens=3)
    for part in (*PRODUCTS, "norm"):
        first.rows[part] = module.Row(made.calls(part), 1e3)
        decode.rows[part] = module.Row(2 * made.calls(part), 100.0)
    measured = Measured(first_s=0.05, whole_s=0.052, ceiling_gb_per_s=1.0, matrix_tflop_per_s=0.001)
    told = " ".join(prefill_words(first, made, measured))
    rate = made.prefill_flops() / 5e-3 / 1e12
    assert f"{rate / 0.001:.0%} of the 0.001 TFLOP/s" in told
    told = " ".join(decode_words(decode, made, measured))
    nbytes = sum(made.step_bytes().values())
    assert "2.000 ms under the profiler, 1.000 ms without it" in told
    assert f"{nbytes / 1e-3 / 1e9:.0%} of the ceiling of 1.0 GB/s." in told
    (qkv,) = (row for row in rows(decode, made, 1.0) if row["part"] == "qkv")
    assert qkv["calls"] == 2 and qkv["ms"] == pytest.approx(0.05) and qkv["share"] == pytest.approx(0.025)
    assert qkv["ceiling_fraction"] == pytest.approx(made.weight_bytes["qkv"] / 0.05e-3 / 1e9)
