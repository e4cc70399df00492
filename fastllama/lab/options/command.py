"""python -m fastllama.lab options: llama.cpp's options over prompt files, every text beside the default's."""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoTokenizer
from transformers.utils import logging

from fastllama import demo
from fastllama.lab.fault import sentence
from fastllama.lab.measuring import checkpoint
from fastllama.lab.measuring.environment import environment
from fastllama.lab.measuring.progress import progress
from fastllama.lab.options import means, prompts, summary, table
from fastllama.lab.options.store import Store
from fastllama.lab.options.subject import Source, Subject, draft_of, find
from fastllama.lab.options.sweep import Plan, Sweep
from fastllama.lab.records.sources import source_sha256
from fastllama.model.config import require_allowed

SEED, NEW_TOKENS, RUNS = 987654321, 128, 3
WIDTH = 110  # of what is printed to a file
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.add_argument("--model", default="demo", help="demo, a checkpoint's folder or hub name (demo)")
    parser.add_argument("--draft", help="the model that drafts for -ps (the demo's, for the demo)")
    parser.add_argument("--dtype", default="fp32", help="fp32, bf16 or fp16 (fp32)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (auto)")
    parser.add_argument("--compile", default="no", help="no, static, dynamic, fullgraph, native (no)")
    parser.add_argument("--inputs", metavar="DIR", help="a folder of prompts, *.txt (five that ship)")
    parser.add_argument(
        "--options", metavar="PATH", help="a table of lines flags/name, or a folder of option_NAME.txt (one that ships)"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="options of the table (all)")
    parser.add_argument("--combine", default="1", help="settings of so many options together, 1 to 4 (1)")
    parser.add_argument("--new-tokens", "-n", default=str(NEW_TOKENS), help=f"tokens of a text, at most ({NEW_TOKENS})")
    parser.add_argument("--runs", default=str(RUNS), help=f"of each, after one that is not counted ({RUNS})")
    parser.add_argument("--seed", default=str(SEED), help=f"of every draw ({SEED})")
    parser.add_argument("--out", default=".", metavar="DIR", help="outputs/ and aggregation/ are made below it (.)")
    parser.add_argument("--json", metavar="FILE", help="write the means there as well")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and run nothing")


def _whole(flag: str, given: str, least: int) -> int:
    if not given.strip().isdecimal() or int(given) < least:
        raise ValueError(f"{flag} {given!r} is not allowed; allowed: a whole number >= {least}")
    return int(given)


def plan(given: argparse.Namespace) -> Plan:
    """What is asked. Raises `ValueError` or `OSError` in one sentence."""
    if given.dtype not in _DTYPES:
        raise ValueError(f"--dtype {given.dtype!r} is not allowed; allowed: {', '.join(_DTYPES)}")
    require_allowed("compile", given.compile)
    combine, new_tokens = _whole("--combine", given.combine, 1), _whole("--new-tokens", given.new_tokens, 1)
    runs, seed = _whole("--runs", given.runs, 1), _whole("--seed", given.seed, 0)
    options = table.read(given.options).chosen(given.only)
    texts = prompts.read(given.inputs)
    device = checkpoint.auto_device() if given.device == "auto" else checkpoint.check_device(given.device)
    source = find(given.model, _DTYPES[given.dtype])
    draft = given.draft or draft_of(given.model)
    if given.draft is not None and not find(given.draft, _DTYPES[given.dtype]).is_llama:
        raise ValueError(f"--draft {given.draft} is no Llama, and only Llama drafts here")
    settings = options.settings(combine)
    how = (given.dtype, device, given.compile, draft, settings, options.defaults, texts, seed, new_tokens, runs)
    return Plan(source, *how)


def _tokenizer(source: Source):
    try:
        return AutoTokenizer.from_pretrained(source.place)
    except (OSError, ValueError, KeyError) as fault:
        raise ValueError(f"{source.name} has no tokenizer that transformers reads: {sentence(fault)}") from fault


def _load(planned: Plan) -> tuple[Subject, object]:
    tokenizer = _tokenizer(planned.source)
    drafts = any("p_split" in setting.given for setting in planned.settings)
    how = (_DTYPES[planned.dtype], torch.device(planned.device), planned.compile, planned.draft if drafts else None)
    return Subject(planned.source, *how), tokenizer


def run(given: argparse.Namespace) -> int:
    """Sweep, write and print; the exit code: 130 after Ctrl-C."""
    logging.disable_progress_bar()  # one bar at a time
    planned, console = plan(given), Console()
    if not console.is_terminal:
        console.width = WIDTH
    store = Store(given.out, planned.source.path_word)
    store.require_folder()
    sweep = Sweep(planned, store, lambda: _load(planned))
    runs = len(planned.settings) * len(planned.prompts) * planned.runs
    said = (
        f"{len(planned.settings)} settings x {len(planned.prompts)} prompts x {planned.runs} runs = {runs}, "
        f"{runs - sweep.missing} of them done before"
    )
    console.print(said, highlight=False)
    if given.dry_run:
        for setting in planned.settings:
            console.print(f"{setting.option}: {setting.name} {setting.words}", highlight=False, markup=False)
        return 0
    if not planned.source.is_llama:
        console.print(
            f"{given.model} is no Llama: the fast path does not cover it, and transformers' own code runs with our "
            "samplers",
            highlight=False,
        )
    if demo.is_random(given.model):
        console.print(f"{given.model} has random weights, which say nothing about texts", highlight=False)
    source = source_sha256()  # before the run: it may be edited meanwhile
    try:
        with progress(max(sweep.missing, 1)) as begin:
            rows = sweep.run(begin, lambda option, own: store.write_csv(option, own))
    except KeyboardInterrupt:
        print(f"interrupted; what was run is kept in {store.out}, and the same command goes on", file=sys.stderr)
        return 130
    mean = means.means(rows)
    combined = f"_{given.combine}" if given.combine != "1" else ""
    path = store.write_csv(f"means{combined}", mean)
    title = f"{planned.source.name} {planned.dtype} on {planned.device}: means over {len(planned.prompts)} prompts"
    console.print(means.printed(title, mean))
    console.print(f"written to {store.out / 'outputs'} and {path.parent}", highlight=False, soft_wrap=True)
    if given.json is not None:
        summary.write(Path(given.json), planned, mean, source, environment)
    return 0
