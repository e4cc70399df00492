"""Schema 1 of points and records, which only reads: further fields pass, and a stored median may be rounded."""

from fastllama.lab.points import fields, figures
from fastllama.lab.points.fields import (
    check,
    count,
    flag,
    hash8,
    name,
    number,
    object_,
    or_null,
    show,
    size,
    text,
    word,
)

DTYPES = ("fp32", "bf16", "fp16")
COMPILES = ("no", "static", "dynamic", "fullgraph", "native")
PARITIES = ("exact", "tie", "half", "differs", "reference")

# A stored median may have been rounded to three decimals.
_ROUNDED = 1e-3, 6e-4

MEASURED = {
    "path": name,
    "tok_per_s": number,
    "decode_tok_per_s": or_null(number),
    "row_tok_per_s": or_null(number),
    "ttft_ms": number,
    "max_mem_mb": or_null(number),
    "max_reserved_mb": or_null(number),
    "load_s": or_null(number),
    "warmup_s": or_null(number),
    "hash": hash8,
}
POINT = {
    "schema": count,
    "model": name,
    "dtype": word(*DTYPES),
    "device": name,
    "batch_size": size,
    "prompt_length": size,
    "new_tokens": size,
    "cache_length": or_null(size),
    "seed": count,
    "switches": object_,
    **MEASURED,
    "compile_s": or_null(number),
    "reference_hash": or_null(hash8),
    "parity": word(*PARITIES),
    "first_divergence": or_null(object_),
    "recompiles_after_warmup": count,
    "baseline": or_null(object_),
    "speedup": number,
    "decode_speedup": or_null(number),
    "read_gb_per_s": or_null(number),
    "ceiling_gb_per_s": or_null(number),
    "ceiling_fraction": or_null(number),
    "distinct_tokens": count,
    "text_sample": text,
    "environment": object_,
    "command": name,
}
DIVERGENCE = {"row": count, "position": count, "margin": or_null(number)}
RUN = {"total_s": number, "first_s": number}
_ENVIRONMENT = {"cpu": name, "threads": size, "torch": name}
# What only schema 2 has: a record of that schema does not pass for one of this by another number.
_LATER = ("digest", "switch_defaults", "ceiling_runs_gb_per_s", "step_bytes")


def check_runs(value: dict, prefix: str = "", closed: bool = False) -> None:
    """ValueError if `runs` are not samples, or hold seconds that nothing takes."""
    runs = value.get("runs")
    if not isinstance(runs, list) or not runs:
        raise ValueError(f"field {prefix}runs must be a list of at least one sample")
    for index, run in enumerate(runs):
        if not isinstance(run, dict):
            raise ValueError(f"field {prefix}runs[{index}] must be an object with total_s and first_s")
        check(run, RUN, f"{prefix}runs[{index}].", closed)
        if not 1e-9 <= run["total_s"] < 1e9 or not run["first_s"] < 1e9:
            raise ValueError(f"field {prefix}runs[{index}] holds seconds that nothing takes")


def ratio(above: float | None, below: float | None) -> float | None:
    """above / below; None where one of them is not there."""
    return None if above is None or not below else above / below


def check_derived(point: dict, tolerance: tuple[float, float] = _ROUNDED) -> None:
    """ValueError if a figure is not the one that follows from the samples; tolerance: (relative, absolute)."""

    def agree(field, stored, derived):
        fields.agree(field, stored, derived, *tolerance)

    baseline, sizes = point["baseline"], (point["batch_size"], point["new_tokens"])
    if baseline is not None and len(baseline["runs"]) != len(point["runs"]):
        raise ValueError(f"there are {len(point['runs'])} runs beside {len(baseline['runs'])} of the baseline")
    for prefix, part in (("", point), *([("baseline.", baseline)] if baseline else [])):
        derived = figures.summary(part["runs"], *sizes)
        for field in figures.DERIVED:
            agree(prefix + field, part[field], derived[field])
    if baseline is None:
        if point["parity"] != "reference":
            raise ValueError(f"parity is {point['parity']} but there is no baseline to compare with")
        agree("speedup", point["speedup"], 1.0)
        agree("decode_speedup", point["decode_speedup"], None if point["decode_tok_per_s"] is None else 1.0)
    else:
        agree("speedup", point["speedup"], ratio(point["tok_per_s"], baseline["tok_per_s"]))
        decode = ratio(point["decode_tok_per_s"], baseline["decode_tok_per_s"])
        agree("decode_speedup", point["decode_speedup"], decode)
    agree("ceiling_fraction", point["ceiling_fraction"], ratio(point["read_gb_per_s"], point["ceiling_gb_per_s"]))


def check_parity(point: dict) -> None:
    """ValueError if the verdict is not what the hashes say."""
    same = point["hash"] == point["reference_hash"]
    if point["parity"] == "exact" and not same:
        raise ValueError(f"parity is exact but hash {point['hash']} is not reference_hash {point['reference_hash']}")
    if point["parity"] in ("tie", "differs") and same:
        raise ValueError(f"parity is {point['parity']} but hash and reference_hash are both {point['hash']}")


def check_point(point: dict) -> None:
    """ValueError, naming the field, if the object is not a point of schema 1."""
    later = [field for field in _LATER if field in point]
    if later:
        raise ValueError(f"schema is 1, which has no field {show(later[0])[1:-1]}")
    check(point, POINT)
    check(point["switches"], {"preallocate": flag, "compile": word(*COMPILES)}, "switches.")
    check(point["environment"], _ENVIRONMENT, "environment.")
    if point["device"] != "cpu":
        check(point["environment"], {"gpu": name}, "environment.")
    if point["first_divergence"] is not None:
        check(point["first_divergence"], DIVERGENCE, "first_divergence.")
    check_runs(point)
    if point["baseline"] is not None:
        check(point["baseline"], MEASURED, "baseline.")
        check_runs(point["baseline"], "baseline.")
    check_parity(point)
    check_derived(point)
