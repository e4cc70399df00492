"""python -m fastllama.lab context: what a shifted context costs, against computing what is left in it anew.

A shift recomputes nothing: what it keeps has seen what it dropped. So its logits differ from those of a fresh pass over
the tokens that are left, at positions 0, 1, 2, ..., and this says by how much; and what turning keys rounds, by itself.

Legend: S cache positions, K kv heads, D head dim, T positions compared, V vocabulary.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from fastllama import demo
from fastllama.kernels.rope import turn, turns
from fastllama.kernels.stored import expand, quantise
from fastllama.lab.measuring import checkpoint, contestant
from fastllama.lab.measuring.progress import progress
from fastllama.lab.points import workload
from fastllama.lab.points.option import OPTIONS
from fastllama.lab.quality import quality, windows
from fastllama.lab.quality.score import Score, compare_logits, small, summarise

TOKENS, CACHE_LENGTH, KEEP, EVERY = 2048, 256, 4, 8


@dataclass(frozen=True)
class ContextScore:
    """shifted: the shifted model against a fresh pass; `rotation_error`: what turning the cached keys by a shift and
    back changes them by, the root of the mean square over theirs. `shifts`: how many there were."""

    shifted: Score
    rotation_error: float
    shifts: int


def left(held: list[int], keep: int) -> list[int]:
    """The tokens that a shift leaves of those a full row holds."""
    return held[:keep] + held[keep + max((len(held) - keep) // 2, 1) :]


def rotation_error(keys_KSD: torch.Tensor, inv_freq: torch.Tensor, distance: int, format: str | None) -> float:
    """RMS of what a turn by `distance` positions and one back do to keys, over the keys' own.

    After each turn they are stored: rounded to their dtype, or in a format of few bits.
    """

    def stored(x: torch.Tensor) -> torch.Tensor:
        x = x.to(keys_KSD.dtype)
        return x if format is None else expand(quantise(x, format), format, x.dtype)

    start = there = stored(keys_KSD)
    for way in (distance, -distance):
        there = stored(turn(there.to(torch.promote_types(there.dtype, torch.float32)), *turns(inv_freq, way)))
    lost, own = ((x.double() ** 2).mean().sqrt().item() for x in (there.double() - start.double(), start))
    return lost / own


@torch.no_grad()
def score(ours, vanilla, ids: list[int], every: int) -> ContextScore:
    """Reads `ids` token by token through a cache that shifts, and compares from the first shift on.

    `ours` is preallocated with context_shift; at every `every`-th position `vanilla` reads anew what the cache holds.
    Both predict the text's own next token. Raises `ValueError` where the text is too short to shift.
    """
    cache = ours._engine.cache
    cache_length = cache.shape.cache_length
    prompt = cache_length // 2
    if len(ids) <= cache_length + 1:
        raise ValueError(f"a text of {len(ids)} tokens does not fill a cache of {cache_length} positions: take more")
    held, parts, shifts = ids[:prompt], [], 0
    ours.prefill(torch.tensor([held], device=ours.device))
    keep = ours._engine.context.keeps[0]
    for index in range(prompt, len(ids) - 1):
        if len(held) == cache_length:
            held, shifts = left(held, keep), shifts + 1
        held.append(ids[index])
        logits_1V = ours.step(torch.tensor([[ids[index]]], device=ours.device))[0]
        if not shifts or index % every:
            continue
        fresh = vanilla(input_ids=torch.tensor([held], device=vanilla.device), use_cache=False, logits_to_keep=1)
        parts.append(compare_logits(logits_1V, fresh.logits[0], torch.tensor(ids[index + 1 : index + 2])))
    inv_freq, format = ours.model.rotary_emb.inv_freq, None if cache.shape.is_plain else cache.shape.formats[0]
    keys = (cache.floats(layer, 1, len(held))[0][0] for layer in range(cache.shape.num_layers))
    errors = [rotation_error(x, inv_freq, (cache_length - keep) // 2, format) for x in keys]
    return ContextScore(summarise(parts), sum(errors) / len(errors), shifts)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.add_argument("--model", default="demo", help="demo, inflated:NAME, a checkpoint's folder or hub name (demo)")
    parser.add_argument("--dtype", default="fp32", help="fp32, bf16 or fp16 (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (auto)")
    parser.add_argument("--cache-length", type=int, default=CACHE_LENGTH, help="positions of the cache (%(default)s)")
    parser.add_argument("--keep", type=int, default=KEEP, help="tokens that are never dropped (%(default)s)")
    for name, short in (("cache_k", "-ctk"), ("cache_v", "-ctv")):
        parser.add_argument("--" + name.replace("_", "-"), short, help=OPTIONS[name].allowed.replace("%", "%%"))
    parser.add_argument("--file", help="UTF-8 text to read (the demo's held-out text)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of it, from its start (%(default)s)")
    parser.add_argument("--every", type=int, default=EVERY, help="compare at every so many positions (%(default)s)")


def run(given: argparse.Namespace) -> int:
    """Score and print; the exit code."""
    if demo.is_random(given.model):
        raise ValueError(f"{given.model} has random weights, which say nothing about quality: score another model")
    for name, least in (("cache_length", 4), ("every", 1), ("tokens", 2)):
        if getattr(given, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(given, name)} is below {least}")
    logging.disable_progress_bar()  # one bar at a time
    formats = {name: OPTIONS[name].value(word) for name in ("cache_k", "cache_v") if (word := getattr(given, name))}
    device = checkpoint.auto_device() if given.device == "auto" else checkpoint.check_device(given.device)
    switches = {"context_shift": True, "keep": given.keep, **formats}
    point = quality.point(given.model, given.dtype, device, given.cache_length, switches)
    found = checkpoint.find(given.model, point.torch_dtype)
    tokenizer = checkpoint.tokenizer(found)
    text = windows.text(tokenizer, given.tokens, given.tokens, given.file)
    ids = text.windows[0].ids.tolist()
    with progress(1) as begin:
        begin(f"{len(ids)} tokens through {given.cache_length} positions")
        both = contestant.load_all(point, found, workload.pad_id(tokenizer))
        scored = score(both[0].model, both[1].model, ids, given.every)
    Console().print(table(given, scored, Path(text.name).name))
    return 0


def table(given: argparse.Namespace, scored: ContextScore, text: str) -> Table:
    """One score, for people."""
    made = Table("what", "value", title=f"{Path(given.model).name} {given.dtype}: context shift against a fresh pass")
    shifted = scored.shifted
    for row in (
        ("text", f"{given.tokens} tokens of {text}"),
        ("cache", f"{given.cache_length} positions, keep {given.keep}, {given.cache_k or '-'}/{given.cache_v or '-'}"),
        ("shifts", f"{scored.shifts}"),
        ("positions compared", f"{shifted.positions}"),
        ("top-1 agreement", f"{100 * shifted.top1_agreement:.1f} %"),
        ("mean KL, nats", small(shifted.mean_kl)),
        ("99th percentile of KL", small(shifted.p99_kl)),
        ("perplexity, shifted", f"{shifted.perplexity:.4g}"),
        ("perplexity, fresh pass", f"{shifted.reference_perplexity:.4g}"),
        ("turning keys there and back, relative RMS", small(scored.rotation_error)),
    ):
        made.add_row(*row)
    return made
