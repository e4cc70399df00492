"""A soak, run: the works in turn, what memory they leave, and the hash of every text."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fastllama.lab.measuring.parity import output_hash
from fastllama.lab.memory import memory
from fastllama.lab.soak.works import ASSISTED, LOSSY, POSITIONS, RESERVATIONS, ROWS, WORKS, Kit, Work

SAMPLES = 40  # of a run, about


@dataclass
class Found:
    """`works`: of each, how often it ran, the hash of its text and of vanilla's. `left_out`: reservations that this
    machine or model cannot have, and why. `samples`: what was held after so many generations."""

    works: dict[str, dict] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    samples: list[dict] = field(default_factory=list)
    generations: int = 0
    seconds: float = 0.0
    changed: str | None = None  # the first text that was another, in words

    def note(self, work: Work, reservation: str, ids: torch.Tensor) -> None:
        """A text that was generated."""
        name, seen = f"{work.name}; {reservation}", output_hash(ids)
        self.generations += 1
        kept = self.works.setdefault(name, {"runs": 0, "hash": seen})
        kept["runs"] += 1
        if seen != kept["hash"] and self.changed is None:
            self.changed = (
                f"the text of {name!r} changed at generation {self.generations:,}: {seen}, and {kept['hash']} before"
            )

    def compare(self, work: Work, reservation: str, reference: str) -> None:
        """What vanilla's text hashes to; only the first run's can differ and be new."""
        kept = self.works[f"{work.name}; {reservation}"]
        kept["vanilla"] = reference
        if kept["hash"] != reference and self.changed is None:
            self.changed = f"the text of '{work.name}; {reservation}' is {kept['hash']}, and vanilla's is {reference}"


def works(kit: Kit) -> tuple[Work, ...]:
    """Everything that can run with this kit."""
    return WORKS + (ASSISTED if kit.draft is not None else ())


def cycle(kit: Kit) -> int:
    """Generations until everything has run once, where every reservation can be had."""
    return len(works(kit)) * len(RESERVATIONS)


def references(vanilla, kit: Kit) -> dict[str, str]:
    """The hashes of vanilla's texts, by the name of the work."""
    return {work.name: output_hash(work.reference(vanilla, kit)) for work in works(kit) if work.reference is not None}


def _held(model, found: Found) -> dict:
    gc.collect()
    device = model.device
    return {
        "generations": found.generations,
        "host_mb": memory.own_bytes() / 1e6,
        "device_mb": torch.cuda.memory_allocated(device) / 1e6 if device.type == "cuda" else None,
        "objects": len(gc.get_objects()),
    }


def _reserve(model, arguments: dict | None) -> None:
    if arguments is not None:
        model.preallocate(ROWS, POSITIONS, **arguments)


def _possible(model, found: Found) -> dict[str, dict | None]:
    kept = {}
    for name, arguments in RESERVATIONS.items():
        try:
            _reserve(model, arguments)
        except ValueError as refusal:
            found.left_out[name] = str(refusal)
            continue
        finally:
            model.free()
        kept[name] = arguments
    return kept


def soak(model, kit: Kit, generations: int, vanillas: dict[str, str], begin: Callable[[str], None]) -> Found:
    """At least `generations` of them, up to the end of a reservation. A text that changes ends it."""
    found, start = Found(), time.perf_counter()
    reservations, sampled = _possible(model, found), 0
    every = max(generations // SAMPLES, 1)
    while found.generations < generations and found.changed is None:
        for name, arguments in reservations.items():
            begin(f"{found.generations:,} of {generations:,} generations")
            _reserve(model, arguments)
            for work in works(kit):
                found.note(work, name, work.run(model, kit))
                if work.name in vanillas and name not in LOSSY and "vanilla" not in found.works[f"{work.name}; {name}"]:
                    found.compare(work, name, vanillas[work.name])
                if found.changed is not None:
                    break
            model.free()
            if kit.draft is not None:
                kit.draft.free()
            if found.generations >= sampled + every:
                found.samples.append(_held(model, found))
                sampled = found.generations
            if found.changed is not None or found.generations >= generations:
                break
    if found.changed is not None:
        found.samples.append(_held(model, found))
    found.seconds = time.perf_counter() - start
    return found


def growth(samples: list[dict], figure: str) -> float | None:
    """What the last quarter of the samples holds more than the second: medians, the first quarter being warm-up.

    A leak in every generation shows half of what it lost in the whole run. None where a sample lacks the figure.
    """
    values = [sample[figure] for sample in samples]
    if None in values or len(values) < 4:
        return None
    quarter = len(values) // 4
    return statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter])
