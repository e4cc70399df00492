"""Schema 2 of points and records: everything a later reader needs, no field unknown, sealed by a digest."""

from statistics import median
from typing import Any

from fastllama.lab.measuring import assisted
from fastllama.lab.points.fields import (
    Kind,
    agree,
    check,
    flag,
    hash8,
    name,
    number,
    object_,
    or_null,
    scalar,
    sha256,
    show,
    small_count,
    small_size,
    text,
    wants,
    word,
)
from fastllama.lab.quality import score
from fastllama.lab.records import digest, schema1
from fastllama.lab.records.schema1 import COMPILES, DTYPES, PARITIES, ratio

# Figures are stored as they were computed; another order of the same sums may change the last digits.
_EXACT = 1e-9, 1e-12

_MEASURED: dict[str, Any] = {
    "path": name,
    "tok_per_s": number,
    "decode_tok_per_s": or_null(number),
    "row_tok_per_s": or_null(number),
    "ttft_ms": number,
    "load_s": number,
    "warmup_s": number,
    "runs": lambda value: True,  # schema1.check_runs says more
    "hash": hash8,
    "max_mem_mb": number,
    "max_reserved_mb": number,
    "mapped_weights_mb": or_null(number),
}
_NUMBERS = Kind(
    lambda value: isinstance(value, list) and value and all(map(number, value)), "a list of at least one number"
)
_POINT: dict[str, Any] = {
    "schema": small_count,
    "model": name,
    "dtype": word(*DTYPES),
    "device": name,
    "batch_size": small_size,
    "prompt_length": small_size,
    "new_tokens": small_size,
    "cache_length": small_size,
    "seed": small_count,
    "switches": object_,
    "switch_defaults": object_,
    **_MEASURED,
    "compile_s": number,
    "reference_hash": hash8,
    "parity": word(*PARITIES, "lossy", "drawn"),
    "first_divergence": or_null(object_),
    "recompiles_after_warmup": small_count,
    "baseline": or_null(object_),
    "speedup": number,
    "decode_speedup": or_null(number),
    "prompt_hash": hash8,
    "step_bytes": small_size,
    "read_gb_per_s": or_null(number),
    "ceiling_runs_gb_per_s": _NUMBERS,
    "ceiling_gb_per_s": number,
    "ceiling_fraction": or_null(number),
    "distinct_tokens": small_size,
    "text_sample": text,
    "environment": object_,
    "command": name,
    "source_sha256": sha256,
    "digest": sha256,
}
ENVIRONMENT = {
    "cpu": name,
    "cores": small_size,
    "usable_cores": or_null(small_size),
    "threads": small_size,
    "interop_threads": small_size,
    "cpu_capability": name,
    "cpu_bf16": flag,
    "governor": or_null(name),
    "ram_gb": number,
    "gpu": or_null(name),
    "gpu_memory_gb": or_null(number),
    "gpu_driver": or_null(name),
    "gpu_power_limit": or_null(name),
    "cuda": or_null(name),
    "os": name,
    "python": name,
    "torch": name,
    "transformers": or_null(name),
    "accelerate": or_null(name),
    "tokenizers": or_null(name),
    "safetensors": or_null(name),
    "compiler": or_null(name),
    "memory_from": name,
    "flags": object_,
    "variables": object_,
}
DIVERGENCE = {"row": small_count, "position": small_count, "margin": or_null(number)}
# Those of which any value but null, and but what is off, makes a point lossy: its ids are called equal to no others.
LOSSY_SWITCHES = ("weights", "cache_k", "cache_v", "context_shift", "keep", "grp_attn_n", "grp_attn_w")
LOSSY_OFF = {"context_shift": False, "keep": 0, "grp_attn_n": 1, "grp_attn_w": 512}
# A point without a sampler took the likeliest token. A lossy one has a score, or the reason why there is none.
# predicted_mb: 10^6 bytes, before anything was loaded. assisted: lab/measuring/assisted.py says more.
_OPTIONAL: dict[str, Any] = {
    "sampler": object_,
    "score": or_null(object_),
    "not_scored": or_null(name),
    "predicted_mb": number,
    "assisted": object_,
}
# Of a point that `world_size` processes measured together: the peak of each, by number, of which max_mem_mb is the
# largest.
_OPTIONAL |= {
    "world_size": small_size,
    "rank_mem_mb": _NUMBERS,
}


@wants("a string without a path")
def _no_path(value) -> bool:
    return isinstance(value, str) and not {"/", "\\"} & set(value)


def _check_switches(point: dict) -> None:
    switches, defaults = point["switches"], point["switch_defaults"]
    check(switches, {"preallocate": flag, "compile": word(*COMPILES)}, "switches.")
    check(switches, dict.fromkeys(switches, scalar), "switches.")
    check(defaults, dict.fromkeys(switches, scalar), "switch_defaults.", closed=True)


def check_environment(point: dict) -> None:
    environment = point["environment"]
    check(environment, ENVIRONMENT, "environment.", closed=True)
    if point["device"] != "cpu":
        check(environment, {"gpu": name}, "environment.")
    check(environment["variables"], dict.fromkeys(environment["variables"], _no_path), "environment.variables.")
    check(environment["flags"], dict.fromkeys(environment["flags"], object_), "environment.flags.")
    for flag_name, both in environment["flags"].items():
        check(both, {"value": scalar, "default": scalar}, f"environment.flags.{flag_name}.", closed=True)


def _check_divergence(point: dict, divergence: dict, prefix: str = "first_divergence.") -> None:
    check(divergence, DIVERGENCE, prefix, closed=True)
    if divergence["row"] >= point["batch_size"] or divergence["position"] >= point["new_tokens"]:
        raise ValueError(f"field {prefix[:-1]} names a token that was not generated")


def _check_parity(point: dict) -> None:
    schema1.check_parity(point)
    parity, divergence, baseline = point["parity"], point["first_divergence"], point["baseline"]
    same = point["hash"] == point["reference_hash"]
    if parity != "lossy" and same != (parity in ("exact", "reference")):
        raise ValueError(f"parity is {parity} but hash is {point['hash']} beside {point['reference_hash']}")
    if (divergence is None) != same:
        raise ValueError(f"parity is {parity} but first_divergence is {show(divergence)}")
    if divergence is not None:
        _check_divergence(point, divergence)
    if baseline is not None and parity == "reference":
        raise ValueError("parity is reference but there is a baseline to compare with")
    if baseline is not None and baseline["hash"] != point["reference_hash"]:
        raise ValueError(f"field baseline.hash is {baseline['hash']} but reference_hash is {point['reference_hash']}")


def lossy_switches(point: dict) -> dict:
    """The switches of a stored point that make it lossy, with their values."""
    found = {name: point["switches"].get(name) for name in LOSSY_SWITCHES}
    return {name: value for name, value in found.items() if value not in (None, LOSSY_OFF.get(name))}


def _check_score(point: dict) -> None:
    found = lossy_switches(point)
    if (point["parity"] == "lossy") != bool(found) and point["parity"] != "reference":
        raise ValueError(f"parity is {point['parity']} but the lossy switches are {show(found)}")
    stored, why = point.get("score"), point.get("not_scored")
    if (point["parity"] == "lossy") != ((stored is None) != (why is None)):
        raise ValueError(f"parity is {point['parity']} but score is {show(stored)} and not_scored is {show(why)}")
    if stored is not None:
        score.check(stored, "score.")


def _check_sizes(point: dict) -> None:
    shifts = point["switches"].get("context_shift") and point["switches"].get("grp_attn_n", 1) == 1
    needed = point["prompt_length"] + (1 if shifts else point["new_tokens"])
    if point["cache_length"] < needed:
        raise ValueError(f"field cache_length is {point['cache_length']}, too short for prompt and new tokens")
    if point["distinct_tokens"] > point["new_tokens"]:
        raise ValueError(f"field distinct_tokens is {point['distinct_tokens']} of {point['new_tokens']} new tokens")


def _check_ranks(point: dict) -> None:
    if "world_size" not in point and "rank_mem_mb" not in point:
        return
    size, each = point.get("world_size", 1), point.get("rank_mem_mb", [])
    if size < 2 or len(each) != size:
        raise ValueError(f"field rank_mem_mb has {len(each)} numbers and world_size is {size}")
    if max(each) != point["max_mem_mb"]:
        raise ValueError(f"field max_mem_mb is {point['max_mem_mb']} but the largest of rank_mem_mb is {max(each)}")


def check_point(point: dict, also: dict | None = None) -> None:
    """ValueError, naming the field, if the object is not a point of schema 2; also: further fields, a record's."""
    optional = {field: kind for field, kind in _OPTIONAL.items() if field in point}
    check(point, {**_POINT, **optional, **(also or {})}, closed=True)
    sampler = point.get("sampler", {})
    check(sampler, dict.fromkeys(sampler, scalar), "sampler.")
    _check_switches(point)
    check_environment(point)
    schema1.check_runs(point, closed=True)
    baseline = point["baseline"]
    if baseline is not None:
        check(baseline, _MEASURED, "baseline.", closed=True)
        schema1.check_runs(baseline, "baseline.", closed=True)
    _check_sizes(point)
    _check_parity(point)
    _check_score(point)
    _check_ranks(point)
    if "assisted" in point:
        assisted.check_point(point, schema1.check_runs, _check_divergence, _EXACT)
    if point["parity"] == "drawn" and not ("assisted" in point and sampler.get("do_sample")):
        raise ValueError("parity is drawn but nothing was drawn with assistance")
    schema1.check_derived(point, _EXACT)
    agree("ceiling_gb_per_s", point["ceiling_gb_per_s"], median(point["ceiling_runs_gb_per_s"]), *_EXACT)
    row = point["row_tok_per_s"]
    read = None if row is None else point["step_bytes"] * row / 1e9
    agree("read_gb_per_s", point["read_gb_per_s"], read, *_EXACT)
    if ratio(read, point["ceiling_gb_per_s"]) is None and read is not None:
        raise ValueError("field ceiling_gb_per_s is 0, which no memory is")
    digest.check(point)
