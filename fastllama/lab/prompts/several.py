"""run_llama.py --prompts in several processes: each takes its share of the prompts, or all take the same steps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastllama.decode.many.call import SLOTS
from fastllama.lab.devices.world import World
from fastllama.lab.fault import sentence
from fastllama.lab.prompts import many, prompts_file
from fastllama.lab.prompts.many import Totals
from fastllama.lab.prompts.prompts_file import Asked
from fastllama.lab.prompts.results_file import Part, Results


def run(
    here: World, given: dict, prompts: Path, out: Path, slots: int | None, new_tokens: int, say: Callable[[str], None]
) -> int:
    """As `many.run`, which describes the arguments; a run may be gone on with by any number of processes."""
    lines, sha256 = prompts_file.read(prompts)
    point = many.plan(given, slots or SLOTS, new_tokens)
    asked = {"prompts": sha256, **many.settings(point)}
    results, done, header = _opened(here, out, asked, len(lines))
    left = [line for line in lines if line.index not in done]
    try:
        if here.tensor_parallel:
            totals = _together(here, results, left, replace(point, world_size=here.size))
        else:
            totals = _divided(here, results, left, point, Results.partial_of(out), header)
    finally:
        if results is not None:
            results.close()
    if here.first:
        results.finish()
        say(many.summary(results, len(done), totals, out))
    return 0


def _opened(here: World, out: Path, asked: dict, prompts: int) -> tuple[Results | None, set[int], dict]:
    """The results (the first process's), which prompts are done, what was asked. All raise what the first one does."""
    results = fault = None
    if here.first:
        try:
            results = Results(out, asked, prompts)
        except (OSError, ValueError) as found:
            fault = found
    why = here.of_first(None if fault is None else sentence(fault))
    if why is not None:
        raise fault or ValueError(why)
    done, header = here.of_first(None if results is None else (results.done, results.header))
    return results, done, header


def _together(here: World, results: Results | None, left: list[Asked], point) -> str:
    """All processes hold one model and take the same steps; the first writes."""
    add = results.add if here.first else lambda index, result: None
    return f"{many.fill(add, left, point)}"


def _divided(here: World, results: Results | None, left: list[Asked], point, partial: Path, header: dict) -> str:
    """Each process has the model whole, and its share of the prompts."""
    from accelerate import PartialState

    # Neighbours in a file are often alike: dealt like cards, the shares are of about one length.
    dealt = [line for first in range(here.size) for line in left[first :: here.size]]
    seed = (point.workload.seed + here.rank) % 2**63  # no two processes draw alike
    point = replace(point, workload=replace(point.workload, seed=seed))
    part = Part(partial, header, here.rank)
    try:
        with PartialState().split_between_processes(dealt) as mine:
            totals = many.fill(part.add, mine, point)
    finally:
        part.close()
    every = [one for one in here.of_all(totals) if one.path is not None]
    if here.first:
        results.take_in()
    if not every:
        return f"{Totals()}"
    # They ran beside each other: the longest is how long it took.
    joint = Totals(sum(one.tokens for one in every), max(one.seconds for one in every), every[0].path)
    return f"{joint} in each of {here.size} processes"
