"""The subject of a sweep: a Llama on the fast path, or any other model through transformers' own code.

Legend: T tokens, V vocabulary.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import fastllama
from fastllama import demo
from fastllama.decode.cache_name import CACHE_NAME
from fastllama.lab.fault import explained, sentence
from fastllama.lab.measuring import checkpoint, environment, vanilla
from fastllama.lab.measuring.checkpoint import Checkpoint
from fastllama.lab.measuring.contestant import synchronize
from fastllama.lab.options import flags
from fastllama.lab.options.setting import Setting
from fastllama.model.config import FastConfig

_NO_SHIFT = "its cache cannot be turned to other positions"
_NOT_VANILLA = {
    "cache_k": "transformers' cache has the model's own dtype",
    "cache_v": "transformers' cache has the model's own dtype",
    "grp_attn_n": _NO_SHIFT,
    "grp_attn_w": _NO_SHIFT,
    "keep": _NO_SHIFT,
    "context": "transformers' cache grows with the text",
    "no_kv_offload": "transformers' cache lies with the weights",
    "parallel": "only the fast path runs several sequences in turns",
    "sequences": "only the fast path runs several sequences in turns",
    "p_split": "only the fast path has drafts that split",
}


@dataclass(frozen=True)
class Source:
    """What is to be loaded: `name` as asked for, `place` a folder or a hub name."""

    name: str
    place: str
    is_llama: bool
    longest: int  # positions that the model was made for

    @property
    def path_word(self) -> str:
        """The model's name as part of a file's."""
        return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in Path(self.name).name)


def draft_of(name: str) -> str | None:
    """The draft of a model that has one of its own: the demo, and the demo in a larger body."""
    return "demo-draft" if name == "demo" or name.startswith("inflated:") else None


def find(name: str, dtype: torch.dtype) -> Source:
    """Raises `OSError` or `ValueError` where there is no such model."""
    place = demo.resolve(name, dtype)
    try:
        config = AutoConfig.from_pretrained(Path(place).expanduser() if Path(place).expanduser().is_dir() else place)
    except (OSError, ValueError):
        found = checkpoint.find(name, dtype)  # says in one sentence what is wrong
        config = found.config
    longest = getattr(config, "max_position_embeddings", None) or 2**31
    return Source(name, str(Path(place).expanduser()), config.model_type == "llama", longest)


def _ends(model: nn.Module) -> frozenset[int]:
    found = model.generation_config.eos_token_id
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])


def _load(source: Source, cls, dtype: torch.dtype, device: torch.device):
    found = Checkpoint(source.name, source.place, None)
    return checkpoint.load(found, cls, dtype, device)


def threads_of(values: dict) -> int:
    """Threads that run: more than there are processors to use would only wait for one another."""
    return min(values["threads"], environment.usable_cores() or values["threads"])


class Subject:
    """A loaded model. `reserve` makes it ready for a setting; then `prefill` and `step` as the fast path has them.

    `load_ms`: loading the model, once, and what the last reservation took.
    """

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device, compile: str, draft: str | None):
        cls = fastllama.LlamaForCausalLM if source.is_llama else AutoModelForCausalLM
        self.source, self.compile, self.draft_name = source, compile, draft
        self.model, self._model_s = _load(source, cls, dtype, device)
        self.load_ms = 1000 * self._model_s
        self.ends = _ends(self.model)
        vanilla.plain_greedy(self.model, next(iter(self.ends), 0))  # a checkpoint's own sampling is not asked for
        self.draft, self._scorer = None, None
        self._cache: DynamicCache | None = None
        if draft is not None and source.is_llama:
            self.draft, _ = _load(find(draft, dtype), fastllama.LlamaForCausalLM, dtype, device)
        if dtype != torch.float32:
            plain = vanilla.LlamaForCausalLM if source.is_llama else AutoModelForCausalLM
            self._scorer, _ = _load(source, plain, torch.float32, device)

    @property
    def scorer(self) -> nn.Module:
        """The same model in fp32: what a text's perplexity is under."""
        return self.model if self._scorer is None else self._scorer

    @property
    def path(self) -> str:
        """Which code ran, in words."""
        if not self.source.is_llama:
            kind = type(self.model).__name__
            return f"transformers' {kind} with our samplers: the fast path does not cover it"
        return self.model._engine.words()

    def context(self, values: dict) -> int:
        """Positions that a text has before it must shift; the model's own where it has fewer."""
        if not self.source.is_llama:
            return self.source.longest
        return min(values["context"] or self.source.longest, self.source.longest)

    def refuses(self, setting: Setting, values: dict, prompt_tokens: int, new_tokens: int) -> str | None:
        """Why this setting cannot run on a prompt; None where it can."""
        if setting.conflict is not None:
            return setting.conflict
        if not self.source.is_llama:
            name = next((name for name in setting.given if name in _NOT_VANILLA), None)
            if name is not None:
                return f"{flags.SPELLING[name]} is for the fast path, which covers Llama only: {_NOT_VANILLA[name]}"
        if "p_split" in setting.given and self.draft is None:
            return f"{flags.SPELLING['p_split']} needs a draft, and {self.source.name} has none: give --draft"
        splits = any(name in setting.given for name in flags.SPLIT)
        if "p_split" in setting.given and values["mirostat"]:
            return "mirostat follows the text as it stands, and -ps proposes tokens that may not stand"
        if {"parallel", "sequences"} & setting.given.keys() and values["grp_attn_n"] > 1:
            return "self-extend moves all rows at once, and the sequences of -np and -ns move at different times"
        length, positions = self.context(values), prompt_tokens + new_tokens - 1
        if prompt_tokens >= length:
            return f"the prompt has {prompt_tokens} tokens and the context {length}"
        fixed = splits or values["grp_attn_n"] > 1 or not self.source.is_llama
        if fixed and positions > length:
            return f"{positions} tokens do not fit the context of {length}, which cannot shift here"
        return None

    def reserve(self, values: dict, shifts: bool, rows: int = 1) -> None:
        """Raises `ValueError` or `MemoryError` where this cannot be."""
        torch.set_num_threads(threads_of(values))
        start = time.perf_counter()
        if self.source.is_llama:
            config = FastConfig(
                compile=self.compile,
                products="stock" if self.compile == "no" else "auto",
                context_shift=shifts,
                cache_device="cpu" if values["no_kv_offload"] else None,
                **{name: values[name] for name in flags.SWITCHES},
            )
            with explained(f"{self.source.name}, a cache of {rows} x {self.context(values)}"):
                self.model.preallocate(rows, self.context(values), config)
            synchronize(self.model.device)
        self.load_ms = 1000 * (self._model_s + time.perf_counter() - start)

    @torch.no_grad()
    def prefill(self, ids_1T: torch.Tensor) -> torch.Tensor:
        """Logits [1, V] behind a prompt [1, T]; a text begins."""
        if self.source.is_llama:
            return self.model.prefill(ids_1T)
        self._cache = DynamicCache(config=self.model.config)
        return self._forward(ids_1T)

    @torch.no_grad()
    def step(self, ids_11: torch.Tensor) -> torch.Tensor:
        """Logits [1, V] behind one more token [1, 1]."""
        if self.source.is_llama:
            return self.model.step(ids_11)[:, -1]
        return self._forward(ids_11)

    def _forward(self, ids_1T: torch.Tensor) -> torch.Tensor:
        out = self.model(input_ids=ids_1T, use_cache=True, logits_to_keep=1, **{CACHE_NAME: self._cache})
        return out.logits[:, -1]

    def free(self) -> None:
        """Gives back what was reserved."""
        for model in (self.model, self.draft):
            if isinstance(model, fastllama.LlamaForCausalLM):
                model.free()


def why_not(fault: BaseException) -> str:
    """A failure to reserve, in words."""
    return sentence(fault)
