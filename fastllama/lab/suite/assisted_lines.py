"""Lines of assistance: ours with it beside ours without it, example by example and in turns, and beside transformers'.

Every call is greedy and held to vanilla; K adapts unless a case says otherwise.
"""

from dataclasses import dataclass, field, replace
from statistics import median

import torch

from fastllama.lab.measuring import assisted, checkpoint, drafting, measure, vanilla
from fastllama.lab.measuring.contestant import Contestant
from fastllama.lab.points import workload
from fastllama.lab.points.assistance import Assistance
from fastllama.lab.points.point import Point
from fastllama.lab.suite.line import Bound, Case, Line, Measured
from fastllama.lab.tasks import cost, prompts, run
from fastllama.lab.tasks.run import Task


@dataclass(frozen=True)
class AssistedCase(Case):
    """A case of tasks, whose sizes are the examples'."""

    assistance: Assistance = field(default_factory=Assistance)
    tasks: tuple[str, ...] = ("decode", "benchmark")
    runs: int = 3

    def point(self, device: str, cls: type[Point] = Point, preallocate: bool = True, **changes) -> Point:
        made = super().point(device, cls, preallocate, **changes)
        return replace(made, assistance=self.assistance) if preallocate else made


def _task(case: AssistedCase, device: str, names: tuple[str, ...]) -> Task:
    """The examples of all of these tasks, in one reservation."""
    made = [run.make(name, case.point(device)) for name in names]
    longest = max(made, key=lambda task: task.point.positions)
    return replace(longest, examples=[example for task in made for example in task.examples])


def _gain(lines: list[dict]) -> float:
    """The median over the rounds of all examples' unassisted seconds over their assisted ones."""
    rounds = range(len(lines[0]["runs"]))
    plain = [sum(line["assisted"]["unassisted"]["runs"][place]["total_s"] for line in lines) for place in rounds]
    own = [sum(line["runs"][place]["total_s"] for line in lines) for place in rounds]
    return median(one / other for one, other in zip(plain, own, strict=True))


def _figures(lines: list[dict]) -> dict:
    reports = [report for line in lines for report in line["assisted"]["reports"]]
    told = assisted.summary(reports)
    names = ("acceptance", "tokens_per_target_forward", "switched_off")
    both = [cost.predicted_seconds(line) for line in lines]
    predicted = sum(plain for plain, _ in both) / sum(own for _, own in both)
    speedup = _gain(lines)
    found = {"speedup_end_to_end": speedup, "predicted_speedup": predicted, "of_predicted": speedup / predicted}
    found |= {name: told[name] for name in names}
    return found | {"drafted_a_round": cost.drafted_a_round(reports)}


def _checks(lines: list[dict]) -> list[tuple[str, str]]:
    """Of each example the verdict beside vanilla, and beside the same model unassisted."""
    return [(line["dtype"], verdict) for line in lines for verdict in (line["parity"], line["assisted"]["parity"])]


def _measured(case: AssistedCase, device: str, names: tuple[str, ...]) -> list[dict]:
    """A line's part for each example of the tasks, with the dtype."""
    task = _task(case, device, names)
    contestants = run.load(task)
    try:
        return [{**line, "dtype": case.dtype} for line in run.measure_examples(task, contestants)]
    finally:
        measure.release(task.point, contestants)


def _samples(lines: list[dict]) -> dict:
    kept = ("example", "prompt_length", "new_tokens", "runs", "assisted", "costs", "path", "hash", "parity")
    return {"examples": [{name: line[name] for name in kept} for line in lines]}


def pair(case: AssistedCase, device: str) -> Measured:
    """The gain end to end over all examples of the case's tasks."""
    lines = _measured(case, device, case.tasks)
    return Measured(_figures(lines), samples=_samples(lines), checks=_checks(lines))


def worst(case: AssistedCase, device: str) -> Measured:
    """The smallest gain of any task, with a draft model and with prompt lookup."""
    figures, kept = {}, []
    for kind, assistance in (("draft", case.assistance), ("lookup", Assistance(prompt_lookup=_LOOKUP))):
        lines = _measured(replace(case, assistance=assistance), device, case.tasks)
        kept += lines
        for name in case.tasks:
            figures[f"{kind}_{name}"] = _gain([line for line in lines if line["task"] == name])
    figures = {"worst_speedup": min(figures.values()), **figures}
    return Measured(figures, samples=_samples(kept), checks=_checks(kept))


def _theirs(task: Task, reference: Contestant) -> Contestant:
    """transformers' own assisted generation on the same target and draft, as its defaults have it."""
    found, point = drafting.find(task.point), task.point
    draft, _ = checkpoint.load(found, vanilla.LlamaForCausalLM, point.torch_dtype, torch.device(point.device))
    vanilla.plain_greedy(draft, workload.pad_id(task.tokenizer))
    drafting.widen(draft, task.found.config.vocab_size)
    return Contestant("vanilla", reference.model, assistance={"assistant_model": draft})


def beside_transformers(case: AssistedCase, device: str) -> Measured:
    """Ours assisted and transformers' own assisted generation, whole calls in turns."""
    task = _task(case, device, case.tasks)
    contestants = run.load(task)
    ours, plain = contestants[:2]
    checks = []
    kept: dict[str, list[list[float]]] = {"ours": [], "transformers": []}
    try:
        theirs = _theirs(task, plain)
        for example in task.examples:
            pair = [replace(each, runs=[], outputs={}, reports=[]) for each in (ours, theirs)]
            alone = replace(plain, runs=[], outputs={})
            for each in pair:
                each.warm_up(example.prompt, example.new_tokens, case.warmup)
            for place in range(case.runs):
                for each in pair[::-1] if place % 2 == 0 else pair:
                    each.time_whole(example.prompt, example.new_tokens)
            alone.time_whole(example.prompt, example.new_tokens)
            verdict, *_ = measure.judged(task.point, pair[0], alone, example.prompt, lossy=False)
            checks.append((case.dtype, verdict))
            for name, each in zip(kept, pair, strict=True):
                kept[name].append([timed["total_s"] for timed in each.runs])
    finally:
        measure.release(task.point, contestants)
    rounds = [
        sum(their[place] for their in kept["transformers"]) / sum(our[place] for our in kept["ours"])
        for place in range(case.runs)
    ]
    return Measured({"times_transformers": median(rounds)}, samples={"total_s": kept}, checks=checks)


def _least(figure: str, bound: float) -> tuple[Bound]:
    return (Bound(figure, ">=", bound),)


_LOOKUP = 10
_DRAFT = Assistance(draft="demo-draft")
_160M, _TINYLLAMA = "inflated:llama-160m", "inflated:tinyllama-1.1b"
_PAIR = "assisted over unassisted, end to end, short and long prompts: {model} {dtype} and "
_GAIN = "speedup_end_to_end"


def _quick(**changes) -> AssistedCase:
    case = AssistedCase("demo", "fp32", assistance=_DRAFT, tasks=("decode",))
    return replace(case, **changes)


CPU = (
    Line(
        "draft-tinyllama",
        _PAIR + "demo-draft",
        _least(_GAIN, 1.8),
        pair,
        AssistedCase(_TINYLLAMA, "bf16", assistance=_DRAFT),
    ),
    Line(
        "draft-160m",
        _PAIR + "demo-draft",
        _least(_GAIN, 1.6),
        pair,
        AssistedCase(_160M, "fp32", assistance=_DRAFT),
        quick=_quick(model=_160M, runs=2),
    ),
    Line(
        "lookup-160m",
        "assisted by prompt lookup over unassisted, where the answer repeats the input: {model} {dtype}",
        _least(_GAIN, 1.8),
        pair,
        AssistedCase(_160M, "fp32", assistance=Assistance(prompt_lookup=_LOOKUP), tasks=("lookup",)),
        quick=_quick(assistance=Assistance(prompt_lookup=_LOOKUP), tasks=("lookup",), runs=2),
    ),
    Line(
        "draft-own-int4",
        _PAIR + "its own weights in int4",
        _least(_GAIN, 1.15),
        pair,
        AssistedCase(_TINYLLAMA, "bf16", assistance=Assistance(draft_weights="int4")),
    ),
    Line(
        "draft-demo",
        "the gain over the one that measured costs and acceptance predict: {model} {dtype} and demo-draft",
        _least("of_predicted", 0.9),
        pair,
        AssistedCase("demo", "fp32", assistance=_DRAFT),
        quick=_quick(runs=2),
    ),
    Line(
        "draft-1-to-40",
        _PAIR + "a draft of a fortieth of its size",
        _least(_GAIN, 1.4),
        pair,
        AssistedCase(_TINYLLAMA, "bf16", assistance=Assistance(draft="inflated-draft:llama-27m")),
    ),
    Line(
        "assisted-worst",
        "the smallest gain of any task, with demo-draft and with prompt lookup: {model} {dtype}",
        _least("worst_speedup", 0.97),
        worst,
        AssistedCase(_160M, "fp32", assistance=_DRAFT, tasks=prompts.NAMES),
        quick=_quick(tasks=prompts.NAMES, runs=2),
    ),
    Line(
        "assisted-transformers",
        "ours assisted over transformers' own assisted generation, end to end: {model} {dtype} and demo-draft",
        _least("times_transformers", 2),
        beside_transformers,
        AssistedCase(_160M, "fp32", assistance=_DRAFT),
        quick=_quick(runs=2),
    ),
)
