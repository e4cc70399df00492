"""The sweep: every setting on every prompt, each run on disk before the next begins."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch

from fastllama.lab.options import flags, loop, split
from fastllama.lab.options.aggregate import rows_of
from fastllama.lab.options.notes import notes
from fastllama.lab.options.prompts import PromptText
from fastllama.lab.options.setting import Setting
from fastllama.lab.options.store import Store
from fastllama.lab.options.subject import Source, Subject, why_not
from fastllama.lab.options.text_score import perplexity


@dataclass(frozen=True)
class Plan:
    """What is asked of a sweep. `draft`: the model that drafts for -ps, or None."""

    source: Source
    dtype: str
    device: str
    compile: str
    draft: str | None
    settings: list[Setting]
    defaults: dict
    prompts: list[PromptText]
    seed: int
    new_tokens: int
    runs: int

    def asked(self, setting: Setting, prompt: PromptText) -> dict:
        """What the tokens of a run follow from, and its name."""
        drafts = {"draft": self.draft} if "p_split" in setting.given else {}
        return {
            "model": self.source.name,
            "dtype": self.dtype,
            "device": self.device,
            "compile": self.compile,
            "option": setting.option,
            "setting": setting.name,
            "flags": setting.words,
            "values": setting.values(self.defaults),
            "prompt": prompt.name,
            "prompt_sha256": prompt.sha256,
            "seed": self.seed,
            "new_tokens": self.new_tokens,
            **drafts,
        }


@dataclass
class Found:
    """Records by (setting, prompt), in the order of the runs; and why a setting was skipped on a prompt."""

    records: dict[tuple[str, str], list[dict]] = field(default_factory=dict)
    skipped: dict[tuple[str, str], str] = field(default_factory=dict)


class Sweep:
    """One plan, in a store. `load` makes the subject when the first run is missing."""

    def __init__(self, plan: Plan, store: Store, load: Callable[[], tuple[Subject, object]]):
        self.plan, self.store, self._load = plan, store, load
        self.subject: Subject | None = None
        self.tokenizer: Any = None
        self._perplexities: dict[tuple, float] = {}
        self.found = Found()
        # All of them before any work: one that was asked otherwise must stop the sweep before it begins.
        self.done = {
            (setting.name, prompt.name, run): store.read(setting, prompt, run, plan.asked(setting, prompt))
            for setting in plan.settings
            for prompt in plan.prompts
            for run in range(1, plan.runs + 1)
        }

    @property
    def missing(self) -> int:
        """Runs that are not on disk, those among them that will be skipped."""
        return sum(record is None for record in self.done.values())

    def run(self, begin: Callable[[str], None], options_done: Callable[[str, list[dict]], object]) -> list[dict]:
        """The rows of all options; each option's as soon as it is done. `begin` is told what begins."""
        threads, rows = torch.get_num_threads(), []
        try:
            for option, settings in groupby(self.plan.settings, key=lambda setting: setting.option):
                own = []
                for setting in settings:
                    for prompt in self.plan.prompts:
                        self._fill(setting, prompt, begin)
                    own += rows_of(self.plan, setting, self.found)
                options_done(option, own)
                rows += own
        finally:
            torch.set_num_threads(threads)
            if self.subject is not None:
                self.subject.free()
        return rows

    def _fill(self, setting: Setting, prompt: PromptText, begin) -> None:
        """Every missing run of a setting on a prompt, after one that is not counted."""
        kept = [self.done[setting.name, prompt.name, run] for run in range(1, self.plan.runs + 1)]
        if None in kept:
            if self.subject is None:
                self.subject, self.tokenizer = self._load()
            prompt_ids = self.tokenizer(prompt.text, verbose=False).input_ids
            values = setting.values(self.plan.defaults)
            why = self.subject.refuses(setting, values, len(prompt_ids), self.plan.new_tokens)
            if why is None:
                why = self._make(setting, prompt, prompt_ids, kept, begin)
            if why is not None:
                self.found.skipped[setting.name, prompt.name] = why
                return
        self.found.records[setting.name, prompt.name] = kept

    def _make(self, setting: Setting, prompt: PromptText, prompt_ids: list[int], kept: list, begin) -> str | None:
        """Fills what `kept` lacks; the reason where this cannot be reserved, or cannot run."""
        values, subject = setting.values(self.plan.defaults), self.subject
        shifts = len(prompt_ids) + self.plan.new_tokens - 1 > subject.context(values)
        try:
            subject.reserve(values, shifts)
            self._text(setting, values, prompt_ids)
        except (ValueError, MemoryError) as fault:
            return why_not(fault)
        for run, record in enumerate(kept, 1):
            if record is not None:
                continue
            begin(f"{prompt.name}, {setting.name}, run {run}")
            text, path, said = self._text(setting, values, prompt_ids)
            served = self._sequences(setting, values, prompt_ids)
            said = [*notes(setting, values, subject), *said]
            kept[run - 1] = self._keep(setting, prompt, run, prompt_ids, text, served, path, said)
        return None

    def _text(self, setting: Setting, values: dict, prompt_ids: list[int]) -> tuple[loop.Drawn, str, list[str]]:
        """(the text, which code ran, what else is to be said)."""
        sampling = flags.sampling(values, self.plan.seed)
        if "p_split" not in setting.given:
            drawn = loop.run(self.subject, prompt_ids, sampling, self.plan.new_tokens)
            return drawn, self.subject.path, []
        drawn, said = split.assisted(self.subject, prompt_ids, sampling, self.plan.new_tokens, values["p_split"])
        return drawn, self.subject.model.path, [said]

    def _sequences(self, setting: Setting, values: dict, prompt_ids: list[int]) -> split.Sequences | None:
        if not {"parallel", "sequences"} & setting.given.keys():
            return None
        slots = min(flags.whole(values["parallel"]), flags.whole(values["sequences"]))
        if slots > 1:
            self.subject.reserve(values, False, slots)
        served = split.sequences(self.subject, prompt_ids, values, self.plan.new_tokens, self.plan.seed)
        if slots > 1:
            self.subject.reserve(values, False)
        return served

    def _keep(self, setting, prompt, run: int, prompt_ids: list[int], text, served, path: str, said: list[str]) -> dict:
        """Writes a run; its record."""
        asked = self.plan.asked(setting, prompt)
        record = {
            "asked": asked,
            "run": run,
            "prompt_tokens": len(prompt_ids),
            "ids": text.ids,
            "text": self.tokenizer.decode(text.ids),
            "perplexity": self._perplexity(prompt_ids, text.ids),
            "context": self.subject.context(asked["values"]),
            "default_context": self.subject.context(self.plan.defaults),
            "timings": text.timings.as_dict(),
            "path": path,
            "notes": said,
        }
        lines = [f"{name}: {value}" for name, value in asked.items() if name != "values"]
        lines += ["values: " + ", ".join(f"{name} {value}" for name, value in asked["values"].items())]
        lines += [f"path: {path}", *(f"note: {each}" for each in said), "", *text.timings.lines()]
        shown = prompt.text + record["text"] + "\n"
        if served is not None:
            texts = [self.tokenizer.decode(ids) for ids in served.ids]
            record["sequences"] = {"slots": served.slots, "ids": served.ids, "seconds": served.seconds}
            rate = f"{served.tokens / served.seconds:.2f} tokens per second"
            lines.append(f"{len(texts)} sequences, {served.slots} at a time: {served.tokens} tokens, {rate}")
            for index, each in enumerate(texts):
                shown += f"\n--- sequence {index}\n{prompt.text}{each}\n"
        self.store.write(setting, prompt, run, record, shown, lines)
        return record

    def _perplexity(self, prompt_ids: list[int], ids: list[int]) -> float:
        key = (tuple(prompt_ids), tuple(ids))
        if key not in self._perplexities:
            score = perplexity(self.subject.scorer, prompt_ids, ids, self.subject.source.longest)
            self._perplexities[key] = score
            # The forward pass may have unpacked weights: the next run must not pay for packing them again.
            self.subject.prefill(torch.tensor([prompt_ids], device=self.subject.model.device))
        return self._perplexities[key]
