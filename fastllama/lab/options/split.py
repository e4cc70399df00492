"""Runs of -ps, -np and -ns: a draft whose branches split, and several sequences of a prompt that take turns."""

import time
from dataclasses import dataclass, replace

import torch

from fastllama.lab.measuring.contestant import synchronize
from fastllama.lab.options import flags
from fastllama.lab.options.loop import Drawn
from fastllama.lab.options.timings import Timings

DRAFT_TOKENS = 5  # a round, as in llama.cpp


@dataclass(frozen=True)
class Sequences:
    """`ids` of each sequence, drawn with the seed of its own; `seconds` of all of them, `slots` at a time."""

    ids: list[list[int]]
    slots: int
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


def assisted(subject, prompt_ids: list[int], sampling, new_tokens: int, p_split: float) -> tuple[Drawn, str]:
    """One text, drafted by the subject's draft; and what the draft did, in words."""
    model, ids_1T = subject.model, torch.tensor([prompt_ids], device=subject.model.device)
    synchronize(model.device)
    start = time.perf_counter()
    out = model.generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        sampling=sampling,
        max_new_tokens=new_tokens,
        assistant_model=subject.draft,
        num_assistant_tokens=DRAFT_TOKENS,
        p_split=p_split,
    )
    synchronize(model.device)
    total = 1000 * (time.perf_counter() - start)
    report, new = model.assisted, out[0, len(prompt_ids) :].tolist()
    if report is None:
        raise ValueError(f"this call cannot be assisted on the fast path: {model.path}")
    # Drawing is a part of verifying there; the target's passes are eval, the draft's are in the total alone.
    phases = {
        "prompt_eval": (1000 * report.prefill_s, len(prompt_ids)),
        "eval": (1000 * report.target_s, max(len(new) - 1, 0)),
    }
    said = (
        f"draft {subject.draft_name}: {report.accepted_tokens} of {report.draft_tokens} drafted tokens accepted, "
        f"{report.target_forwards} target passes for {report.new_tokens} tokens, "
        f"{1000 * report.draft_s:.1f} ms drafting"
    )
    return Drawn(new, Timings(subject.load_ms, total, len(prompt_ids) + len(new), phases)), said


def sequences(subject, prompt_ids: list[int], values: dict, new_tokens: int, seed: int) -> Sequences:
    """`sequences` texts of one prompt, `parallel` at a time; text r is drawn with seed + r, whatever runs beside it.

    Raises `ValueError` where one cannot run.
    """
    model, sampling = subject.model, replace(flags.sampling(values, None), seed=seed)
    count, slots = flags.whole(values["sequences"]), flags.whole(values["parallel"])
    synchronize(model.device)
    start = time.perf_counter()
    results = model.generate_many([prompt_ids] * count, min(slots, count), new_tokens, sampling=sampling)
    synchronize(model.device)
    seconds = time.perf_counter() - start
    failed = next((result.error for result in results if result.error is not None), None)
    if failed is not None:
        raise ValueError(f"a sequence cannot run: {failed}")
    return Sequences([list(result.ids) for result in results], min(slots, count), seconds)
