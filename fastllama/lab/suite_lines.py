"""The lines of the suite: every claim with its case and its bounds. A new line is a new entry here.

Ours is always preallocated, with the native step on a CPU and compiled static on a GPU where a case says nothing else;
vanilla is transformers' own class, eager, in turns with ours.
"""

from dataclasses import replace

from fastllama.lab import digest, measure, rounds, start, sweep
from fastllama.lab.line import NOT_COMPARED, Bound, Case, Line, Measured
from fastllama.lab.point import Point


class Alone(Point):
    """A point of ours without vanilla beside it, for what vanilla would take minutes to do: parity is not compared."""

    @property
    def contestants(self) -> tuple[str, ...]:
        return ("ours",)


def _point(point: Point) -> dict:
    record = measure.measure(point)
    if not isinstance(point, Alone):
        return record
    return digest.seal({**record, "parity": NOT_COMPARED, "reference_hash": None})


def _over(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def beside_vanilla(case: Case, device: str) -> Measured:
    """Decoding beside vanilla."""
    record = _point(case.point(device))
    names = ("decode_speedup", "ceiling_fraction", "decode_tok_per_s", "ceiling_gb_per_s")
    figures = {name: record[name] for name in names}
    figures["vanilla_decode_tok_per_s"] = record["baseline"]["decode_tok_per_s"]
    return Measured(figures, [record])


def without_vanilla(case: Case, device: str) -> Measured:
    """Decoding in a half precision without vanilla, and the prefill beside that in fp32."""
    record = _point(case.point(device, Alone))
    full = _point(case.point(device, dtype="fp32", new_tokens=8, runs=min(case.runs, 3)))
    figures = {name: record[name] for name in ("ceiling_fraction", "decode_tok_per_s", "ttft_ms")}
    figures |= {"fp32_ttft_ms": full["ttft_ms"], "prefill_over_fp32": _over(record["ttft_ms"], full["ttft_ms"])}
    return Measured(figures, [record, full])


def batch(case: Case, device: str) -> Measured:
    """Decoding of several rows beside vanilla, and beside ours with one row."""
    record = _point(case.point(device))
    # The fastest that one row can be had for.
    fastest = "native" if case.compile == "static" and device == "cpu" else case.compile
    one = _point(case.point(device, Alone, batch_size=1, compile=fastest, products="auto"))
    figures = {name: record[name] for name in ("decode_speedup", "decode_tok_per_s")}
    figures["one_row_decode_tok_per_s"] = one["decode_tok_per_s"]
    figures["times_one_row"] = _over(record["decode_tok_per_s"], one["decode_tok_per_s"])
    return Measured(figures, [record, one])


def prefill(case: Case, device: str) -> Measured:
    """Time to first token beside vanilla."""
    record = _point(case.point(device))
    theirs = record["baseline"]["ttft_ms"]
    figures = {"ttft_speedup": _over(theirs, record["ttft_ms"]), "ttft_ms": record["ttft_ms"]}
    return Measured({**figures, "vanilla_ttft_ms": theirs}, [record])


def beside_compiled(case: Case, device: str) -> Measured:
    """As beside_vanilla, and beside vanilla with its own static cache, compiled."""
    ours = beside_vanilla(case, device)
    compiled = _point(case.point(device, preallocate=False))
    speed = compiled["decode_tok_per_s"]
    ours.figures["compiled_vanilla_decode_tok_per_s"] = speed
    ours.figures["times_compiled_vanilla"] = _over(ours.figures["decode_tok_per_s"], speed)
    return replace(ours, points=[*ours.points, compiled])


def batch_curve(case: Case, device: str) -> Measured:
    """Decode speed of all rows per batch size, with vanilla beside each."""
    figures, points = {}, []
    for size in sweep.BATCH_SIZES:
        record = _point(case.point(device, batch_size=size))
        figures[f"decode_tok_per_s_{size}"] = record["decode_tok_per_s"]
        figures[f"decode_speedup_{size}"] = record["decode_speedup"]
        points.append(record)
    return Measured(figures, points)


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
_CONTEXT = "time that {prompt_length} in use add to a token over 128: {model} {dtype}, over what their bytes cost"
_START = (
    "compiling (static) in a second process over the first: {model} {dtype}; a new process to its first token over "
    "vanilla, with the native step and compiled static: demo, prompt 32"
)

_STEP_BOUNDS = (_most("rows_5", 1.15), _most("rows_16", 1.6), _most("verify_5", 1.15), _most("verify_16", 1.6))

# What several rows are fastest with; one row is faster with the native step.
_PACKED = {"compile": "static", "products": "packed"}

CPU = (
    Line(
        "160m-fp32",
        _DECODING,
        (_least("decode_speedup", 2.6), _least("ceiling_fraction", 0.80)),
        beside_vanilla,
        Case(_160M, "fp32"),
        quick=Case(_160M, "fp32", new_tokens=32, runs=2),
    ),
    Line(
        "tinyllama-bf16",
        _DECODING,
        (_least("decode_speedup", 2.2), _least("ceiling_fraction", 0.85)),
        beside_vanilla,
        Case(_TINYLLAMA, "bf16"),
    ),
    Line(
        "tinyllama-fp16",
        _HALF,
        (_least("ceiling_fraction", 0.85), _most("prefill_over_fp32", 1.3)),
        without_vanilla,
        Case(_TINYLLAMA, "fp16", runs=3),
    ),
    Line(
        "demo",
        _DECODING,
        (_least("decode_speedup", 6),),
        beside_vanilla,
        Case("demo", "fp32", new_tokens=200),
        quick=Case("demo", "fp32", new_tokens=100, runs=2),
    ),
    Line(
        "tinyllama-bf16-batch8",
        _BATCH,
        (_least("decode_speedup", 1.4), _least("times_one_row", 4)),
        batch,
        Case(_TINYLLAMA, "bf16", batch_size=8, runs=3, **_PACKED),
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
        prefill,
        Case(_TINYLLAMA, "bf16", prompt_length=1000, new_tokens=1, runs=5, compile="no", products="packed"),
    ),
    Line(
        "prefill-fp32",
        _PREFILL,
        (_least("ttft_speedup", 2),),
        prefill,
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
)

GPU = (
    Line(
        "llama-3.1-8b-bf16",
        f"{_DECODING}, and beside vanilla with its own static cache, compiled",
        (_least("ceiling_fraction", 0.85), _least("times_compiled_vanilla", 1.3)),
        beside_compiled,
        Case("inflated:llama-3.1-8b", "bf16", prompt_length=1000, new_tokens=200, warmup=2, compile="static"),
    ),
    Line(
        "llama-3.2-1b-bf16",
        _DECODING,
        (_least("ceiling_fraction", 0.75),),
        beside_vanilla,
        Case("inflated:llama-3.2-1b", "bf16", prompt_length=1000, new_tokens=200, warmup=2, compile="static"),
        quick=Case("inflated:llama-3.2-1b", "bf16", prompt_length=128, new_tokens=64, runs=2, compile="static"),
    ),
    Line(
        "batch-curve",
        "decoding of 1 to 128 rows beside vanilla: {model} {dtype}, prompt {prompt_length}, {new_tokens} new tokens",
        (),
        batch_curve,
        Case("inflated:llama-3.2-1b", "bf16", new_tokens=64, runs=3, compile="static"),
    ),
)

LINES = {"cpu": CPU, "gpu": GPU}
