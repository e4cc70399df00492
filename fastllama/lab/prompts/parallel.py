"""python -m fastllama.lab parallel: requests behind one system prompt, -np at a time, as llama.cpp's parallel has them.

The system prompt is computed once, and a finished request's place is taken by the next.
"""

import argparse
import random
import time
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from fastllama.decode.many.result import Generated
from fastllama.lab.measuring import checkpoint
from fastllama.lab.points import workload
from fastllama.lab.points.option import OPTIONS
from fastllama.lab.points.point import Point
from fastllama.lab.prompts import many
from fastllama.lab.prompts.parallel_texts import REQUESTS, SYSTEM

_SHOWN = 28  # characters of a response
_SWITCHES = ("compile", "weights", "cache_k", "cache_v")
_LEAST = 0.25  # of --new-tokens, for the shortest response


@dataclass(frozen=True)
class Served:
    """One request. `prompt_tokens` are its own, behind the system prompt's. Seconds from the start of the run."""

    client: int  # the place in which it ran, from 0
    request: int
    prompt_tokens: int
    new_tokens: int
    began_s: float
    ended_s: float
    finish: str
    text: str

    @property
    def tok_per_s(self) -> float:
        """Response tokens over the time from its turn, its prompt's included, to its last token."""
        return self.new_tokens / (self.ended_s - self.began_s)


def limits(count: int, new_tokens: int, seed: int) -> list[int]:
    """Most new tokens of each request, from a quarter of `new_tokens` to all of them: requests end one by one."""
    least = max(int(_LEAST * new_tokens), 1)
    return [random.Random(f"response {seed} {place}").randint(least, new_tokens) for place in range(count)]


def serve(model, point: Point, system: list[int], requests: list[list[int]], limits, decode) -> list[Served]:
    """The requests in order, each served behind `system`. `decode`: ids to text."""
    clients = point.workload.batch_size
    ended: list[tuple[int, float]] = []  # request, when
    start = time.perf_counter()

    def note(place: int, result: Generated) -> None:
        ended.append((place, time.perf_counter() - start))

    prompts = [system + request for request in requests]
    results, _ = many.generate(model, point, prompts, limits, on_result=note, shared_prefix=len(system))
    failed = next((result.error for result in results if result.error is not None), None)
    if failed is not None:
        raise ValueError(f"a request cannot run: {failed}")
    # A place that becomes free is taken at once, by the requests in their order.
    client = {place: place for place in range(min(clients, len(prompts)))}
    began = dict.fromkeys(client, 0.0)
    for (before, then), place in zip(ended, range(clients, len(prompts)), strict=False):
        client[place], began[place] = client[before], then
    when = dict(ended)
    return [
        Served(
            client[place],
            place,
            len(requests[place]),
            result.new_tokens,
            began[place],
            when[place],
            result.finish,
            decode(result.ids),
        )
        for place, result in enumerate(results)
    ]


def table(point: Point, system_tokens: int, served: list[Served], path: str) -> Group:
    """A row for each request in the order in which they ended, and one for all of them."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
    shown.title = (
        f"{point.model_name} {point.dtype} on {point.device}: {len(served)} requests, {point.workload.batch_size} at a "
        f"time, behind a system prompt of {system_tokens} tokens that is computed once"
    )
    for name in ("request", "client", "prompt", "response", "s", "tok/s"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("", no_wrap=True, overflow="ellipsis")
    for one in sorted(served, key=lambda one: one.ended_s):
        numbers = (one.request, one.client, one.prompt_tokens, one.new_tokens)
        seconds = f"{one.ended_s - one.began_s:.2f}"
        text = " ".join(one.text.split())[:_SHOWN]
        shown.add_row(*map(str, numbers), seconds, f"{one.tok_per_s:.1f}", Text(text, "dim"))
    shown.add_section()
    whole = max(one.ended_s for one in served)
    prompts, tokens = sum(one.prompt_tokens for one in served), sum(one.new_tokens for one in served)
    shown.add_row("all", "", str(prompts), str(tokens), f"{whole:.2f}", f"{tokens / whole:.1f}", "")
    notes = (
        f"path: {path}",
        "prompt: tokens of the request itself; s: from its turn to its last token; the last row is over the whole run",
    )
    return Group(shown, *map(Text, notes))


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.add_argument("--model", default="demo", help="demo, inflated:NAME, a checkpoint's folder or hub name (demo)")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16 (auto)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (auto)")
    parser.add_argument("-np", "--parallel", default="4", metavar="N", help="requests that are decoded together (4)")
    parser.add_argument("-ns", "--sequences", default="16", metavar="M", help="requests (16)")
    parser.add_argument("-n", "--new-tokens", default="64", help="tokens of the longest response (64)")
    parser.add_argument("--seed", default="0", help="of the responses' lengths (0)")
    parser.add_argument("--system", metavar="FILE", help="UTF-8 text that stands before every request (one that ships)")
    short = {"cache_k": ["-ctk"], "cache_v": ["-ctv"]}
    for name in _SWITCHES:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, *short.get(name, []), dest=name, help=OPTIONS[name].allowed)


def _whole(flag: str, given: str, least: int) -> int:
    if not given.strip().isdecimal() or int(given) < least:
        raise ValueError(f"{flag} {given!r} is not allowed; allowed: a whole number >= {least}")
    return int(given)


def run(given: argparse.Namespace) -> int:
    """Serve the requests and print them. Raises `ValueError`, `OSError` or `MemoryError` in one sentence."""
    logging.disable_progress_bar()
    clients = _whole("-np", given.parallel, 1)
    count, new_tokens = _whole("-ns", given.sequences, 1), _whole("-n", given.new_tokens, 1)
    seed = _whole("--seed", given.seed, 0)
    system = SYSTEM if given.system is None else workload.read_text(given.system, "system prompt")
    names = ("model", "dtype", "device", *_SWITCHES)
    values = {name: value for name in names if (value := getattr(given, name)) is not None}
    point = many.plan({**values, "seed": seed}, min(clients, count), new_tokens)
    found = checkpoint.find(point.model, point.torch_dtype)
    tokenizer = checkpoint.tokenizer(found)
    before = tokenizer(system, verbose=False).input_ids
    asked = [tokenizer(REQUESTS[place % len(REQUESTS)], add_special_tokens=False).input_ids for place in range(count)]
    lengths = limits(count, new_tokens, seed)
    positions = len(before) + max(map(len, asked)) + new_tokens
    point = replace(point, workload=replace(point.workload, prompt_length=positions - new_tokens))
    model = many.load(point, found, workload.pad_id(tokenizer))
    try:
        served = serve(model, point, before, asked, lengths, lambda ids: tokenizer.decode(ids))
        path = model.path
    finally:
        model.free()
    Console().print(table(point, len(before), served, path))
    return 0
