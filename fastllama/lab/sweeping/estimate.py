"""About how long a point will take, from sizes and from two rates of this machine. Good to a factor of two or three."""

import time
from dataclasses import dataclass

import torch

from fastllama.lab.measuring import checkpoint
from fastllama.lab.measuring.ceiling import Ceiling
from fastllama.lab.measuring.contestant import synchronize
from fastllama.lab.points.point import DTYPES, Point
from fastllama.model.footprint import head_dim

_START_S = 8.0  # a process up to its first import of a model
_LOAD_BYTES_PER_S = 1e9
_COMPILE_S = {"no": 0.0, "native": 1.0, "static": 40.0, "dynamic": 60.0}
# What Python and torch's dispatch take for each layer of a step, whatever its size.
_LAYER_S = {"vanilla": 4e-4, "compiled": 1e-4, "static": 4e-4, "ours": 2e-4}
_SIDE = 1024


@dataclass(frozen=True)
class Rates:
    """What a device does per second: bytes read, and operations of a product of matrices by dtype."""

    bytes_per_s: float
    flop_per_s: dict[str, float]

    @classmethod
    def measure(cls, device: str, dtypes: set[str]) -> "Rates":
        """A second or two of measuring."""
        place = torch.device(device)
        return cls(Ceiling(place).measure() * 1e9, {name: _flop_per_s(place, DTYPES[name]) for name in dtypes})


def _flop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    matrix = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * _SIDE**3 / best


def seconds(point: Point, rates: Rates, only_memory: bool = False) -> float:
    """Loading, compiling, warm-up, the timed runs, and the processes that measure memory; or only those."""
    found = checkpoint.outline(point.model, point.torch_dtype)
    itemsize, work = point.torch_dtype.itemsize, point.workload
    parameters = found.parameter_count
    load_s = parameters * itemsize / _LOAD_BYTES_PER_S
    # A product takes two operations for each of its weights and rows.
    row_s = 2 * parameters / rates.flop_per_s[point.dtype]
    # And each pair of tokens that see each other, two for each number of the query, with keys and with values.
    config = found.config
    queries = config.num_hidden_layers * config.num_attention_heads * head_dim(config)
    pairs_s = 4 * queries * work.prompt_length**2 / 2 / rates.flop_per_s[point.dtype]
    total = load_s
    for name in point.contestants[:1] if only_memory else point.timed:
        name = "ours" if name == "unassisted" else name
        formats = point.cache_formats if name == "ours" else (None, None)
        position = checkpoint.position_bytes(found.config, itemsize, *formats)
        row_bytes = position * (work.prompt_length + work.new_tokens / 2)
        overhead_s = found.config.num_hidden_layers * _LAYER_S[name]
        first_s = work.batch_size * (work.prompt_length * row_s + pairs_s) + overhead_s
        weights = point.weights if name == "ours" else None
        step_bytes = found.weight_bytes(point.torch_dtype, weights) + work.batch_size * row_bytes
        step_s = max(step_bytes / rates.bytes_per_s, work.batch_size * row_s) + overhead_s
        whole_s = first_s + (work.new_tokens - 1) * step_s
        runs = 0 if only_memory else point.warmup + point.runs
        total += runs * (whole_s + first_s) + _START_S + load_s + whole_s
        total += 0.0 if name in ("vanilla", "static") else 2 * _COMPILE_S[point.compile]
    return total


def words(duration_s: float) -> str:
    """A duration as people say it: "40 s", "12 min", "3.5 h"."""
    if duration_s < 100:
        return f"{duration_s:.0f} s"
    return f"{duration_s / 60:.0f} min" if duration_s < 6000 else f"{duration_s / 3600:.1f} h"
