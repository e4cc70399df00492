"""Lines of low precision: small weights and small caches beside the model's own floats, in turns."""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from fastllama.lab.measuring import checkpoint
from fastllama.lab.measuring.ceiling import Ceiling, step_bytes
from fastllama.lab.measuring.contestant import synchronize
from fastllama.lab.memory import memory
from fastllama.lab.points.point import Point
from fastllama.lab.points.workload import Workload
from fastllama.lab.quality import quality, windows
from fastllama.lab.suite.line import Case, Measured
from fastllama.lab.suite.neighbour import neighbour
from fastllama.lab.suite.rounds import Lane, Stable, ratio, stable, take_turns

_OWN = "own"  # the lane in the model's own floats
_WEIGHTS, _CACHES = ("int8", "int4"), ("int8", "q8_0", "q4_0")
_SPARE = 96
_SHORT = 24, 128  # prompt tokens: in native steps, and where a block of weights is widened
_QUALITY_TOKENS = 20_000


def _compared(held: Stable, own: Lane) -> list[tuple[str, str]]:
    """The float lane is held to vanilla; the others' text may differ, and their quality is a figure."""
    return [held.check(own), (held.case.dtype, "lossy")]


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two logits [V], over the largest logit of the second."""
    one, other = one.float(), other.float()
    return ((one - other).abs().max() / other.abs().max()).item()


def _logits(lane: Lane) -> torch.Tensor:
    """Of the first token after the lane's prompt [V], by way of a step that reads what the prompt stored."""
    ids_1T = lane.prompt.input_ids.to(lane.model.device)
    lane.model.prefill(ids_1T[:, :-1])
    lane.used = None
    return lane.model.step(ids_1T[:, -1:])[0, -1]


def weights(case: Case, device: str) -> Measured:
    """A step with int8 and int4 weights beside one with floats, and the ceiling's share that each reads."""
    ceiling = Ceiling(torch.device(device))
    ceiling.measure()
    with stable(case, device) as held:
        lanes = [held.lane(_OWN, 1, case.prompt_length, case.prompt_length + _SPARE)]
        lanes += [
            held.loaded(name, 1, case.prompt_length, case.prompt_length + _SPARE, weights=name) for name in _WEIGHTS
        ]
        read = {lane.name: step_bytes(lane.model, [case.prompt_length], _SPARE) for lane in lanes}
        apart = {lane.name: _apart(_logits(lane), _logits(lanes[0])) for lane in lanes[1:]}
        taken = take_turns(lanes, case.runs)
        checks = _compared(held, lanes[0])
    ceiling.measure()
    figures = {f"{name}_speedup": ratio(taken, _OWN, name) for name in _WEIGHTS}
    figures |= {f"{name}_logits_apart": value for name, value in apart.items()}
    for name, seconds in taken.items():
        figures[f"{name}_ceiling_fraction"] = read[name] / median(seconds) / (ceiling.gb_per_s * 1e9)
        figures[f"{name}_ms"] = 1000 * median(seconds)
    figures["ceiling_gb_per_s"] = ceiling.gb_per_s
    return Measured(figures, samples={"step_s": taken}, checks=checks)


@dataclass
class Reading:
    """A lane that reads the first P tokens of its prompt."""

    name: str
    lane: Lane
    length: int

    def seconds(self, steps: int = 1) -> float:
        """Of one prefill, whatever `steps` says."""
        model = self.lane.model
        ids_1P = self.lane.prompt.input_ids[:, : self.length].to(model.device)
        synchronize(model.device)
        start = time.perf_counter()
        model.prefill(ids_1P)
        synchronize(model.device)
        return time.perf_counter() - start


def prompts(case: Case, device: str) -> Measured:
    """Reading a prompt with int8 and with int4 weights beside reading it with floats: short, longer, the case's."""
    with stable(case, device) as held:
        length = case.prompt_length
        lanes = [held.lane(_OWN, 1, length, length + _SPARE)]
        lanes += [held.loaded(name, 1, length, length + _SPARE, weights=name) for name in _WEIGHTS]
        sizes = (*_SHORT, length)
        apart = {lane.name: max(_apart(*_read(size, lane, lanes[0])) for size in sizes) for lane in lanes[1:]}
        taken = take_turns([Reading(f"{lane.name}_{size}", lane, size) for size in sizes for lane in lanes], case.runs)
        checks = _compared(held, lanes[0])
    figures = {
        f"{name}_prompt_{size}_ratio": ratio(taken, f"{name}_{size}", f"{_OWN}_{size}")
        for size in sizes
        for name in _WEIGHTS
    }
    figures |= {f"{name}_logits_apart": value for name, value in apart.items()}
    figures |= {f"{name}_ms": 1000 * median(seconds) for name, seconds in taken.items()}
    return Measured(figures, samples={"prefill_s": taken}, checks=checks)


def _read(size: int, *lanes: Lane) -> list[torch.Tensor]:
    """The logits [V] that follow the first `size` tokens of each lane's prompt."""
    return [lane.model.prefill(lane.prompt.input_ids[:, :size].to(lane.model.device))[0] for lane in lanes]


def beside_llama_cpp(case: Case, device: str) -> Measured:
    """A step with int8 weights beside llama.cpp's on q8_0, and with int4 beside its q4_0; each pair in turns."""
    figures = {}
    samples: dict[str, list[float]] = {}
    length, cache_length = case.prompt_length, case.prompt_length + _SPARE
    for name, theirs in {"int8": "Q8_0", "int4": "Q4_0"}.items():
        with stable(case, device) as held:
            prompt = held.prompt(1, length)
            with neighbour(held.found, theirs, prompt, cache_length) as other:
                ours = held.loaded(name, 1, length, cache_length, weights=name)
                other.begin()
                logits_V = ours.model.prefill(prompt.input_ids)[0]
                far = _apart(other.logits(len(logits_V)), logits_V)
                taken = take_turns([ours, other], case.runs)
        figures[f"{name}_over_{theirs}"] = ratio(taken, theirs, name)
        figures |= {f"{lane}_tok_per_s": 1 / median(seconds) for lane, seconds in taken.items()}
        figures[f"{name}_logits_apart"] = far
        samples |= taken
    return Measured(figures, samples={"step_s": samples}, checks=[(case.dtype, "lossy")])


def caches(case: Case, device: str) -> Measured:
    """A step over a long past in small caches beside one in the model's own floats, and the bytes of each."""
    length = case.prompt_length
    with stable(case, device) as held:
        lanes = [held.lane(_OWN, 1, length, length + _SPARE)]
        lanes += [held.lane(name, 1, length, length + _SPARE, cache_k=name, cache_v=name) for name in _CACHES]
        sizes = {lane.name: lane.model._engine.cache.shape.nbytes for lane in lanes}
        apart = {lane.name: _apart(_logits(lane), _logits(lanes[0])) for lane in lanes[1:]}
        taken = take_turns(lanes, case.runs)
        checks = _compared(held, lanes[0])
    figures = {f"{name}_time_ratio": ratio(taken, name, _OWN) for name in _CACHES}
    figures |= {f"{name}_logits_apart": value for name, value in apart.items()}
    figures |= {f"{name}_memory": sizes[name] / sizes[_OWN] for name in _CACHES}
    figures |= {f"{name}_ms": 1000 * median(seconds) for name, seconds in taken.items()}
    return Measured(figures, samples={"step_s": taken}, checks=checks)


def kept_quality(case: Case, device: str) -> Measured:
    """What small weights and a small cache cost, against vanilla in fp32 on the held-out text."""
    found = checkpoint.find(case.model, case.point(device).torch_dtype)
    text = windows.text(checkpoint.tokenizer(found), _QUALITY_TOKENS, quality.WINDOW)
    reference = quality.make_reference(quality.point(case.model, "fp32", device, text.window), found, text)
    subjects = {name: {"weights": name} for name in ("int8", "int4-g32")}
    subjects |= {f"cache_{name}": {"cache_k": name, "cache_v": name} for name in _CACHES}
    figures = {}
    for name, switches in subjects.items():
        subject = quality.point(case.model, case.dtype, device, text.window, {**case.switches, **switches})
        with quality.loaded(subject, found) as model:
            score = quality.compare(model, reference)
        figures[f"{name}_perplexity_change"] = score.perplexity / score.reference_perplexity - 1
        figures[f"{name}_mean_kl"] = score.mean_kl
    return Measured(figures, checks=[(case.dtype, "lossy")])


def long_context(case: Case, device: str) -> Measured:
    """int4 weights and an int8 cache at a long context: the peak, and a step beside one over floats in the cache."""
    switches: dict[str, Any] = {**case.switches, "weights": "int4", "cache_k": "int8", "cache_v": "int8"}
    length = case.prompt_length
    work = Workload(1, length, 1)
    point = Point(case.model, case.dtype, device, work, True, switches, length + _SPARE)
    peaks = memory.peaks(point, "ours")
    with stable(case, device) as held:
        small = held.loaded("small", 1, length, length + _SPARE, **switches)
        own = held.loaded(_OWN, 1, length, length + _SPARE, weights="int4")
        apart = _apart(_logits(small), _logits(own))
        taken = take_turns([own, small], case.runs)
    figures = {"logits_apart": apart, "peak_gb": peaks.max_mem_mb / 1000, "time_ratio": ratio(taken, "small", _OWN)}
    figures |= {f"{name}_ms": 1000 * median(seconds) for name, seconds in taken.items()}
    return Measured(figures, samples={"step_s": taken}, checks=[(case.dtype, "lossy")])
