"""The columns of a table of points: one definition, which every output format shares.

A point's row, a row per run, and a row per value of each option that varies. Units are in the names.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from fastllama import FastConfig
from fastllama.lab.points import figures
from fastllama.lab.points.assistance import Assistance


@dataclass(frozen=True)
class Column:
    """name: with its unit. kind: of its values but for None (object: any). group: which table of a terminal shows it.

    value: takes a point (or record, or row) and returns a str, int, float, bool or None. digits: of a float, for
    people; machines get all.
    """

    name: str
    kind: type
    group: str
    value: Callable
    digits: int = 2


def _at(*path: str) -> Callable:
    def value(point: dict):
        found: Any = point
        for name in path:
            found = None if found is None else found.get(name)
        # A cell holds one value: what holds others is shown as its JSON.
        return json.dumps(found, sort_keys=True) if isinstance(found, (dict, list)) else found

    return value


def _plain(group: str, kind: type, *names: str, under: str | tuple = (), prefix: str = "", digits: int = 2):
    place = (under,) if isinstance(under, str) else under
    return [Column(prefix + name, kind, group, _at(*place, name), digits) for name in names]


def _spread_of(name: str, end: int, baseline: bool = False) -> Callable:
    def value(point: dict):
        part = point.get("baseline") if baseline else point
        if part is None or "runs" not in part:
            return None
        ends = figures.spread(point, name, baseline)
        return None if ends is None else ends[end]

    return value


def _with_spread(prefix: str = "", baseline: bool = False) -> list[Column]:
    made, group = [], "vanilla" if baseline else "speed"
    for name in ("tok_per_s", "decode_tok_per_s", "ttft_ms"):
        made.append(Column(prefix + name, float, group, _at("baseline", name) if baseline else _at(name)))
        for end, word in enumerate(("min", "max")):
            made.append(Column(f"{prefix}{name}_{word}", float, group, _spread_of(name, end, baseline)))
    return made


# What is asked, apart from the switches. A cache of another length than prompt and new tokens is an option too.
WORKLOAD = [
    *_plain("options", str, "model", "dtype", "device"),
    *_plain("options", int, "batch_size", "prompt_length", "new_tokens", "cache_length", "seed"),
]
_RECORD = _plain("record", str, "id", "what", "prediction", "commit", "recorded_at", "status", "reason")
_MEASURED = [
    *_plain("speed", float, "speedup", "decode_speedup"),
    *_with_spread(),
    *_plain("speed", float, "row_tok_per_s"),
    *_with_spread("vanilla_", baseline=True),
    *_plain("ceiling", float, "read_gb_per_s", "ceiling_gb_per_s", "ceiling_fraction"),
    *_plain("memory", float, "max_mem_mb", "max_reserved_mb", "mapped_weights_mb", "predicted_mb", digits=1),
    *_plain("memory", float, "max_mem_mb", "max_reserved_mb", under="baseline", prefix="vanilla_", digits=1),
    *_plain("time", float, "load_s", "compile_s", "warmup_s"),
    Column("runs", int, "time", lambda point: len(point.get("runs", []))),
    *_plain("parity", str, "parity", "hash", "reference_hash", "prompt_hash"),
    *_plain("parity", int, "row", "position", under="first_divergence", prefix="divergence_"),
    *_plain("parity", float, "margin", under="first_divergence", prefix="divergence_", digits=6),
    *_plain("quality", float, "perplexity", "reference_perplexity", under="score", digits=3),
    *_plain("quality", float, "mean_kl", "p99_kl", "top1_agreement", under="score", digits=6),
    *_plain("quality", int, "positions", under="score", prefix="score_"),
    *_plain("quality", str, "not_scored"),
    *_plain("parity", int, "recompiles_after_warmup", "distinct_tokens"),
    *_plain("parity", str, "path"),
    Column("vanilla_path", str, "parity", _at("baseline", "path")),
    *_plain("parity", str, "text_sample"),
]
_KINDS: dict[Any, type] = {int | None: int, float | None: float}
_ASSISTANCE = [  # of points that have any
    Column(part.name, _KINDS.get(part.type, str), "options", _at("assisted", part.name)) for part in fields(Assistance)
]
_ASSISTED = [
    *_plain("assistance", float, "speedup_end_to_end", "acceptance", "tokens_per_target_forward", under="assisted"),
    *_plain("assistance", float, "draft_s", "target_s", under="assisted", digits=4),
    *_plain("assistance", int, "switched_off", under="assisted"),
    *_plain(
        "assistance", float, "tok_per_s", "decode_tok_per_s", prefix="unassisted_", under=("assisted", "unassisted")
    ),
]
_MACHINE = [
    *_plain("machine", str, "cpu", "gpu", "gpu_driver", "gpu_power_limit", "governor", under="environment"),
    *_plain("machine", int, "cores", "threads", "interop_threads", under="environment"),
    *_plain("machine", str, "torch", "transformers", "python", "os", "compiler", under="environment"),
    *_plain("machine", str, "flags", "variables", under="environment"),
    *_plain("machine", str, "command", "source_sha256"),
    *_plain("machine", int, "schema"),
]


def _chosen(points: list[dict], field: str, known: list[str]) -> list[Column]:
    """A column per entry of an object of options: those that are known, then whatever else the points name."""
    names = dict.fromkeys(known)
    for point in points:
        names |= dict.fromkeys(point.get(field, {}))
    made = []
    for name in names:
        kinds = {type(value) for point in points if (value := point.get(field, {}).get(name)) is not None}
        kind = next(iter(kinds)) if len(kinds) == 1 and kinds <= {bool, int, float} else str
        made.append(Column(name, kind, "options", _at(field, name)))
    return made


_RANKS = [  # of points that several processes measured together
    Column("world_size", int, "options", _at("world_size")),
    Column("smallest_rank_mem_mb", float, "memory", lambda point: min(point.get("rank_mem_mb", []), default=None), 1),
]


def options(points: list[dict]) -> list[Column]:
    """What was chosen for a point: workload, sampler and switches, of which those that vary are compared."""
    switches = ["preallocate", *(field.name for field in fields(FastConfig))]
    chosen = [*_chosen(points, "sampler", []), *_chosen(points, "switches", switches)]
    assisted = any("assisted" in point for point in points)
    return [*WORKLOAD, *chosen, *(_ASSISTANCE if assisted else [])]


def of_points(points: list[dict]) -> list[Column]:
    """The columns of a table of these points; one that was not measured has no figures.

    ValueError if a switch has the name of another column.
    """
    assisted = _ASSISTED if any("assisted" in point for point in points) else []
    ranks = _RANKS if any("world_size" in point for point in points) else []
    made = [*_RECORD, *options(points), *ranks, *assisted, *_MEASURED, *_MACHINE]
    names = [column.name for column in made]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the switch {name} has the name of another column and cannot stand in a table")
    return made


# Figures of which a value of an option gets the median, the smallest and the largest over its points.
COMPARED = ("tok_per_s", "decode_tok_per_s", "ttft_ms", "max_mem_mb", "speedup", "decode_speedup")


def _summary(name: str) -> list[Column]:
    return [Column(name + end, float, "options", _at(name + end)) for end in ("", "_min", "_max")]


OF_OPTIONS = [
    Column("option", str, "options", _at("option")),
    Column("value", object, "options", _at("value")),
    Column("points", int, "options", _at("points")),
    *(column for name in COMPARED for column in _summary(name)),
]
OF_RUNS = [
    Column("point", int, "runs", _at("point")),
    Column("contestant", str, "runs", _at("contestant")),
    Column("run", int, "runs", _at("run")),
    Column("total_s", float, "runs", _at("total_s"), 4),
    Column("first_s", float, "runs", _at("first_s"), 4),
    Column("tok_per_s", float, "runs", _at("tok_per_s")),
    Column("decode_tok_per_s", float, "runs", _at("decode_tok_per_s")),
    Column("ttft_ms", float, "runs", _at("ttft_ms")),
]
