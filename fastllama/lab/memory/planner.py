"""python -m fastllama.lab plan: which weights and which caches fit into so much memory, and about how fast they are.

All by arithmetic, from a configuration alone: nothing is loaded or built.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from transformers import LlamaConfig

from fastllama.cache.budget import CacheShape
from fastllama.decode.chunks import automatic_chunk
from fastllama.decode.memory_size import parse_size
from fastllama.kernels.blocks import FORMATS
from fastllama.kernels.small_weights import WEIGHTS
from fastllama.lab.measuring import checkpoint
from fastllama.lab.measuring.ceiling import Ceiling
from fastllama.lab.memory import peak
from fastllama.lab.points import option
from fastllama.lab.points.point import DTYPES
from fastllama.lab.quality import known_quality
from fastllama.model.footprint import WeightBytes, cache_shape, prefill_bytes, rotary_bytes, weight_bytes

_NONE = "none"
# Keys are felt more than values, so that each format goes with itself, and with smaller values.
_CACHES = [(None, None), *((name, name) for name in FORMATS if not FORMATS[name].is_float), ("q8_0", "q4_0")]


@dataclass(frozen=True)
class Combination:
    """One way to hold a model and its cache; all sizes in bytes. `bits` of a number: weights, keys, values."""

    weights: str | None
    shape: CacheShape
    weight: WeightBytes
    tables: int
    passing: int
    base: int
    bits: tuple[float, float, float]
    quality: known_quality.Quality | None

    @property
    def nbytes(self) -> int:
        return self.weight.total + self.shape.nbytes + self.tables + self.passing + self.base

    @property
    def read_bytes(self) -> int:
        """What one step must read when the cache is full: weights once, and every row's keys and values."""
        return self.weight.body + self.shape.nbytes

    def tok_per_s(self, bytes_per_s: float) -> float:
        """New tokens of all rows a second, if memory alone were the limit."""
        return self.shape.batch_size * bytes_per_s / self.read_bytes

    @property
    def exactness(self) -> tuple:
        """The larger the better: the bits of what has the fewest, then of all together, then speed."""
        return min(self.bits), sum(self.bits), -self.read_bytes

    @property
    def name(self) -> str:
        return (
            f"weights {self.weights or _NONE}, keys {self.shape.cache_k or _NONE}, values {self.shape.cache_v or _NONE}"
        )


@dataclass(frozen=True)
class Asked:
    """What is planned for; `base` bytes are the process's own."""

    model: str
    config: LlamaConfig
    dtype: torch.dtype
    device: torch.device
    batch_size: int
    context: int
    memory: int
    base: int


def _bits(nbytes: int, numbers: int) -> float:
    return 8 * nbytes / numbers


def _combination(asked: Asked, weights: str | None, cache_k: str | None, cache_v: str | None, found) -> Combination:
    config, dtype, device = asked.config, asked.dtype, asked.device
    shape = cache_shape(config, asked.batch_size, asked.context, dtype, device, cache_k, cache_v)
    weight, plain = weight_bytes(config, weights, dtype), weight_bytes(config, None, dtype)
    tokens = automatic_chunk(asked.batch_size, asked.context, device.type)
    passing = prefill_bytes(config, shape, tokens, asked.context - tokens, weights)
    own = 8 * dtype.itemsize
    sides = [FORMATS[name].row_bytes(shape.head_dim, dtype.itemsize) for name in shape.formats]
    keys, values = (_bits(nbytes, shape.head_dim) for nbytes in sides)
    return Combination(
        weights,
        shape,
        weight,
        rotary_bytes(shape),
        passing,
        asked.base,
        (own * weight.body / plain.body, keys, values),
        found,
    )


def combinations(
    asked: Asked, weights: list, caches: list[tuple], known: known_quality.Known
) -> tuple[list[Combination], list[str]]:
    """Every combination that the model can have, and a sentence for each that it cannot."""
    made, refused = [], []
    for format in weights:
        for cache_k, cache_v in caches:
            switches = {"weights": format, "cache_k": cache_k, "cache_v": cache_v}
            try:
                made.append(_combination(asked, format, cache_k, cache_v, known.of(asked.model, switches)))
            except ValueError as fault:
                if str(fault) not in refused:
                    refused.append(str(fault))
    return made, refused


def fitting(made: list[Combination], memory: int) -> tuple[list[Combination], Combination | None]:
    """(those that fit, the most exact first; the first of them, None where none fits)"""
    fit = sorted((one for one in made if one.nbytes <= memory), key=lambda one: one.exactness, reverse=True)
    return fit, fit[0] if fit else None


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f}"


def _row(one: Combination, best: bool, bytes_per_s: float | None) -> Iterator[str]:
    yield "*" if best else ""
    yield one.weights or _NONE
    key, value = one.shape.cache_k or _NONE, one.shape.cache_v or _NONE
    yield key if key == value else f"{key}/{value}"
    parts = (one.weight.total, one.shape.nbytes, one.tables + one.passing + one.base, one.nbytes)
    yield from map(_gb, parts)
    yield "-" if bytes_per_s is None else f"{one.tok_per_s(bytes_per_s):,.1f}"
    yield known_quality.words(one.quality)


def table(asked: Asked, made: list[Combination], refused: list[str], bytes_per_s: float | None) -> Group:
    """What fits, the most exact first, and below it what one must know."""
    fit, best = fitting(made, asked.memory)
    dtype = next(name for name, own in DTYPES.items() if own is asked.dtype)
    title = (
        f"{asked.model} {dtype} on {asked.device.type}, batch {asked.batch_size}, context {asked.context:,}: what fits "
        f"into {asked.memory / 1e9:,.2f} GB"
    )
    shown = Table(title=title, title_justify="left", padding=(0, 0, 0, 1), box=None)
    shown.add_column("")
    for name in ("weights", "cache\nk/v"):
        shown.add_column(name, no_wrap=True)
    for name in ("weights\nGB", "cache\nGB", "passing\nGB", "all\nGB", "tok/s"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("quality", overflow="fold")
    for one in fit:
        shown.add_row(*_row(one, one is best, bytes_per_s))
    longest = asked.config.max_position_embeddings
    notes = [f"* keeps the most bits of what has the fewest: {best.name}"] if best is not None else []
    notes.append(f"{len(fit)} of {len(made)} combinations fit")
    if len(fit) < len(made):
        least = min(made, key=lambda one: one.nbytes)
        notes[-1] += f"; the smallest of all ({least.name}) needs {_gb(least.nbytes)} GB"
    notes.append("none: as the checkpoint has it, and the model's own dtype; passing: rotary tables, what a prefill "
                 "pass holds, and on a CPU the process itself")  # fmt: skip
    if bytes_per_s is None:
        notes.append("tok/s needs --bandwidth GB/s: this machine has no such device to measure")
    else:
        notes.append(f"tok/s: {bytes_per_s / 1e9:,.1f} GB/s over the bytes of a step with a full cache, at best")
    if asked.context > longest:
        notes.append(f"{asked.context:,} positions are more than the {longest:,} that the model was made for")
    notes += [f"left out: {why}" for why in refused]
    return Group(shown, *map(Text, notes))


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.add_argument(
        "--model", default="demo", help="demo, random:NAME, inflated:NAME, a folder or a hub name (demo)"
    )
    parser.add_argument("--memory", required=True, help="what there is: 24GB, 16GiB, 500MB")
    parser.add_argument("--context", help="positions of each row (what the model was made for)")
    parser.add_argument("--batch-size", default="1", help="rows (1)")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="of what is not held smaller (auto)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... which need not be here (auto)")
    parser.add_argument("--bandwidth", help="of the device's memory, GB/s (measured, if it is here)")
    for name, short in (("weights", []), ("cache_k", ["-ctk"]), ("cache_v", ["-ctv"])):
        allowed = option.OPTIONS[name].allowed
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, *short, dest=name, metavar="LIST", help=f"only these (comma list): {allowed}")


def _count(name: str, given: str) -> int:
    if not given.strip().isdecimal() or int(given) < 1:
        raise ValueError(f"--{name} {given!r} is not allowed; allowed: an integer >= 1")
    return int(given)


def _list(name: str, given: str) -> list:
    return [option.OPTIONS[name].value(word) for word in given.split(",")]


def _bandwidth(given: str | None, device: torch.device, is_here: bool) -> float | None:
    if given is not None:
        try:
            value = float(given)
        except ValueError:
            value = 0.0
        if not 0 < value < 1e6:
            raise ValueError(f"--bandwidth {given!r} is not allowed; allowed: GB/s above 0")
        return value * 1e9
    return Ceiling(device).measure() * 1e9 if is_here else None


def _device(name: str) -> tuple[torch.device, bool]:
    """(device, whether it is here)"""
    if name == "auto":
        return torch.device(checkpoint.auto_device()), True
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r} is no device; allowed: cpu, cuda, ...") from None
    try:
        checkpoint.check_device(name)
    except ValueError:
        return device, False
    return device, True


def _caches(keys: str | None, values: str | None) -> list[tuple]:
    if keys is None and values is None:
        return _CACHES
    every = [None, *(name for name in FORMATS if not FORMATS[name].is_float)]
    of_keys = every if keys is None else _list("cache_k", keys)
    of_values = every if values is None else _list("cache_v", values)
    return [(key, value) for key in of_keys for value in of_values]


def run(given: argparse.Namespace) -> int:
    """Print the plan; the exit code: 0, or 1 where nothing fits. `ValueError` or `OSError` in one sentence."""
    memory = parse_size(given.memory, "--memory")
    rows = _count("batch-size", given.batch_size)
    context = None if given.context is None else _count("context", given.context)
    caches = _caches(given.cache_k, given.cache_v)
    device, is_here = _device(given.device)
    if given.weights is not None:
        weights = _list("weights", given.weights)
    else:
        weights = [None, *(name for name in WEIGHTS if name != "int4" and (name != "float8" or device.type != "cpu"))]
    word = given.dtype
    if word == "auto":
        word = checkpoint.auto_dtype(given.model, device.type) if is_here else "bf16"
    found = checkpoint.outline(given.model, DTYPES[word])
    bytes_per_s = _bandwidth(given.bandwidth, device, is_here)
    context = context or found.config.max_position_embeddings
    base = peak.base_bytes() if device.type == "cpu" else 0
    asked = Asked(Path(given.model).name, found.config, DTYPES[word], device, rows, context, memory, base)
    made, refused = combinations(asked, weights, caches, known_quality.read(given.root))
    if not made:
        raise ValueError(refused[0])
    Console().print(table(asked, made, refused, bytes_per_s))
    return 0 if fitting(made, memory)[1] is not None else 1
