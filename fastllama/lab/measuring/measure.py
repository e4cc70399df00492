"""Measure a point: vanilla and ours interleaved in one process, on the same weights and the same prompts."""

import functools
import gc
import math
from collections.abc import Callable
from dataclasses import asdict

import torch

from fastllama.lab.devices import ranks
from fastllama.lab.measuring import assisted, checkpoint, contestant, drafting, parity
from fastllama.lab.measuring.ceiling import Ceiling, step_bytes
from fastllama.lab.measuring.contestant import Contestant
from fastllama.lab.measuring.environment import environment
from fastllama.lab.measuring.parity import Divergence, output_hash, worst
from fastllama.lab.memory import memory, peak
from fastllama.lab.points import workload
from fastllama.lab.points.figures import summary
from fastllama.lab.points.point import Point
from fastllama.lab.points.workload import Prompt
from fastllama.lab.quality import quality
from fastllama.lab.records import digest
from fastllama.lab.records.schema import SCHEMA
from fastllama.lab.records.sources import source_sha256
from fastllama.model.compiled import graphs as compiled_graphs

_SAMPLE_CHARACTERS = 200


@functools.cache
def _source_sha256() -> str:
    # Of when this process began to measure: the modules that it runs are those, whatever is edited meanwhile.
    return source_sha256()


def steps(point: Point) -> int:
    """How often `measure` reports progress."""
    return len(point.contestants) + len(point.timed) + point.runs + 2 + bool(point.lossy_switches)


def measure(point: Point, progress: Callable[[str], None] = lambda doing: None) -> dict:
    """The point's record, sealed. `progress` is told what begins.

    Raises `ValueError`, `OSError` or `MemoryError` in one sentence for what cannot be measured.
    """
    source = _source_sha256()
    device = torch.device(point.device)
    found = checkpoint.find(point.model, point.torch_dtype)
    tokenizer = checkpoint.tokenizer(found)
    if point.world_size > 1:
        ranks.require_vanilla(point, found.config)
    drafting.require_match(point, tokenizer)
    checkpoint.require_room(found, point)
    prompt = workload.prompt(point.workload, tokenizer)
    predicted = peak.predict(point, point.contestants[0])
    progress("loading")
    ceiling = Ceiling(device)
    ceiling.measure()
    contestants = contestant.load_all(point, found, workload.pad_id(tokenizer))
    try:
        recompiles = _time(point, contestants, prompt, ceiling, progress)
        progress("comparing")
        record = _record(point, contestants, prompt, tokenizer, recompiles, ceiling)
    finally:
        release(point, contestants)
    if point.lossy_switches:
        progress("scoring")
        spread = (None, "scores are of one process, and the model was spread over several")
        record["score"], record["not_scored"] = quality.of_point(point, found) if point.world_size == 1 else spread
    # Last, since two copies of the weights at once might not fit, and since these processes would leave
    # compiled code on the disk, so that compile_s would never be what a first run takes.
    for name, measured in zip(point.contestants, (record, record["baseline"]), strict=False):
        progress(f"memory of {name}")
        if point.world_size > 1:
            highest, each_mb = ranks.peaks(point, name)
            record.setdefault("rank_mem_mb", each_mb)
        else:
            highest = memory.peaks(point, name)
        peaks = asdict(highest)
        load_s = peaks.pop("load_s")
        measured.update(peaks)
        # A contestant that shares the other's weights loads nothing here, but in its own process it did.
        measured["load_s"] = load_s if measured["load_s"] is None else measured["load_s"]
    if point.world_size == 1:
        record["predicted_mb"] = predicted.nbytes / 1e6
    return digest.seal({**record, "source_sha256": source})


def _time(point: Point, contestants: list[Contestant], prompt: Prompt, ceiling: Ceiling, progress) -> int:
    """Warm up and run, alternating who goes first; returns the graphs compiled after warm-up."""
    new_tokens = point.workload.new_tokens
    for each in contestants:
        progress(f"warming up {each.name}")
        each.warm_up(prompt, new_tokens, point.warmup)
    graphs = compiled_graphs()
    for run in range(point.runs):
        progress(f"run {run + 1} of {point.runs}")
        order = contestants[::-1] if run % 2 == 0 else contestants
        for each in order:
            each.time_whole(prompt, new_tokens)
        for each in order:
            each.time_first(prompt)
        ceiling.measure()
    return compiled_graphs() - graphs


def release(point: Point, contestants: list[Contestant]) -> None:
    """Give back what a point took, so that the next one starts as this one did."""
    for each in contestants:
        each.free()
    contestants.clear()
    gc.collect()
    if point.compile != "no":
        # The next point has other shapes; their graphs must not count against this one's limit.
        torch._dynamo.reset()
    if point.device != "cpu":
        torch.accelerator.empty_cache()


def judged(point: Point, subject: Contestant, reference: Contestant, prompt: Prompt, lossy: bool):
    """(verdict, divergence, hash, ids [B, N]) of the subject's worst run beside the reference's."""
    reference_BN = next(iter(reference.outputs.values()))
    drawn = bool(subject.assistance) and point.workload.sampler.do_sample

    def margin(row: int, position: int) -> float:
        return reference.margin(prompt, row, reference_BN[row, :position])

    found = {}
    for name, ids_BN in subject.outputs.items():
        found[name] = parity.compare(ids_BN, reference_BN, point.dtype, margin, lossy, drawn)
    verdict = worst([verdict for verdict, _ in found.values()])
    worse = [name for name, judgement in found.items() if judgement[0] == verdict]
    name = next((name for name in worse if found[name][1] is not None), worse[0])
    return verdict, found[name][1], name, subject.outputs[name]


def _figures(point: Point, each: Contestant) -> dict:
    return {
        "path": each.path,
        **summary(each.runs, point.workload.batch_size, point.workload.new_tokens),
        "load_s": each.load_s,
        "warmup_s": each.warmup_s,
        "runs": each.runs,
    }


def divergence_json(found: Divergence | None) -> dict | None:
    """A divergence as JSON has it."""
    if found is None:
        return None
    return {**asdict(found), "margin": found.margin if math.isfinite(found.margin) else None}


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _assisted_bytes(point: Point, subject: Contestant, prompt: Prompt, step: int) -> int:
    """Bytes read for a token of each row, of which a verification (as many bytes as a `step`) gives several."""
    rows, new_tokens = point.workload.batch_size, point.workload.new_tokens
    if new_tokens == 1:
        return step
    draft = subject.assistance.get("assistant_model")
    small = 0
    if draft is not None and not drafting.is_elsewhere(point):
        most = drafting.window(subject.model, draft)
        read = [length if most is None else min(length, most) for length in prompt.lengths]
        small = step_bytes(draft, read, new_tokens)
    rounds = sum(report["target_forwards"] - 1 for report in subject.reports)
    drafts = sum(report["draft_forwards"] for report in subject.reports)
    tokens = sum(report["new_tokens"] / rows - 1 for report in subject.reports)
    return round((rounds * step + drafts * small) / tokens)


def assisted_part(point: Point, subject: Contestant, unassisted: Contestant, prompt: Prompt, name: str) -> dict:
    """What assistance did, with the verdict on the ids (of hash `name`) that the record is of."""
    ids_BN = subject.outputs[name]
    alone = Contestant(subject.name, subject.model, assistance=subject.assistance, outputs={name: ids_BN})
    verdict, divergence, _, _ = judged(point, alone, unassisted, prompt, lossy=False)
    sizes = (point.workload.batch_size, point.workload.new_tokens)
    return assisted.of(subject, unassisted, sizes, verdict, divergence_json(divergence))


def _record(point: Point, contestants, prompt: Prompt, tokenizer, recompiles: int, ceiling: Ceiling) -> dict:
    subject = contestants[0]
    reference = contestants[1] if len(point.contestants) > 1 else subject
    reference_hash = next(iter(reference.outputs))
    verdict, divergence, name, ids_BN = judged(point, subject, reference, prompt, bool(point.lossy_switches))
    ours = _figures(point, subject)
    baseline = None
    if reference is not subject:
        baseline = {**_figures(point, reference), "hash": reference_hash}
    against = baseline or ours
    steps_per_s = ours["row_tok_per_s"]
    # Asking ours would unpack what it has packed; what shares its weights reads as many bytes.
    read_by = reference if point.weights is None else subject
    sizes = (prompt.lengths, point.workload.new_tokens, *point.cache_formats)
    step = step_bytes(read_by.model, *sizes, world_size=point.world_size)
    step = _assisted_bytes(point, subject, prompt, step) if point.assistance.active else step
    read = None if steps_per_s is None else step * steps_per_s / 1e9
    identity = point.identity()
    if point.assistance.active:
        identity["assisted"] |= assisted_part(point, subject, contestants[-1], prompt, name)
    return {
        "schema": SCHEMA,
        **identity,
        "switch_defaults": point.switch_defaults(),
        **ours,
        "compile_s": subject.compile_s,
        "hash": name,
        "reference_hash": reference_hash,
        "parity": "reference" if baseline is None else verdict,
        "first_divergence": divergence_json(divergence),
        "recompiles_after_warmup": recompiles,
        "baseline": baseline,
        "speedup": ours["tok_per_s"] / against["tok_per_s"],
        "decode_speedup": _ratio(ours["decode_tok_per_s"], against["decode_tok_per_s"]),
        "prompt_hash": output_hash(prompt.input_ids),
        "step_bytes": step,
        "read_gb_per_s": read,
        "ceiling_runs_gb_per_s": ceiling.samples,
        "ceiling_gb_per_s": ceiling.gb_per_s,
        "ceiling_fraction": _ratio(read, ceiling.gb_per_s),
        "distinct_tokens": len(set(ids_BN[0].tolist())),
        "text_sample": tokenizer.decode(ids_BN[0])[:_SAMPLE_CHARACTERS],
        "environment": environment(torch.device(point.device)),
        "command": point.command(),
    }
