"""python -m fastllama.lab soak: a long run of short generations, held to flat memory and to constant texts."""

import argparse
import gc
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import fastllama
from fastllama.lab.measuring import checkpoint, vanilla
from fastllama.lab.measuring.environment import environment
from fastllama.lab.measuring.progress import progress
from fastllama.lab.points import workload
from fastllama.lab.points.point import DTYPES
from fastllama.lab.records import digest
from fastllama.lab.records.sources import source_sha256
from fastllama.lab.soak import file, works
from fastllama.lab.soak import run as soaking

GENERATIONS, BOUND_MB, BOUND_OBJECTS = 10_000, 8.0, 2_000


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.add_argument("--model", default="demo", help="demo, inflated:NAME, a checkpoint's folder or hub name (demo)")
    parser.add_argument("--draft", default="demo-draft", help="a model with the same tokenizer, or none (%(default)s)")
    parser.add_argument("--dtype", default="fp32", help="fp32, bf16 or fp16 (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (auto)")
    parser.add_argument("--generations", type=int, default=GENERATIONS, metavar="N", help="at least (%(default)s)")
    bound = "MB by which the last quarter of the run may hold more than the second, on host and device (%(default)s)"
    parser.add_argument("--bound-mb", type=float, default=BOUND_MB, metavar="MB", help=bound)
    objects = "the same of Python objects (%(default)s)"
    parser.add_argument("--bound-objects", type=int, default=BOUND_OBJECTS, metavar="N", help=objects)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result, as tb_logs/soak/NAME.json")


def run(given: argparse.Namespace) -> int:
    """0; 1, with one sentence, where memory grew or a text changed. Raises as the other commands do."""
    logging.disable_progress_bar()
    if given.dtype not in DTYPES:
        raise ValueError(f"--dtype {given.dtype!r} is not allowed; allowed: {', '.join(DTYPES)}")
    for name in ("bound_mb", "bound_objects"):
        if not getattr(given, name) >= 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(given, name)} is not allowed; allowed: 0 or more")
    if given.json is not None and not given.json.resolve().parent.is_dir():
        raise FileNotFoundError(f"{given.json}: there is no folder {given.json.parent}")
    dtype = DTYPES[given.dtype]
    device = torch.device(checkpoint.auto_device() if given.device == "auto" else checkpoint.check_device(given.device))
    found = checkpoint.find(given.model, dtype)
    tokenizer = checkpoint.tokenizer(found)
    draft_found = None if given.draft == "none" else checkpoint.find(given.draft, dtype)
    if draft_found is not None and checkpoint.tokenizer(draft_found).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--draft {given.draft} has another tokenizer than {given.model}: give --draft none")
    pad = workload.pad_id(tokenizer)
    model = _load(found, fastllama.LlamaForCausalLM, dtype, device, pad)
    draft = None if draft_found is None else _load(draft_found, fastllama.LlamaForCausalLM, dtype, device, pad)
    kit = works.kit(tokenizer, pad, draft)
    least = 4 * soaking.cycle(kit)
    if given.generations < least:
        raise ValueError(f"--generations {given.generations} is too few: {least} run everything four times")
    with progress(1 + -(-given.generations // len(soaking.works(kit)))) as begin:
        begin("vanilla's texts")
        vanillas = {}
        if dtype == torch.float32:
            vanillas = soaking.references(_load(found, transformers.LlamaForCausalLM, dtype, device, pad), kit)
        gc.collect()
        told = soaking.soak(model, kit, given.generations, vanillas, begin)
    result = _result(given, device, told)
    if given.json is not None:
        file.write(given.json, result)
    Console().print(_table(result))
    fault = _fault(result)
    if fault is not None:
        print(f"error: {fault}", file=sys.stderr)
    return 0 if fault is None else 1


def _load(found, cls, dtype: torch.dtype, device: torch.device, pad: int):
    model, _ = checkpoint.load(found, cls, dtype, device)
    vanilla.plain_greedy(model, pad)
    return model


def _command(given: argparse.Namespace) -> str:
    words = ["python", "-m", "fastllama.lab", "soak"]
    for name, value in (("model", "demo"), ("draft", "demo-draft"), ("dtype", "fp32"), ("generations", GENERATIONS)):
        if getattr(given, name) != value:
            words += [f"--{name}", str(getattr(given, name))]
    return shlex.join(words)


def _result(given: argparse.Namespace, device: torch.device, told: soaking.Found) -> dict:
    host, objects = (soaking.growth(told.samples, name) for name in ("host_mb", "objects"))
    on_device = soaking.growth(told.samples, "device_mb")
    grown = [value for value in (host, on_device) if value is not None]
    flat = host is not None and all(value <= given.bound_mb for value in grown) and objects <= given.bound_objects
    return digest.seal(
        {
            "soak_schema": file.SCHEMA,
            "model": given.model,
            "draft": None if given.draft == "none" else given.draft,
            "dtype": given.dtype,
            "device": device.type,
            "generations": told.generations,
            "seconds": round(told.seconds, 1),
            "bound_mb": given.bound_mb,
            "bound_objects": given.bound_objects,
            "host_growth_mb": float(host or 0.0),
            "device_growth_mb": None if on_device is None else float(on_device),
            "object_growth": float(objects or 0.0),
            "changed": told.changed,
            "flat": flat,
            "works": told.works,
            "left_out": told.left_out,
            "samples": told.samples,
            "environment": environment(device),
            "command": _command(given),
            "source_sha256": source_sha256(),
            "recorded_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
    )


def _fault(result: dict) -> str | None:
    """What is wrong, in one sentence."""
    if result["changed"] is not None:
        return result["changed"]
    if result["flat"]:
        return None
    where = f"over {result['generations']:,} generations"
    for name, what in (("host_growth_mb", "memory"), ("device_growth_mb", "the device's memory")):
        if result[name] is not None and result[name] > result["bound_mb"]:
            return f"{what} grew by {result[name]:.1f} MB {where}, and the bound is {result['bound_mb']:g} MB"
    return f"{result['object_growth']:.0f} Python objects were left {where}, and the bound is {result['bound_objects']}"


def _table(result: dict) -> Table:
    first, last = result["samples"][0], result["samples"][-1]
    title = f"{result['model']} {result['dtype']} on {result['device']}: {result['generations']:,} generations"
    made = Table("what", "first", "last", "growth", title=f"{title} in {result['seconds']:.0f} s")
    for figure, grown, what in (
        ("host_mb", "host_growth_mb", "memory of this process, MB"),
        ("device_mb", "device_growth_mb", "memory of the device, MB"),
        ("objects", "object_growth", "Python objects"),
    ):
        if first[figure] is not None:
            made.add_row(what, *(f"{value:,.1f}" for value in (first[figure], last[figure], result[grown])))
    checked = sum("vanilla" in work for work in result["works"].values())
    made.add_row(
        f"texts: {len(result['works'])}, {checked} of them vanilla's", "", "", result["changed"] or "none changed"
    )
    for name, why in result["left_out"].items():
        made.add_row(f"left out: {name}", "", "", why)
    return made
