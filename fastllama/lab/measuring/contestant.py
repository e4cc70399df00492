"""Contestants: models that generate on the same workload, sharing one copy of the weights where both hold floats.

B batch, P prompt tokens, N new tokens
"""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StaticCache
from transformers.distributed import DistributedConfig

import fastllama
from fastllama.decode.cache_name import CACHE_NAME
from fastllama.lab.devices.world import meet
from fastllama.lab.fault import explained
from fastllama.lab.measuring import assisted, checkpoint, drafting, vanilla
from fastllama.lab.measuring.checkpoint import Checkpoint
from fastllama.lab.measuring.parity import output_hash, top_margin
from fastllama.lab.points.point import Point
from fastllama.lab.points.sampler import Sampler
from fastllama.lab.points.workload import Prompt

_OURS = ("ours", "unassisted")


def synchronize(device: torch.device) -> None:
    """Wait for the device's work, so that a clock sees all of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass
class Contestant:
    """One way to generate, and what was seen of it. Times in seconds."""

    name: str  # "ours", "unassisted" (ours as well), "vanilla", "compiled" or "static"
    model: torch.nn.Module
    load_s: float | None = None
    compile_s: float = 0.0
    warmup_s: float = 0.0
    runs: list[dict] = field(default_factory=list)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)  # by hash, in the order they appeared
    sampler: Sampler = field(default_factory=Sampler)
    seed: int = 0
    reserved_bytes: int | None = None  # what `preallocate` took
    prefill_chunk: int | None = None  # transformers' prefill_chunk_size; ours has it as a switch
    positions: int | None = None  # that "static" reserves
    assistance: dict = field(default_factory=dict)  # arguments of generate that bring it
    reports: list[dict] = field(default_factory=list)  # of the timed runs, where there is assistance
    told: dict | None = None  # the last call's report
    _path: str | None = None

    def generate(self, prompt: Prompt, new_tokens: int) -> tuple[torch.Tensor, float]:
        """(new ids int64 [B, N] on the CPU, seconds of the call); exactly `new_tokens`, drawn from the seed anew."""
        device = self.model.device
        input_ids, attention_mask = prompt.input_ids.to(device), prompt.attention_mask.to(device)
        with torch.no_grad(), explained(f"{self.name}, batch {len(input_ids)}, generating"):
            if self.sampler.do_sample:
                torch.manual_seed(self.seed)
            synchronize(device)
            start = time.perf_counter()
            ids = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                **self.sampler.arguments,
                **self._extra(),
            )
            synchronize(device)
            seconds = time.perf_counter() - start
        new_ids = ids[:, input_ids.shape[1] :].cpu()
        if new_ids.shape != (len(input_ids), new_tokens):
            raise RuntimeError(f"{self.name} returned {tuple(new_ids.shape)} new tokens and not {new_tokens} a row")
        if self.name in _OURS:
            if new_tokens > 1 or self._path is None:  # with one token nothing is stepped, and no context moves
                self._path = self.model.path  # of this contestant's own call: two may share a model
            self.told = self._report() if self.assistance else None
        return new_ids, seconds

    def _report(self) -> dict:
        if self.model.assisted is None:
            raise ValueError(f"this call cannot be assisted on the fast path: {self.model.path}")
        return assisted.report_of(self.model.assisted)

    def _extra(self) -> dict:
        """Arguments of `generate` that only this contestant has."""
        extra: dict[str, Any] = {} if self.prefill_chunk is None else {"prefill_chunk_size": self.prefill_chunk}
        extra |= self.assistance
        if self.name == "compiled":
            # transformers would compile a static cache's forward by itself on a GPU; ours is compiled already.
            extra |= {"cache_implementation": "static", "disable_compile": True}
        elif self.name == "static":
            cache = StaticCache(config=self.model.config, max_cache_len=self.positions)
            extra |= {CACHE_NAME: cache, "disable_compile": True}
        return extra

    def warm_up(self, prompt: Prompt, new_tokens: int, times: int) -> None:
        """Run both timed calls `times` times. The longer comes first, so that a static cache has its final size."""
        if self.name == "compiled":
            # Its graphs are made by its first calls; ours were made by preallocate.
            self.compile_s = self._both(prompt, new_tokens)
        self.warmup_s = sum(self._both(prompt, new_tokens) for _ in range(times))

    def _both(self, prompt: Prompt, new_tokens: int) -> float:
        return self.generate(prompt, new_tokens)[1] + self.generate(prompt, 1)[1]

    def time_whole(self, prompt: Prompt, new_tokens: int) -> None:
        """Begin a run: t_N. The ids are kept, so that a run which gives others is noticed."""
        new_ids, seconds = self.generate(prompt, new_tokens)
        self.runs.append({"total_s": seconds})
        self.outputs.setdefault(output_hash(new_ids), new_ids)
        self.reports += [self.told] if self.told is not None else []

    def time_first(self, prompt: Prompt) -> None:
        """End a run: t_1."""
        self.runs[-1]["first_s"] = self.generate(prompt, 1)[1]

    def margin(self, prompt: Prompt, row: int, new_ids: torch.Tensor) -> float:
        """By how much (logits, fp32) the token that follows `new_ids` [N] in a row was preferred to the next best.

        After penalties and bans, as greedy decoding sees them. NaN where tokens are drawn: a draw has no such margin.
        """
        if self.sampler.do_sample:
            return float("nan")
        ids = torch.cat([prompt.input_ids[row], new_ids])[None].to(self.model.device)
        mask = torch.cat([prompt.attention_mask[row], torch.ones_like(new_ids)])[None].to(self.model.device)
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                min_new_tokens=1,
                max_new_tokens=1,
                return_dict_in_generate=True,
                output_scores=True,
                **self.sampler.arguments,
            )
        return top_margin(out.scores[0][0])

    @property
    def path(self) -> str:
        """What ran, in words; ours as it says itself after a call."""
        if self._path is None:
            return self.model.path if self.name in _OURS else "transformers, eager"
        return self._path

    def free(self) -> None:
        """Give back what ours and its draft reserved."""
        for model in (self.model, self.assistance.get("assistant_model")):
            if isinstance(model, fastllama.LlamaForCausalLM):
                model.free()


def _preallocate(model, point: Point) -> tuple[float, int]:
    """(seconds, bytes reserved)."""
    start = time.perf_counter()
    rows = point.workload.batch_size
    with explained(f"{point.model}, batch {rows}, cache of {point.positions}"):
        nbytes = model.preallocate(batch_size=rows, cache_length=point.positions, config=point.config)
    synchronize(model.device)
    return time.perf_counter() - start, nbytes


def load_alone(point: Point, found: Checkpoint, name: str, pad: int) -> Contestant:
    """One contestant by itself, as its user would load it: compiled and preallocated as the point says."""
    cls = fastllama.LlamaForCausalLM if name == "ours" else vanilla.LlamaForCausalLM
    fast = {"fast": point.config} if name == "ours" and point.weights is not None else {}
    if point.world_size > 1:
        fast["distributed_config"] = DistributedConfig(tp_plan="auto")
    model, seconds = checkpoint.load(found, cls, point.torch_dtype, torch.device(point.device), **fast)
    if point.world_size > 1:
        meet()  # one may have loaded for minutes longer; a message may not be so late
    vanilla.plain_greedy(model, pad)
    contestant = Contestant(name, model, seconds, sampler=point.workload.sampler, seed=point.workload.seed)
    contestant.prefill_chunk = None if name == "ours" else point.prefill_chunk
    if point.world_size > 1 and name == "vanilla":
        contestant._path = f"transformers, eager, tensor parallel over {point.world_size} processes"
    if name == "static":
        contestant.positions = point.positions
        contestant._path = f"transformers, eager, static cache of {point.positions}"
    if name == "ours":
        contestant.compile_s, contestant.reserved_bytes = _preallocate(model, point)
        contestant.assistance = drafting.arguments(point, model, drafting.load(point, pad))
    elif name == "compiled":
        vanilla.compile_forward(model, point.compile)
        contestant._path = f"transformers, static cache, compiled {point.compile}"
    return contestant


def load_all(point: Point, found: Checkpoint, pad: int) -> list[Contestant]:
    """The point's contestants, the subject first; those after it share its weights and load nothing.

    Weights in few bits, or spread over processes, cannot be shared: the others load their own then. "unassisted" is the
    subject's own model, in the same reservation, and comes last.
    """
    subject = load_alone(point, found, point.contestants[0], pad)
    others = []
    for name in point.contestants[1:]:
        if point.weights is not None or point.world_size > 1:
            others.append(load_alone(point, found, name, pad))
            continue
        model = vanilla.share(subject.model, found.config)
        model.generation_config = subject.model.generation_config
        others.append(Contestant(name, model, sampler=subject.sampler, seed=subject.seed))
        others[-1].prefill_chunk = None if point.preallocate else point.prefill_chunk
    if point.assistance.active:
        others.append(Contestant("unassisted", subject.model, sampler=subject.sampler, seed=subject.seed))
    return [subject, *others]
