"""A task, measured: each example assisted and unassisted in turns in one process, and held to vanilla transformers."""

import gc
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastllama.lab.measuring import checkpoint, contestant, drafting, measure
from fastllama.lab.measuring.checkpoint import Checkpoint
from fastllama.lab.measuring.contestant import Contestant
from fastllama.lab.measuring.environment import environment
from fastllama.lab.measuring.parity import output_hash
from fastllama.lab.points import figures, workload
from fastllama.lab.points.point import Point
from fastllama.lab.records import digest
from fastllama.lab.records.sources import source_sha256
from fastllama.lab.sweeping import plan as plans
from fastllama.lab.tasks import cost, file, prompts
from fastllama.lab.tasks.prompts import Example

_SAMPLE_CHARACTERS = 200
_OF_EXAMPLES = ("--batch-size", "--prompt-length", "--new-tokens")


@dataclass(frozen=True)
class Task:
    """`point` says how it is run: one row, and as many positions as the longest example needs."""

    name: str
    point: Point
    found: Checkpoint
    tokenizer: Any
    examples: list[Example]

    @property
    def steps(self) -> int:
        """How often `measure` reports progress."""
        return len(self.examples) + 1

    @property
    def command(self) -> str:
        """The command line that measures the task."""
        words = shlex.split(self.point.command())
        for flag in _OF_EXAMPLES:
            place = words.index(flag)
            del words[place : place + 2]
        return shlex.join([*words[:2], "--task", self.name, *words[2:]])


def make(name: str, point: Point) -> Task:
    """The task on the model, device, switches, sampler and assistance of a point, whose sizes count for nothing.

    Raises `ValueError`, `OSError` or `MemoryError` in one sentence for what cannot be run.
    """
    found = checkpoint.find(point.model, point.torch_dtype)
    tokenizer = checkpoint.tokenizer(found)
    examples = prompts.examples(name, tokenizer, point.workload.seed)
    drafting.require_match(point, tokenizer)
    work = replace(
        point.workload,
        batch_size=1,
        prompt_length=max(example.length for example in examples),
        new_tokens=max(example.new_tokens for example in examples),
        prompt_file=None,
    )
    point = replace(point, workload=work)
    checkpoint.require_room(found, point)
    return Task(name, point, found, tokenizer, examples)


def plan(name: str, given: dict, runs: int, warmup: int) -> Task:
    """The task with these options by name, as `plan.make` takes them. Raises as `make` does."""
    # The sizes are the examples'; until they are known, some that every option fits.
    largest = {"batch_size": [1], "prompt_length": [prompts.LENGTHS[-1]], "new_tokens": [prompts.NEW_TOKENS[name]]}
    sizes = {"cache_length": None} if given.get("cache_length") is not None else {}
    (point,) = plans.make(given | sizes, [], largest, runs, warmup).points
    if sizes:
        point = replace(point, workload=replace(point.workload, prompt_length=1))
        point = replace(point, cache_length=int(given["cache_length"]))
    return make(name, point)


def measure_examples(
    task: Task, contestants: list[Contestant], begin: Callable[[str], None] = lambda doing: None
) -> Iterator[dict]:
    """The measured part of each example's line, one after the other, of contestants as `load` gives them."""
    subject, costs = contestants[0], None
    if subject.assistance and not task.point.assistance.splits:  # what a tree costs follows from how it branches
        begin("measuring single steps")
        middle = sorted(task.examples, key=lambda example: example.length)[len(task.examples) // 2]
        draft = subject.assistance.get("assistant_model")
        costs = cost.measure(subject.model, draft, middle.prompt, task.point.positions)
    else:
        begin("beginning")
    for example in task.examples:
        begin(example.name)
        fresh = [replace(each, runs=[], outputs={}, reports=[]) for each in contestants]
        yield _one(task, example, fresh, costs)


def _one(task: Task, example: Example, contestants: list[Contestant], costs: dict | None) -> dict:
    point, prompt, new_tokens = task.point, example.prompt, example.new_tokens
    subject = contestants[0]
    timed = [each for each in contestants if each is subject or each.name == "unassisted"]
    for each in timed:
        each.warm_up(prompt, new_tokens, point.warmup)
    for run in range(point.runs):
        order = timed[::-1] if run % 2 == 0 else timed
        for each in order:
            each.time_whole(prompt, new_tokens)
        for each in order:
            each.time_first(prompt)
    reference = next((each for each in contestants if each.name == "vanilla"), subject)
    if reference is not subject:
        reference.time_whole(prompt, new_tokens)
    verdict, divergence, name, ids_BN = measure.judged(point, subject, reference, prompt, bool(point.lossy_switches))
    line = {
        **subject_figures(point, subject, example),
        "hash": name,
        "reference_hash": next(iter(reference.outputs)),
        "parity": "reference" if reference is subject else verdict,
        "first_divergence": measure.divergence_json(divergence),
        "assisted": None,
        "costs": costs,
        "text_sample": task.tokenizer.decode(ids_BN[0])[:_SAMPLE_CHARACTERS],
    }
    if point.assistance.active:
        sized = replace(point, workload=replace(point.workload, new_tokens=new_tokens))
        options = point.identity()["assisted"]
        line["assisted"] = {**options, **measure.assisted_part(sized, subject, timed[-1], prompt, name)}
    line["predicted_speedup"] = cost.predicted(line)
    return line


def subject_figures(point: Point, subject: Contestant, example: Example) -> dict:
    """Sizes, path, runs and speeds of one example."""
    derived = figures.summary(subject.runs, 1, example.new_tokens)
    del derived["row_tok_per_s"]
    return {
        "task": example.task,
        "example": example.name,
        "prompt_length": example.length,
        "new_tokens": example.new_tokens,
        "cache_length": point.positions,
        "prompt_hash": output_hash(example.prompt.input_ids),
        "path": subject.path,
        "runs": subject.runs,
        **derived,
    }


def load(task: Task) -> list[Contestant]:
    """The task's contestants: the subject, vanilla where it is another, and the subject unassisted."""
    return contestant.load_all(task.point, task.found, workload.pad_id(task.tokenizer))


def run(task: Task, path: Path | None = None, begin: Callable[[str], None] = lambda doing: None) -> list[dict]:
    """The sealed lines of the examples, each added to `path` before the next is measured.

    Raises `ValueError`, `OSError` or `MemoryError` in one sentence for what cannot be measured.
    """
    if path is not None:
        file.require(path)
    source = source_sha256()
    identity, facts = task.point.identity(), environment(torch.device(task.point.device))
    kept = ("model", "dtype", "device", "batch_size", "seed", "sampler", "switches")
    contestants, lines = load(task), []
    try:
        for place, line in enumerate(measure_examples(task, contestants, begin), 1):
            head = {"task_schema": file.SCHEMA, "number": place, "examples": len(task.examples)}
            head |= {field: identity[field] for field in kept}
            tail = {"environment": facts, "command": task.command, "source_sha256": source}
            lines.append(file.check_line(digest.seal({**head, **line, **tail}), f"example {line['example']}"))
            if path is not None:
                file.append(path, lines[-1])
    finally:
        measure.release(task.point, contestants)
        gc.collect()
    return lines
