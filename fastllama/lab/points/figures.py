"""The figures of a measured point, derived from its raw samples."""

from statistics import median

from fastllama.lab.points.assistance import of_stored
from fastllama.lab.points.sampler import Sampler

# The fields of a point, and of its baseline, that follow from `runs`.
DERIVED = ("tok_per_s", "decode_tok_per_s", "row_tok_per_s", "ttft_ms")


def samples(runs: list[dict], batch_size: int, new_tokens: int) -> dict[str, list[float]]:
    """One value per run of each derived figure.

    runs: [{"total_s": t_N, "first_s": t_1}, ...], seconds of a whole call and of a call for one token.
    Without a second token (new_tokens 1) nothing is decoded and the decode lists are empty. So is a run's
    decode sample whose t_N is not above t_1 (noise larger than the decoding): it is left out.
    """
    decode = [
        batch_size * (new_tokens - 1) / (run["total_s"] - run["first_s"])
        for run in runs
        if new_tokens > 1 and run["total_s"] > run["first_s"]
    ]
    return {
        "tok_per_s": [batch_size * new_tokens / run["total_s"] for run in runs],
        "decode_tok_per_s": decode,
        "row_tok_per_s": [value / batch_size for value in decode],
        "ttft_ms": [1000 * run["first_s"] for run in runs],
    }


def summary(runs: list[dict], batch_size: int, new_tokens: int) -> dict[str, float | None]:
    """The median of each derived figure over the runs; None where no run has a sample."""
    values = samples(runs, batch_size, new_tokens)
    return {name: median(values[name]) if values[name] else None for name in DERIVED}


def spread(point: dict, name: str = "decode_tok_per_s", baseline: bool = False) -> tuple[float, float] | None:
    """Smallest and largest sample of figure `name` of a point (or of its baseline); None without samples."""
    source = point["baseline"] if baseline else point
    values = samples(source["runs"], point["batch_size"], point["new_tokens"])[name]
    return (min(values), max(values)) if values else None


def subject_name(point: dict) -> str:
    """Which contestant a stored point is of."""
    switches = point["switches"]
    if switches["preallocate"]:
        return "ours"
    if switches.get("static_cache"):
        return "static"
    return "vanilla" if switches["compile"] == "no" else "compiled"


def workload(point: dict) -> tuple:
    """What was asked of which model: (model, dtype, batch_size, prompt_length, new_tokens, assistance, sampler).

    Assistance (None without) and sampler in words: an assisted point is compared with others that are so assisted.
    """
    sizes = tuple(point[name] for name in ("model", "dtype", "batch_size", "prompt_length", "new_tokens"))
    if "world_size" in point:  # which is not the same as one process's
        sizes = (sizes[0], f"{sizes[1]} over {point['world_size']} processes", *sizes[2:])
    # A point from before there was a sampler is greedy.
    return (*sizes, assistance(point), str(Sampler(**point.get("sampler", {}))))


def assistance(point: dict) -> str | None:
    """How a stored point is assisted, in a few words."""
    return str(of_stored(point)) if "assisted" in point else None


def workload_name(point: dict) -> str:
    """The workload as a heading: "demo fp32, batch 1, prompt 1000, 200 new tokens"."""
    model, dtype, batch_size, prompt_length, new_tokens, assisted, sampler = workload(point)
    name = f"{model} {dtype}, batch {batch_size}, prompt {prompt_length}, {new_tokens} new tokens"
    name += f", {assisted}" if assisted else ""
    return name if sampler == "greedy" else f"{name}, {sampler}"


def machine_name(point: dict) -> str:
    """Processor (or accelerator), threads and torch version: speeds are compared within these only."""
    environment = point["environment"]
    if point["device"] == "cpu":
        threads = f"{environment['threads']} thread{'s' if environment['threads'] != 1 else ''}"
        return f"{environment['cpu']}, {threads}, torch {environment['torch']}"
    return f"{environment['gpu']}, torch {environment['torch']}"


def figure(value: float | None) -> str:
    """A measured figure with three digits or more."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:#.3g}"
