"""The lines of the suite: every claim with its case and its bounds. A new line is a new entry here.

Ours is always preallocated, with the native step on a CPU and compiled static on a GPU where a case says nothing else;
vanilla is transformers' own class, eager, in turns with ours.
"""

from fastllama.lab.measuring import start
from fastllama.lab.suite import assisted_lines, beside, many_lines, rounds, small_rounds
from fastllama.lab.suite.line import Bound, Case, Line


def _least(figure: str, bound: float) -> Bound:
    return Bound(figure, ">=", bound)


def _most(figure: str, bound: float) -> Bound:
    return Bound(figure, "<=", bound)


_160M, _TINYLLAMA = "inflated:llama-160m", "inflated:tinyllama-1.1b"
_SIZES = "{model} {dtype}, batch {batch_size}, prompt {prompt_length}, {new_tokens} new tokens"
_DECODING = f"decoding beside vanilla: {_SIZES}"
_HALF = f"decoding and prefill without vanilla, which takes minutes: {_SIZES}; prefill beside ours in fp32"
_BATCH = f"decoding rows of different length beside vanilla, and beside ours with one row: {_SIZES}"
_ROWS = "a step of 5 and 16 rows, or of 5 and 16 tokens, over one of 1: {model} {dtype}, {prompt_length} in use"
_PREFILL = "time to first token beside vanilla: {model} {dtype}, prompt {prompt_length}"
_RESERVED = "a token with 4096 positions reserved over 256: {model} {dtype}, {prompt_length} in use"
_RIVAL = "a step beside a process that keeps one processor busy, over a quiet one: {model} {dtype}"
_CONTEXT = "time that {prompt_length} in use add to a token over 128: {model} {dtype}, over what their bytes cost"
_START = (
    "compiling (static) in a second process over the first: {model} {dtype}; a new process to its first token over "
    "vanilla, with the native step and compiled static: demo, prompt 32"
)

_SMALL = "a step with int8 and with int4 weights beside one with floats: {model} {dtype}, {prompt_length} in use"
_SMALL_PROMPTS = "prompts of 24 to {prompt_length} tokens with int8 and int4 weights beside floats: {model} {dtype}"
_CACHES = "a step with small caches beside one with floats in it: {model} {dtype}, {prompt_length} in use"
_NEIGHBOUR = "a step beside llama.cpp on the same weights in q8_0 and q4_0: {model} {dtype}, {prompt_length} in use"
_QUALITY = "what small weights and small caches cost against vanilla in fp32, 20,000 held-out tokens: {model} {dtype}"
_LONG = "int4 weights and an int8 cache: peak, and a step over one with a float cache: {model}, {prompt_length} in use"

_STEP_BOUNDS = (_most("rows_5", 1.15), _most("rows_16", 1.6), _most("verify_5", 1.15), _most("verify_16", 1.6))

_CACHE_BOUNDS = (
    *(_most(f"{name}_time_ratio", 1) for name in ("int8", "q8_0")),
    *(_most(f"{name}_memory", 0.54) for name in ("int8", "q8_0")),
    _most("q4_0_memory", 0.29),
    *(_most(f"{name}_logits_apart", most) for name, most in (("int8", 0.03), ("q8_0", 0.03), ("q4_0", 0.2))),
)
# What is fast and computes something else is not reached: about four times what the formats' rounding was seen to do.
_SAME_FUNCTION = (_most("int8_logits_apart", 0.05), _most("int4_logits_apart", 0.3))

_PROMPT_BOUNDS = tuple(
    _most(f"{name}_prompt_{size}_ratio", most)
    for size, most in ((24, 1.25), (128, 1.5), (1000, 1.25))
    for name in ("int8", "int4")
)

CPU = (
    Line(
        "160m-fp32",
        _DECODING,
        (_least("decode_speedup", 2.6), _least("ceiling_fraction", 0.80)),
        beside.vanilla,
        Case(_160M, "fp32"),
        quick=Case(_160M, "fp32", new_tokens=32, runs=2),
    ),
    Line(
        "tinyllama-bf16",
        _DECODING,
        (_least("decode_speedup", 2.2), _least("ceiling_fraction", 0.85)),
        beside.vanilla,
        Case(_TINYLLAMA, "bf16"),
    ),
    Line(
        "tinyllama-fp16",
        _HALF,
        (_least("ceiling_fraction", 0.85), _most("prefill_over_fp32", 1.3)),
        beside.without_vanilla,
        Case(_TINYLLAMA, "fp16", runs=3),
    ),
    Line(
        "demo",
        _DECODING,
        (_least("decode_speedup", 6),),
        beside.vanilla,
        Case("demo", "fp32", new_tokens=200),
        quick=Case("demo", "fp32", new_tokens=100, runs=2),
    ),
    Line(
        "tinyllama-bf16-batch8",
        _BATCH,
        (_least("decode_speedup", 1.4), _least("times_one_row", 4)),
        beside.batch,
        Case(_TINYLLAMA, "bf16", batch_size=8, runs=3),
    ),
    Line("rows-bf16", _ROWS, _STEP_BOUNDS, rounds.rows, Case(_TINYLLAMA, "bf16", runs=6)),
    Line(
        "rows-fp32",
        _ROWS,
        _STEP_BOUNDS,
        rounds.rows,
        Case(_TINYLLAMA, "fp32", runs=6),
        quick=Case(_160M, "fp32", runs=2),
    ),
    Line(
        "prefill-bf16",
        _PREFILL,
        (_least("ttft_speedup", 1.15),),
        beside.prefill,
        Case(_TINYLLAMA, "bf16", prompt_length=1000, new_tokens=1, runs=5, compile="no", products="packed"),
    ),
    Line(
        "prefill-fp32",
        _PREFILL,
        (_least("ttft_speedup", 2),),
        beside.prefill,
        Case(_TINYLLAMA, "fp32", prompt_length=1000, new_tokens=1, runs=3),
        quick=Case(_160M, "fp32", prompt_length=500, new_tokens=1, runs=2),
    ),
    Line(
        "cache-length",
        _RESERVED,
        (_most("time_ratio", 1.03),),
        rounds.reservation,
        Case(_160M, "fp32", runs=12),
        quick=Case(_160M, "fp32", runs=2),
    ),
    Line(
        "shared-machine",
        _RIVAL,
        (_most("time_ratio", 3),),
        rounds.rival,
        Case(_160M, "fp32", runs=6),
        quick=Case(_160M, "fp32", runs=2),
    ),
    Line(
        "context-bf16",
        _CONTEXT,
        (_most("context_cost", 1.2),),
        rounds.context,
        Case(_TINYLLAMA, "bf16", prompt_length=4000, runs=10),
    ),
    Line(
        "context-fp32",
        _CONTEXT,
        (_most("context_cost", 1.2),),
        rounds.context,
        Case(_160M, "fp32", prompt_length=4000, runs=10),
        quick=Case(_160M, "fp32", prompt_length=1952, runs=2),
    ),
    Line(
        "warm-up",
        _START,
        (_most("compile_ratio", 0.25), _most("first_token_ratio", 1.5), _most("static_first_token_ratio", 1.5)),
        start.first_use,
        Case(_160M, "fp32", compile="static"),
        quick=Case("demo", "fp32", compile="static"),
    ),
    Line(
        "small-weights",
        _SMALL,
        (
            _least("int8_speedup", 1.6),
            _least("int8_ceiling_fraction", 0.75),
            _least("int4_speedup", 2.3),
            *_SAME_FUNCTION,
        ),
        small_rounds.weights,
        Case(_TINYLLAMA, "bf16", runs=10),
        quick=Case(_160M, "bf16", runs=2),
    ),
    Line(
        "small-weights-prompts",
        _SMALL_PROMPTS,
        (*_PROMPT_BOUNDS, *_SAME_FUNCTION),
        small_rounds.prompts,
        Case(_TINYLLAMA, "bf16", prompt_length=1000, runs=5),
    ),
    Line(
        "llama.cpp",
        _NEIGHBOUR,
        (
            _least("int8_over_Q8_0", 1),
            _least("int4_over_Q4_0", 1),
            *(_most(f"{name}_logits_apart", 0.05) for name in ("int8", "int4")),
        ),
        small_rounds.beside_llama_cpp,
        Case(_TINYLLAMA, "bf16", runs=10),
    ),
    Line(
        "small-caches-160m",
        _CACHES,
        _CACHE_BOUNDS,
        small_rounds.caches,
        Case(_160M, "bf16", prompt_length=4000, runs=10),
        quick=Case(_160M, "bf16", prompt_length=1952, runs=2),
    ),
    Line(
        "small-caches-tinyllama",
        _CACHES,
        _CACHE_BOUNDS,
        small_rounds.caches,
        Case(_TINYLLAMA, "bf16", prompt_length=4000, runs=10),
    ),
    Line(
        "quality",
        _QUALITY,
        (_most("int8_perplexity_change", 0.005), _most("int4-g32_perplexity_change", 0.04)),
        small_rounds.kept_quality,
        Case("demo", "fp32"),
    ),
    *assisted_lines.CPU,
    *many_lines.CPU,
)

GPU = (
    Line(
        "llama-3.1-8b-bf16",
        f"{_DECODING}, and beside vanilla with its own static cache, compiled",
        (_least("ceiling_fraction", 0.85), _least("times_compiled_vanilla", 1.3)),
        beside.compiled_vanilla,
        Case("inflated:llama-3.1-8b", "bf16", prompt_length=1000, new_tokens=200, warmup=2, compile="static"),
    ),
    Line(
        "llama-3.2-1b-bf16",
        _DECODING,
        (_least("ceiling_fraction", 0.75),),
        beside.vanilla,
        Case("inflated:llama-3.2-1b", "bf16", prompt_length=1000, new_tokens=200, warmup=2, compile="static"),
        quick=Case("inflated:llama-3.2-1b", "bf16", prompt_length=128, new_tokens=64, runs=2, compile="static"),
    ),
    Line(
        "batch-curve",
        "decoding of 1 to 128 rows beside vanilla: {model} {dtype}, prompt {prompt_length}, {new_tokens} new tokens",
        (),
        beside.batch_curve,
        Case("inflated:llama-3.2-1b", "bf16", new_tokens=64, runs=3, compile="static"),
    ),
    Line(
        "llama-3.1-8b-small-weights",
        _SMALL,
        (_least("int8_speedup", 1.6), _least("int4_speedup", 2.5), *_SAME_FUNCTION),
        small_rounds.weights,
        Case("inflated:llama-3.1-8b", "bf16", runs=10, compile="static"),
        quick=Case("inflated:llama-3.2-1b", "bf16", runs=2, compile="static"),
    ),
    Line(
        "llama-3.1-8b-131072",
        _LONG,
        (_most("peak_gb", 15.5), _most("time_ratio", 1), _most("logits_apart", 0.03)),
        small_rounds.long_context,
        Case("inflated:llama-3.1-8b", "bf16", prompt_length=131072 - 96, runs=4, compile="static"),
    ),
)

LINES = {"cpu": CPU, "gpu": GPU}
