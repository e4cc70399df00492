"""Lines of many prompts: ours beside vanilla's batches and beside transformers' own continuous batching, in turns.

Throughput counts the tokens that were asked for, and no other. Every prompt's text is held to vanilla's.
"""

import random
from dataclasses import dataclass
from statistics import median

import torch
from transformers import GenerationConfig

from fastllama.demo.text import held_out_text
from fastllama.lab.measuring import checkpoint, vanilla
from fastllama.lab.measuring.contestant import Contestant
from fastllama.lab.measuring.parity import compare
from fastllama.lab.points import workload
from fastllama.lab.points.workload import Prompt
from fastllama.lab.prompts import many
from fastllama.lab.suite import paged
from fastllama.lab.suite.line import Bound, Case, Line, Measured


@dataclass(frozen=True)
class ManyCase(Case):
    """`prompts` of 16 to `prompt_length` tokens, each with a limit of 16 to `new_tokens`, `batch_size` at a time.

    by_limit: whether vanilla's batches are also sorted by what is to be generated, and not only by the prompt.
    """

    prompts: int = 256
    batch_size: int = 16
    prompt_length: int = 256
    new_tokens: int = 256
    runs: int = 3
    warmup: int = 0
    seed: int = 0
    by_limit: bool = False


_LEAST = 16


def asked(case: ManyCase, tokenizer) -> tuple[list[list[int]], list[int]]:
    """(prompts cut from the held-out text, most new tokens of each), from the case's seed."""
    begin = workload.begin_ids(tokenizer)
    tokens = workload.encoded(tokenizer, held_out_text())
    prompts, limits = [], []
    for place in range(case.prompts):
        draw = random.Random(f"prompt {case.seed} {place}")
        taken = draw.randint(min(_LEAST, case.prompt_length), case.prompt_length) - len(begin)
        start = draw.randrange(len(tokens) - taken + 1)
        prompts.append(begin + tokens[start : start + taken])
        limits.append(draw.randint(min(_LEAST, case.new_tokens), case.new_tokens))
    return prompts, limits


def padded(prompts: list[list[int]], pad: int) -> Prompt:
    """The prompts as one batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    return Prompt(ids, mask)


def _batches(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


class _Race:
    """The contestants on one set of weights; each `run` gives (new ids of every prompt, seconds)."""

    def __init__(self, case: ManyCase, device: str):
        self.case = case
        point = case.point(device)
        self.found = checkpoint.find(case.model, point.torch_dtype)
        tokenizer = checkpoint.tokenizer(self.found)
        self.pad = workload.pad_id(tokenizer)
        self.prompts, self.limits = asked(case, tokenizer)
        self.point = many.sized(point, self.prompts, self.limits, self.found.config.max_position_embeddings)
        self.ours = many.load(self.point, self.found, self.pad)
        # Without an end of text each contestant generates what was asked for.
        self.ours.generation_config = GenerationConfig(do_sample=False, pad_token_id=self.pad)
        self.vanilla = vanilla.share(self.ours, self.found.config)
        self.vanilla.generation_config = self.ours.generation_config

    @property
    def tokens(self) -> int:
        return sum(self.limits)

    def run_ours(self) -> tuple[list[list[int]], float]:
        results, seconds = many.generate(self.ours, self.point, self.prompts, self.limits)
        failed = next((result.error for result in results if result.error is not None), None)
        if failed is not None:
            raise RuntimeError(f"a prompt could not run: {failed}")
        return [list(result.ids) for result in results], seconds

    def run_vanilla(self, order: list[int]) -> tuple[list[list[int]], float]:
        """Batches of neighbours in `order`, each as long as its longest limit."""
        rival, seconds = Contestant("vanilla", self.vanilla), 0.0
        made: dict[int, list[int]] = {}
        for batch in _batches(order, self.case.batch_size):
            prompt = padded([self.prompts[place] for place in batch], self.pad)
            ids, taken = rival.generate(prompt, max(self.limits[place] for place in batch))
            seconds += taken
            made |= {place: row[: self.limits[place]].tolist() for place, row in zip(batch, ids, strict=True)}
        return [made[place] for place in range(len(self.prompts))], seconds

    def by_prompt(self) -> list[int]:
        return sorted(range(len(self.prompts)), key=lambda place: len(self.prompts[place]))

    def by_limit(self) -> list[int]:
        return sorted(range(len(self.prompts)), key=lambda place: self.limits[place])

    def run_paged(self) -> tuple[list[list[int]], float]:
        # It writes to the config that it is given, and takes -1 for no end of text.
        config = GenerationConfig(do_sample=False, pad_token_id=self.pad, eos_token_id=-1)
        return paged.generate(self.vanilla, self.prompts, self.limits, self.case.batch_size, config)

    def verdict(self, place: int, ours: list[int], theirs: list[int]) -> str:
        """How one prompt's text compares with vanilla's."""
        prompt, rival = padded([self.prompts[place]], self.pad), Contestant("vanilla", self.vanilla)
        theirs_1N = torch.tensor([theirs])

        def margin(row: int, position: int) -> float:
            return rival.margin(prompt, 0, theirs_1N[0, :position])

        return compare(torch.tensor([ours]), theirs_1N, self.case.dtype, margin)[0]

    def close(self) -> None:
        self.ours.free()


def beside_batches(case: ManyCase, device: str) -> Measured:
    """Tokens asked for a second: ours, vanilla's sorted batches, and transformers' own continuous batching."""
    obstacle = paged.obstacle()
    if obstacle is not None:
        raise ValueError(obstacle)
    race = _Race(case, device)
    runners = {
        "ours": race.run_ours,
        "vanilla": lambda: race.run_vanilla(race.by_prompt()),
        "transformers": race.run_paged,
    }
    if case.by_limit:
        runners["vanilla_by_limit"] = lambda: race.run_vanilla(race.by_limit())
    taken: dict[str, list[float]] = {name: [] for name in runners}
    made = {}
    try:
        _warm_up(race)
        for turn in range(case.runs):
            for name in list(runners)[:: -1 if turn % 2 else 1]:
                made[name], seconds = runners[name]()
                taken[name].append(seconds)
        both = zip(made["ours"], made["vanilla"], strict=True)
        checks = [(case.dtype, race.verdict(place, *pair)) for place, pair in enumerate(both)]
        equal = sum(one == other for one, other in zip(made["transformers"], made["vanilla"], strict=True))
        path = race.ours.path
    finally:
        race.close()

    def times(name: str) -> float:
        return median(theirs / own for theirs, own in zip(taken[name], taken["ours"], strict=True))

    figures = {"times_vanilla": times("vanilla"), "times_transformers": times("transformers")}
    figures |= {"times_vanilla_by_limit": times("vanilla_by_limit")} if case.by_limit else {}
    figures |= {f"{name}_tok_per_s": race.tokens / median(seconds) for name, seconds in taken.items()}
    figures["transformers_equal_to_vanilla"] = equal / case.prompts
    samples = {"total_s": taken, "prompt_tokens": sum(map(len, race.prompts)), "new_tokens": race.tokens, "path": path}
    return Measured(figures, samples=samples, checks=checks)


def _warm_up(race: _Race) -> None:
    """A few short requests of each, so that nothing of the first run is a beginning."""
    kept = race.prompts, race.limits
    few = min(race.case.batch_size, race.case.prompts)
    race.prompts, race.limits = kept[0][:few], [4] * few
    race.run_ours()
    race.run_vanilla(race.by_prompt())
    race.run_paged()
    race.prompts, race.limits = kept


_WORDS = (
    "{prompts} prompts of 16 to {prompt_length} tokens, each with a limit of 16 to {new_tokens}, tokens asked for a "
    "second: ours with {batch_size} slots over vanilla in batches of {batch_size} sorted by prompt length, and over "
    "transformers' own continuous batching of {batch_size} requests (paged, on SDPA): {model} {dtype}"
)
_ASKED = (Bound("times_vanilla", ">=", 2.5), Bound("times_transformers", ">=", 1))

CPU = (
    # 16 slots: the most that the native step takes, and a step of 16 rows costs little more than one of 5.
    Line(
        "many-demo",
        _WORDS,
        _ASKED,
        beside_batches,
        ManyCase("demo", "fp32", by_limit=True),
        quick=ManyCase("demo", "fp32", prompts=32, prompt_length=64, new_tokens=64, runs=1, by_limit=True),
    ),
    Line(
        "many-160m",
        _WORDS,
        _ASKED,
        beside_batches,
        ManyCase("inflated:llama-160m", "fp32", runs=1),
    ),
)
