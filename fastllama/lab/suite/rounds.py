"""Steps timed in turns: several reservations on one copy of the weights, a few steps of each per round.

Legend: R rows, P prompt tokens, Q tokens of one step
"""

import gc
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import fastllama
from fastllama.lab.measuring import checkpoint, contestant, vanilla
from fastllama.lab.measuring.ceiling import Ceiling
from fastllama.lab.measuring.contestant import Contestant, synchronize
from fastllama.lab.measuring.parity import compare
from fastllama.lab.points import workload
from fastllama.lab.points.point import Point
from fastllama.lab.points.workload import Prompt, Workload
from fastllama.lab.suite.line import Case, Measured

_STEPS = 8  # of each lane in a round
_CHECKED = 8  # new tokens that are compared with vanilla's


@dataclass
class Lane:
    """One reservation that takes steps of Q tokens per row, beginning anew from its prompt when it is full."""

    name: str
    model: torch.nn.Module
    prompt: Prompt  # [R, P], no padding
    cache_length: int
    tokens: int = 1
    used: int | None = None

    def seconds(self, steps: int = _STEPS) -> float:
        """The median of `steps` calls of model.step, or of as many as the cache has room for behind the prompt."""
        device = self.model.device
        steps = min(steps, (self.cache_length - self.prompt.input_ids.shape[1]) // self.tokens - 1)
        ids_RQ = self.prompt.input_ids[:, -self.tokens :].to(device)
        if self.used is None or self.used + steps * self.tokens > self.cache_length:
            self.model.prefill(self.prompt.input_ids.to(device))
            self.model.step(ids_RQ)  # what the prefill pushed out of the processor's caches is read again
            self.used = self.prompt.input_ids.shape[1] + self.tokens
        taken = []
        for _ in range(steps):
            synchronize(device)
            start = time.perf_counter()
            self.model.step(ids_RQ)
            synchronize(device)
            taken.append(time.perf_counter() - start)
        self.used += steps * self.tokens
        return median(taken)


class Timed(Protocol):
    """What takes turns: `seconds(steps)` is the median of so many steps."""

    name: str

    def seconds(self, steps: int = ...) -> float: ...


class Reading:
    """The ceiling, in turns with the steps that are held against it: memory's speed changes within minutes."""

    name = "ceiling"

    def __init__(self, device: torch.device):
        self.ceiling = Ceiling(device)

    def seconds(self, steps: int = 1) -> float:
        """Of a gigabyte, whatever `steps` is."""
        return 1 / self.ceiling.measure()


def take_turns(lanes: Sequence[Timed], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each lane, one median per round; a first round is not counted."""
    for lane in lanes:
        lane.seconds(2)
    taken: dict[str, list[float]] = {lane.name: [] for lane in lanes}
    for _ in range(rounds):
        for lane in lanes:
            taken[lane.name].append(lane.seconds())
    return taken


def ratio(taken: dict[str, list[float]], name: str, base: str) -> float:
    """The median over the rounds of one lane's time over another's in the same round."""
    return median(one / other for one, other in zip(taken[name], taken[base], strict=True))


class Stable:
    """One checkpoint and models on its weights, each with a reservation of its own."""

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, torch.device(device)
        self.found = checkpoint.find(case.model, case.point(device).torch_dtype)
        self.tokenizer = checkpoint.tokenizer(self.found)
        self.models: list[fastllama.LlamaForCausalLM] = []

    def prompt(self, rows: int, length: int) -> Prompt:
        """R rows of exactly P tokens of text."""
        singles = [workload.prompt(Workload(1, length, 1, seed=row), self.tokenizer) for row in range(rows)]
        ids_RP = torch.cat([single.input_ids for single in singles])
        return Prompt(ids_RP, torch.ones_like(ids_RP))

    def lane(self, name: str, rows: int, length: int, cache_length: int, tokens: int = 1, **switches) -> Lane:
        """A lane on a model of its own, with these `switches` beside the case's. `MemoryError` if it cannot fit."""
        if not self.models:
            return self.loaded(name, rows, length, cache_length, tokens, **switches)
        model = self._another()
        self.models.append(model)
        model.preallocate(batch_size=rows, cache_length=cache_length, **{**self.case.switches, **switches})
        return Lane(name, model, self.prompt(rows, length), cache_length, tokens)

    def loaded(self, name: str, rows: int, length: int, cache_length: int, tokens: int = 1, **switches) -> Lane:
        """As `lane`, on weights of its own: those in few bits cannot be shared with floats."""
        case, switches = self.case, {**self.case.switches, **switches}
        point = Point(case.model, case.dtype, str(self.device), Workload(rows, length, 1), True, switches, cache_length)
        checkpoint.require_room(self.found, point)
        model = contestant.load_alone(point, self.found, "ours", workload.pad_id(self.tokenizer)).model
        self.models.append(model)
        return Lane(name, model, self.prompt(rows, length), cache_length, tokens)

    def _another(self) -> fastllama.LlamaForCausalLM:
        """Ours on the memory of the first model's weights, as vanilla.share does it for transformers' own class."""
        first = self.models[0]
        with torch.device("meta"):
            model = fastllama.LlamaForCausalLM(self.found.config)
        model.load_state_dict(first.state_dict(), assign=True)
        model.tie_weights()
        model.model.rotary_emb = LlamaRotaryEmbedding(config=model.config).to(first.device)
        model.generation_config = first.generation_config
        return model.eval()

    def check(self, lane: Lane) -> tuple[str, str]:
        """(dtype, verdict) of a few tokens that follow the lane's prompt; a tie counts as a difference."""
        reference = vanilla.share(lane.model, self.found.config)
        reference.generation_config = lane.model.generation_config
        pair = Contestant("ours", lane.model), Contestant("vanilla", reference)
        new_tokens = min(_CHECKED, lane.cache_length - lane.prompt.input_ids.shape[1])
        ours_RN, vanilla_RN = (each.generate(lane.prompt, new_tokens)[0] for each in pair)
        lane.used = None
        return self.case.dtype, compare(ours_RN, vanilla_RN, self.case.dtype, lambda row, position: float("inf"))[0]

    def close(self) -> None:
        for model in self.models:
            model.free()
        self.models.clear()
        gc.collect()
        torch._dynamo.reset()
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()


@contextmanager
def stable(case: Case, device: str) -> Iterator[Stable]:
    """A `Stable` that gives its memory back at the end."""
    held = Stable(case, device)
    try:
        yield held
    finally:
        held.close()


def rows(case: Case, device: str) -> Measured:
    """Time of a step of 5 and 16 rows, and of one row that takes 5 and 16 tokens, over that of one row and token."""
    length, cache_length = case.prompt_length, 2 * case.prompt_length
    with stable(case, device) as held:
        lanes = [held.lane(f"rows_{count}", count, length, cache_length) for count in (1, 5, 16)]
        lanes += [held.lane(f"verify_{count}", 1, length, cache_length, count) for count in (5, 16)]
        taken = take_turns(lanes, case.runs)
        checks = [held.check(lanes[1])]
    figures = {"step_ms": 1000 * median(taken["rows_1"])}
    figures |= {lane.name: ratio(taken, lane.name, "rows_1") for lane in lanes[1:]}
    return Measured(figures, samples={"step_s": taken}, checks=checks)


def reservation(case: Case, device: str) -> Measured:
    """Time of a token in a cache of 4096 positions over that in one of 256, as many in use in both."""
    with stable(case, device) as held:
        lanes = [held.lane(f"reserved_{size}", 1, case.prompt_length, size) for size in (256, 4096)]
        taken = take_turns(lanes, case.runs)
        checks = [held.check(lanes[1])]
    figures = {f"{lane.name}_ms": 1000 * median(taken[lane.name]) for lane in lanes}
    figures["time_ratio"] = ratio(taken, "reserved_4096", "reserved_256")
    return Measured(figures, samples={"step_s": taken}, checks=checks)


_SHORT, _SPARE = 128, 96


def context(case: Case, device: str) -> Measured:
    """What a long context adds to a token's time, over the time that the ceiling gives its keys and values."""
    reading = Reading(torch.device(device))
    with stable(case, device) as held:
        short = held.lane("short", 1, _SHORT, _SHORT + _SPARE)
        long = held.lane("long", 1, case.prompt_length, case.prompt_length + _SPARE)
        taken = take_turns([reading, short, long], case.runs)
        checks = [held.check(long)]
        point = case.point(device)
        position = checkpoint.position_bytes(held.found.config, point.torch_dtype.itemsize, *point.cache_formats)
    read = [1 / seconds for seconds in taken.pop(reading.name)]
    added = median(one - other for one, other in zip(taken["long"], taken["short"], strict=True))
    expected = position * (case.prompt_length - _SHORT) / (median(read) * 1e9)
    figures = {
        "context_cost": added / expected,
        "added_ms": 1000 * added,
        "expected_ms": 1000 * expected,
        "short_ms": 1000 * median(taken["short"]),
        "ceiling_gb_per_s": median(read),
    }
    return Measured(figures, samples={"step_s": taken, "ceiling_gb_per_s": read}, checks=checks)


@contextmanager
def _rival() -> Iterator[None]:
    """Another process that keeps one processor busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def rival(case: Case, device: str) -> Measured:
    """Time of a step while another process keeps one processor busy, over that without it."""
    with stable(case, device) as held:
        lane = held.lane("alone", 1, case.prompt_length, 2 * case.prompt_length)
        taken: dict[str, list[float]] = {"alone": [], "beside": []}
        lane.seconds(2)
        for _ in range(case.runs):
            taken["alone"].append(lane.seconds())
            with _rival():
                taken["beside"].append(lane.seconds())
        checks = [held.check(lane)]
    figures = {"time_ratio": ratio(taken, "beside", "alone")}
    figures |= {f"{name}_ms": 1000 * median(seconds) for name, seconds in taken.items()}
    return Measured(figures, samples={"step_s": taken}, checks=checks)
