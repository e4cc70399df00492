"""Small caches: against a plain model that quantises and expands whole keys and values."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import fastllama
from fastllama.cache.budget import CacheShape
from fastllama.cache.small_cache import SmallCache
from fastllama.decode.cache_name import CACHE_NAME
from fastllama.kernels import stored_attention
from fastllama.kernels.blocks import FORMATS
from fastllama.kernels.stored import expand, part_sizes, quantise
from fastllama.lab.measuring import ceiling, checkpoint
from fastllama.lab.tracing.parts import Shape
from fastllama.model.compiled import graphs
from tests.pairwise import pairwise
from tests.test_measure import write_tiny
from tests.tiny import GREEDY, SAMPLED, VOCAB, generate, pair, prompt

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Each format for keys and for values, and beside one side that is the model's own.
SIDES = [
    ("int8", "q8_0"), ("q8_0", "int8"), ("q4_0", "q5_1"), ("q4_1", "iq4_nl"), ("q5_0", "q4_0"), ("q5_1", "q4_1"),
    ("iq4_nl", "q5_0"), ("f16", "bf16"), ("bf16", "f32"), ("f32", "f16"), ("int8", None), (None, "q4_0"),
    ("int8", "int8"), ("q4_0", "q4_0"),
]  # fmt: skip
CASES = pairwise({
    "sides": SIDES, "batch": ["one", "padded", "three"], "chunk": [None, 16], "kv_heads": [1, 2, 4],
    "dtype": list(DTYPES), "attention": ["torch", "C++"],
})  # fmt: skip


def id_of(case: dict) -> str:
    return "-".join(str(value) for value in case.values())


def models(kv_heads: int = 2, dtype: str = "fp32", **changes):
    """Heads of 64 numbers, two blocks each; attention sharp enough that keys matter."""
    values = {"head_dim": 64, "hidden_size": 64, "max_position_embeddings": 512, "initializer_range": 0.15} | changes
    vanilla, ours = pair(kv_heads, **values)
    return vanilla.to(DTYPES[dtype]), ours.to(DTYPES[dtype])


@torch.no_grad()
def plain_logits(model, ids: torch.Tensor, cache_k: str | None, cache_v: str | None) -> torch.Tensor:
    """Logits [T, V] of one unpadded row [T]; keys and values are stored and read as a whole, softmax is torch's."""
    body, length = model.model, len(ids)
    hidden = body.embed_tokens(ids)[None]
    cos, sin = body.rotary_emb(hidden, torch.arange(length)[None])
    hidden_later = torch.ones(length, length, dtype=torch.bool).triu(1)
    for layer in body.layers:
        attention, x = layer.self_attn, layer.input_layernorm(hidden)
        query, key, value = (
            projection(x).view(1, length, -1, attention.head_dim).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        key, value = (
            x if format is None else expand(quantise(x, format), format, x.dtype)
            for x, format in ((key, cache_k), (value, cache_v))
        )
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        scores = (query @ key.mT * attention.scaling).masked_fill(hidden_later, float("-inf"))
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        hidden = hidden + attention.o_proj((weights @ value).transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(body.norm(hidden))[0].float()


def errors(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Largest relative difference at each position."""
    return ((found - expected).abs().amax(-1) / expected.abs().amax(-1)).flatten()


def forced(ours, inputs: dict, later: torch.Tensor) -> torch.Tensor:
    """Logits [B, 1 + L, V]: after the prompt, and after each of the tokens `later` [B, L]; the last three at once."""
    found = [ours.prefill(**inputs)[:, None]]
    found += [ours.step(token[:, None]) for token in later[:, :-3].unbind(1)]
    return torch.cat((*found, ours.step(later[:, -3:])), 1).float()


def expected_logits(model, inputs: dict, later: torch.Tensor, cache_k, cache_v) -> torch.Tensor:
    rows = []
    for ids, mask, more in zip(inputs["input_ids"], inputs["attention_mask"], later, strict=True):
        whole = torch.cat((ids[mask.bool()], more))
        rows.append(plain_logits(model, whole, cache_k, cache_v)[-len(more) - 1 :])
    return torch.stack(rows)


def switches(attention: str, **others) -> dict:
    if attention == "C++":
        reason = stored_attention.native_obstacle(torch.device("cpu"), 64)
        if reason is not None:
            pytest.skip(reason)
        return others
    return {"products": "stock", **others}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To rounding. A number between two levels may be stored as either, and what follows it then differs a little."""
    difference = errors(found, expected)
    assert difference.median() < 5e-4
    assert difference.max() < 0.05


@pytest.mark.parametrize("case", CASES, ids=id_of)
def test_logits_are_those_of_the_plain_model(case):
    (cache_k, cache_v), dtype = case["sides"], case["dtype"]
    how = switches(case["attention"], cache_k=cache_k, cache_v=cache_v, prefill_chunk=case["chunk"])
    vanilla, ours = models(case["kv_heads"], dtype)
    inputs = prompt(case["batch"], 41)
    rows = len(inputs["input_ids"])
    later = torch.randint(3, VOCAB, (rows, 9), generator=torch.Generator().manual_seed(2))
    # None is the model's own dtype, which the plain model has anyway.
    ours.preallocate(rows, 64, bucket=16, **how)
    found = forced(ours, inputs, later)
    expected = expected_logits(vanilla, inputs, later, cache_k, cache_v)
    if dtype == "fp32":
        assert_close(found, expected)
        return
    exact = expected_logits(vanilla.float(), inputs, later, cache_k, cache_v)
    own = (expected - exact).pow(2).mean().sqrt()  # what the dtype costs the plain model
    assert (found - exact).pow(2).mean().sqrt() <= 1.3 * own


@pytest.mark.parametrize("attention", ["torch", "C++"])
@pytest.mark.parametrize("format", [name for name in FORMATS if name != "f32"])
def test_chunked_whole_and_stepwise_agree(format, attention):
    _, ours = models()
    ids = prompt("one", 70)["input_ids"]
    found = []
    for chunk in (None, 16):
        how = switches(attention, cache_k=format, cache_v=format, prefill_chunk=chunk)
        ours.preallocate(1, 128, **how)
        found.append(ours.prefill(ids))
    ours.prefill(ids[:, :5])
    for token in ids[0, 5:]:
        last = ours.step(token.view(1, 1))[:, -1]
    for other in (found[1], last):
        assert errors(other, found[0]).max() < 0.05
        assert ((other - found[0]).abs().median() / found[0].abs().max()) < 1e-3
    assert ours.valid_past_index.tolist() == [70]


STATIC = [
    ("int8", "q8_0", "padded"),
    ("q5_1", "iq4_nl", "three"),
    *(pytest.param(*case, marks=pytest.mark.full) for case in [("q4_0", None, "one"), ("f16", "f32", "padded")]),
]


@pytest.mark.parametrize(("cache_k", "cache_v", "batch"), STATIC)
def test_compiled_steps_give_the_same_tokens_without_recompiling(cache_k, cache_v, batch):
    _, ours = models()
    rows = 1 if batch == "one" else 3
    calls = [(14, 10), (40, 30), (20, 44), (9, 20)]

    def run() -> list:
        return [
            generate(ours, prompt(batch, length, seed=new), max_new_tokens=new, **(SAMPLED if new == 44 else GREEDY))
            for length, new in calls
        ]

    ours.preallocate(rows, 96, bucket=32, cache_k=cache_k, cache_v=cache_v)
    expected = run()
    ours.preallocate(rows, 96, bucket=32, cache_k=cache_k, cache_v=cache_v, compile="static")
    compiled, reallocations = graphs(), ours._engine.reallocations
    addresses = [storage.data_ptr() for storage in ours._engine.cache.storages]
    with torch.compiler.set_stance("fail_on_recompile"):
        found = run()
    assert graphs() == compiled and ours._engine.reallocations == reallocations
    assert addresses == [storage.data_ptr() for storage in ours._engine.cache.storages]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert "static compile by layer" in ours.path and f"cache {cache_k}/{cache_v or 'f32'}" in ours.path


@pytest.mark.full
@pytest.mark.parametrize("compile", ["static", "dynamic"])
@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize(("cache_k", "cache_v"), SIDES)
def test_every_pair_of_formats_compiled(cache_k, cache_v, batch, compile):
    _, ours = models()
    rows = 1 if batch == "one" else 3
    found = []
    for mode in ("no", compile):
        ours.preallocate(rows, 96, bucket=32, cache_k=cache_k, cache_v=cache_v, compile=mode)
        found.append(generate(ours, prompt(batch, 30), max_new_tokens=40, **GREEDY))
    assert torch.equal(*found)


@pytest.mark.parametrize("named", [{"cache_k": "f32"}, {"cache_v": "f32"}, {"cache_k": "f32", "cache_v": "f32"}])
def test_the_models_own_dtype_by_name_is_todays_path_and_vanillas_tokens(named):
    vanilla, ours = models()
    ours.preallocate(3, 64, **named)
    assert type(ours._engine.cache).__name__ == "FloatCache"
    inputs = prompt("padded")
    expected = generate(vanilla, inputs, max_new_tokens=30, **GREEDY)
    assert torch.equal(generate(ours, inputs, max_new_tokens=30, **GREEDY), expected)
    assert "cache" not in ours.path


def test_path_names_the_formats_and_the_attention():
    _, ours = models()
    ours.preallocate(1, 64, cache_k="int8", cache_v="q8_0", products="stock")
    generate(ours, prompt("one"), max_new_tokens=3, **GREEDY)
    assert ours.path.endswith("cache int8/q8_0, attention block by block in torch (products are stock)")
    ours.preallocate(1, 64, cache_k="q4_0")
    generate(ours, prompt("one"), max_new_tokens=3, **GREEDY)
    reason = stored_attention.native_obstacle(torch.device("cpu"), 64)
    how = "in C++" if reason is None else f"in torch ({reason})"
    assert ours.path.endswith(f"cache q4_0/f32, attention block by block {how}")
    assert "SDPA" not in ours.path and "prompt attention" not in ours.path


# Compiled, with formats that are compiled above.
@pytest.mark.parametrize(("compile", "cache_k", "cache_v"), [("no", "q8_0", "q4_1"), ("static", "q5_1", "iq4_nl")])
def test_undone_tokens_leave_no_trace(compile, cache_k, cache_v):
    _, ours = models()
    inputs = prompt("padded", 20)
    ours.preallocate(3, 64, cache_k=cache_k, cache_v=cache_v, compile=compile, bucket=32)
    ours.prefill(**inputs)
    right = torch.tensor([[7], [8], [9]])
    expected = [ours.step(right), ours.step(right + 3)]
    ours.prefill(**inputs)
    ours.step(right + 50)
    ours.step(right + 60)
    ours._engine.undo(2)
    assert torch.equal(ours.step(right), expected[0]) and torch.equal(ours.step(right + 3), expected[1])


def test_rows_that_finish_early_and_surplus_steps():
    _, ours = models(eos_token_id=None)
    inputs = prompt("padded", 20)
    ours.preallocate(3, 96, cache_k="int8", cache_v="int8")
    free = generate(ours, inputs, max_new_tokens=30, **GREEDY)
    stop = int(free[1, 20 + 4])
    found = generate(ours, inputs, max_new_tokens=30, eos_token_id=stop, pad_token_id=0, **GREEDY)
    for row in range(3):
        new, freely = found[row, 20:].tolist(), free[row, 20:].tolist()
        end = freely.index(stop) + 1 if stop in freely else len(new)
        assert new[:end] == freely[: len(new)][:end] and set(new[end:]) <= {0}


def test_a_larger_cache_than_rows_and_a_second_call():
    _, ours = models()
    ours.preallocate(4, 96, cache_k="q5_0", cache_v="iq4_nl")
    wide = [generate(ours, prompt(batch, 30), max_new_tokens=20, **GREEDY) for batch in ("one", "padded", "one")]
    assert torch.equal(wide[0], wide[2])
    ours.preallocate(1, 96, cache_k="q5_0", cache_v="iq4_nl")
    assert torch.equal(generate(ours, prompt("one", 30), max_new_tokens=20, **GREEDY), wide[0])


def test_an_implicit_cache_grows_and_an_explicit_one_refuses(monkeypatch):
    _, ours = models()
    inputs = prompt("padded", 20)
    small = {"cache_k": "q8_0", "cache_v": "q5_1", "products": "stock"}
    ours.preallocate(3, 400, **small)
    expected = generate(ours, inputs, max_new_tokens=330, **GREEDY)
    with pytest.raises(ValueError, match=r"needs 3 x 419 cache positions and preallocate\(\) reserved 3 x 400"):
        generate(ours, inputs, max_new_tokens=400, **GREEDY)
    ours.free()
    monkeypatch.setattr("fastllama.decode.reservation._AHEAD", 16)
    ours._engine.config = fastllama.FastConfig(**small)
    found = generate(ours, inputs, max_new_tokens=330, **GREEDY)
    assert ours._engine.cache.shape.cache_length == 512 and isinstance(ours._engine.cache, SmallCache)
    assert torch.equal(found, expected)
    assert "preallocated on first use" in ours.path and "cache q8_0/q5_1" in ours.path


def test_the_cache_that_is_handed_out_holds_what_was_stored():
    vanilla, ours = models()
    inputs = prompt("padded", 20)
    ours.preallocate(3, 64, cache_k="q8_0", cache_v="int8")
    result = generate(ours, inputs, max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
    with torch.no_grad():
        mask = torch.cat((inputs["attention_mask"], torch.ones(3, 4, dtype=torch.int64)), 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        exact = vanilla(input_ids=result.sequences[:, :-1], attention_mask=mask, position_ids=positions)
    for layer, other in zip(result[CACHE_NAME].layers, exact[CACHE_NAME].layers, strict=True):
        for found, plain in ((layer.keys, other.keys), (layer.values, other.values)):
            assert found.shape == plain.shape and found.dtype == torch.float32
            real = mask.bool()[:, None, :, None]
            assert ((found - plain) * real).abs().max() < 0.1 * plain.abs().max()
            assert not (found * ~real).any()


def test_what_overflowed_stays_visible_and_reaches_no_later_call():
    _, ours = models()
    ours.preallocate(2, 64, cache_k="q4_0", cache_v="int8")
    clean = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = ours.prefill(clean)
    weight = ours.model.embed_tokens.weight.data
    kept, weight[2] = weight[2].clone(), float("inf")
    poisoned = clean.clone()
    poisoned[0, 6] = 2
    found = ours.prefill(poisoned)
    assert found[0].isnan().all() and torch.equal(found[1], expected[1])
    assert ours.step(torch.tensor([[5], [6]]))[0].isnan().all()
    weight[2] = kept
    assert torch.equal(ours.prefill(clean), expected)


# sizes

TINYLLAMA = {"num_layers": 22, "batch_size": 1, "num_kv_heads": 4, "head_dim": 64, "device": torch.device("cpu")}


def shape(cache_k, cache_v, dtype=torch.bfloat16, length=4096, **changes) -> CacheShape:
    sizes = TINYLLAMA | changes
    return CacheShape(**sizes, cache_length=length, dtype=dtype, cache_k=cache_k, cache_v=cache_v)


@pytest.mark.parametrize(
    ("format", "least", "most"), [("int8", 0.51, 0.54), ("q8_0", 0.51, 0.54), ("q4_0", 0.28, 0.295)]
)
def test_bytes_beside_a_bf16_cache(format, least, most):
    assert least <= shape(format, format).nbytes / shape(None, None).nbytes <= most
    mixed = shape(format, None).nbytes
    assert abs(mixed - (shape(format, format).nbytes + shape(None, None).nbytes) / 2) < 0.001 * mixed


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("cache_k", "cache_v"), SIDES)
def test_bytes_are_those_of_the_tensors(cache_k, cache_v, dtype):
    wanted = shape(cache_k, cache_v, dtype, 100, num_layers=2, batch_size=3)
    cache = SmallCache(wanted, "for a test") if not wanted.is_plain else None
    if cache is not None:
        assert wanted.nbytes == sum(storage.nbytes for storage in (*cache.storages, cache.valid_past_index))
    assert shape("bf16", "bf16").nbytes == shape(None, None).nbytes
    _, ours = models(dtype={v: k for k, v in DTYPES.items()}[dtype])
    nbytes = ours.preallocate(3, 100, cache_k=cache_k, cache_v=cache_v)
    assert nbytes == ours._engine.cache.shape.nbytes + ours._engine.rotary.nbytes


def test_what_cannot_be_stored_is_refused_before_any_work():
    _, ours = pair()  # heads of 16
    ours.preallocate(1, 32)
    held = ours._engine.cache
    sentence = "head_dim=16 is not a multiple of 32, which the cache format {} needs"
    for format in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl"):
        for side in ("cache_k", "cache_v"):
            with pytest.raises(ValueError, match=sentence.format(format)):
                ours.preallocate(1, 32, **{side: format})
    with pytest.raises(ValueError, match="cache_k='q3_k' is not allowed; allowed: None, f32, f16, bf16, int8"):
        ours.preallocate(1, 32, cache_k="q3_k")
    with pytest.raises(MemoryError, match=r"a cache of 1 x 99999999999 positions needs .* GB are free"):
        ours.preallocate(1, 99_999_999_999, cache_k="int8", cache_v="int8")
    assert ours._engine.cache is held
    ours.preallocate(1, 32, cache_k="int8", cache_v="bf16")  # these have no blocks
    ours.double()
    with pytest.raises(ValueError, match=r"cache_k='int8' needs a model in fp32, bf16 or fp16, not torch\.float64"):
        ours.preallocate(1, 32, cache_k="int8")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", ["one", "padded"])
@pytest.mark.parametrize(("cache_k", "cache_v"), SIDES)
def test_the_native_step_gives_the_same_logits(cache_k, cache_v, batch, dtype):
    if (reason := stored_attention.native_obstacle(torch.device("cpu"), 64)) is not None:
        pytest.skip(reason)
    vanilla, ours = models(dtype=dtype)
    inputs = prompt(batch, 30)
    rows = len(inputs["input_ids"])
    later = torch.randint(3, VOCAB, (rows, 9), generator=torch.Generator().manual_seed(2))
    ours.preallocate(rows, 96, cache_k=cache_k, cache_v=cache_v, compile="native")
    found = forced(ours, inputs, later)
    generate(ours, inputs, max_new_tokens=3, **GREEDY)
    assert "native step" in ours.path
    exact = expected_logits(vanilla.float(), inputs, later, cache_k, cache_v)
    if dtype == "fp32":
        assert_close(found, exact)
        return
    own = (expected_logits(vanilla.to(DTYPES[dtype]), inputs, later, cache_k, cache_v) - exact).pow(2).mean().sqrt()
    assert (found - exact).pow(2).mean().sqrt() <= 1.3 * own


def test_the_laboratory_counts_the_same_bytes():
    _, ours = models()
    config = ours.config
    for cache_k, cache_v in SIDES:
        held = CacheShape(2, 1, 2, 100, 64, torch.float32, torch.device("cpu"), cache_k, cache_v)
        assert checkpoint.position_bytes(config, 4, cache_k, cache_v) == 2 * 2 * held.position_bytes
        made = Shape(config, 4, (9, 5), 6, {"qkv": 1, "o": 1, "gate_up": 1, "down": 1}, formats=(cache_k, cache_v))
        moved = made.step_bytes()
        for part in ("embedding", "cache write"):
            moved.pop(part)
        assert sum(moved.values()) == ceiling.step_bytes(ours, [9, 5], 6, cache_k, cache_v)


def test_a_point_runs_with_a_small_cache(tmp_path, light, logs):
    import run_llama

    words = ["--model", write_tiny(tmp_path / "model", head_dim=32), "--preallocate", "--dtype", "fp32"]
    words += ["-ctk", "int8", "--cache-v", "q8_0"]
    words += ["--prompt-length", "20", "--new-tokens", "4", "--runs", "1", "--warmup", "1"]
    assert run_llama.main([*words, "--json", str(tmp_path / "points.jsonl")]) == 0
    (point,) = map(json.loads, (tmp_path / "points.jsonl").read_text().splitlines())
    assert (point["switches"]["cache_k"], point["switches"]["cache_v"]) == ("int8", "q8_0")
    assert "cache int8/q8_0" in point["path"]


# the operators


def operands(formats: tuple, tokens: int, dtype=torch.float32, kv_heads=2, heads=4, dim=64, used=100):
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(2, tokens, heads, dim, generator=generator).to(dtype)
    sides = [torch.randn(3, kv_heads, used + 8, dim, generator=generator).to(dtype) for _ in formats]
    parts = [quantise(x, format) for x, format in zip(sides, formats, strict=True)]
    seen = torch.tensor([[used - 40], [used - tokens + 1]]) + torch.arange(tokens)
    return query, parts, seen


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 24])
@pytest.mark.parametrize("formats", [("int8", "q8_0"), ("q4_1", "q5_0"), ("iq4_nl", "f16"), ("q5_1", "q4_0")])
def test_attention_by_blocks_is_attention(formats, tokens, dtype, native, monkeypatch):
    if native and (reason := stored_attention.native_obstacle(torch.device("cpu"), 64)):
        pytest.skip(reason)
    # Blocks of 16 positions, and of 5 query tokens.
    monkeypatch.setattr(stored_attention, "_EXPANDED", {"cpu": 0})
    monkeypatch.setattr(stored_attention, "_POSITIONS", 16)
    monkeypatch.setattr(stored_attention, "_SCORES", {"cpu": 2 * 4 * 16 * 5})
    used = 100
    query, parts, seen = operands(formats, tokens, dtype, used=used)
    found = stored_attention.attend_stored(query, parts[0], formats[0], parts[1], formats[1], seen, used, 0.3, native)
    key, value = (
        expand([part[:2, :, :used] for part in side], format, dtype).double().repeat_interleave(2, 1)
        for side, format in zip(parts, formats, strict=True)
    )
    scores = query.double().transpose(1, 2) @ key.mT * 0.3
    scores = scores.masked_fill(torch.arange(used) >= seen[:, None, :, None], float("-inf"))
    expected = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    assert found.dtype == dtype and found.shape == (2, tokens, 4 * 64)
    assert (found.double() - expected).abs().max() <= 16 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_storing_writes_each_rows_own_positions_and_nothing_else(format, dtype, native, monkeypatch):
    if native and (reason := stored_attention.native_obstacle(torch.device("cpu"), 64)):
        pytest.skip(reason)
    monkeypatch.setattr(stored_attention, "_STORED_TOKENS", 2)
    new = torch.randn(2, 5, 3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    parts = [torch.ones(3, 3, 20, last, dtype=kind) for last, kind in part_sizes(format, 64, dtype)]
    index = torch.tensor([[2], [11]]) + torch.arange(5)
    stored_attention.store(new, parts, format, index, native)
    for part, numbers in zip(parts, quantise(new, format), strict=True):
        expected = torch.ones_like(part)
        for row in range(2):
            expected[row, :, index[row]] = numbers[row].transpose(0, 1)
        assert torch.equal(part, expected)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operator makes anew."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        held = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in held:
            self.nbytes = max(self.nbytes, out.nbytes)
        return out


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("format", ["int8", "q4_1", "q5_0", "iq4_nl", "f16"])
def test_no_more_than_a_block_is_ever_expanded(format, tokens, monkeypatch):
    monkeypatch.setattr(stored_attention, "_EXPANDED", {"cpu": 0})
    monkeypatch.setattr(stored_attention, "_SCORES", {"cpu": 2**16})
    query, parts, seen = operands((format, format), tokens, used=4096)
    largest = Largest()
    with largest:
        stored_attention._attend(query, parts[0], format, parts[1], format, seen, 4096, 0.3, False)
    whole = 2 * 2 * 4096 * 64 * 4
    assert largest.nbytes <= whole / 4  # indices of a codebook's block are the largest


def test_the_operators_are_what_torch_expects_of_one():
    query, parts, seen = operands(("q8_0", "q4_1"), 3)
    arguments = (query, list(parts[0]), "q8_0", list(parts[1]), "q4_1", seen, 100, 0.3, False)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastllama.attend_stored.default, arguments, test_utils=checks)
    new, index = torch.randn(2, 3, 2, 64), torch.arange(3).repeat(2, 1)
    torch.library.opcheck(
        torch.ops.fastllama.store.default, (new, list(parts[0]), "q8_0", index, False), test_utils=checks
    )
