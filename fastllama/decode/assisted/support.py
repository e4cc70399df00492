"""Which assisted calls the fast path takes, the reason when it does not, and what it was asked for."""

from typing import NamedTuple

import torch
from torch import nn
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from fastllama.decode.assisted.processing import are_pure
from fastllama.decode.assisted.schedule import SCHEDULES
from fastllama.decode.support import model_obstacle
from fastllama.model.rotary import is_stateful
from fastllama.model.spread import processes

OWN = ("p_split", "draft_branches", "draft_window")  # arguments of ours that transformers does not know
ASKED = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", *OWN)
_KNOWN_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)
_OTHER_WAYS = ("assistant_early_exit", "use_mtp", "speculation_type", "assistant_ensemble_weight")
_DEFAULT_TOKENS = 20
_DEFAULT_NGRAM = 2
DEFAULT_SPLIT, DEFAULT_BRANCHES = 0.1, 4  # where only the other is given; p_split is llama.cpp's


class Asked(NamedTuple):
    """What to propose: `tokens` a round by `schedule`, drafting on above `threshold`, n-grams up to `ngram`.

    A branch splits above `p_split` while there are fewer than `branches`.
    `window`: of longer prompts a draft reads the first token and the last ones, so many in all; None reads all.
    `kept_by_draft`: the number came from the draft's generation config, to which the heuristic schedule gives it back.
    """

    tokens: int
    schedule: str
    threshold: float
    ngram: int
    kept_by_draft: bool
    p_split: float = DEFAULT_SPLIT
    branches: int = 1
    window: int | None = None

    @property
    def nodes(self) -> int:
        """Tokens of the largest tree that a round may propose."""
        return self.tokens * self.branches

    def give_back(self, draft: nn.Module | None, schedule) -> None:
        """After a call: the heuristic schedule goes on in the next one, as in transformers."""
        if draft is not None and self.schedule == "heuristic" and self.kept_by_draft:
            draft.generation_config.num_assistant_tokens = schedule.tokens

    def words(self, draft: nn.Module | None, shares_cache: bool = False) -> str:
        """For people."""
        who = "prompt lookup" if draft is None else "a draft" + " on the target's keys and values" * shares_cache
        if draft is not None and self.window is not None and not shares_cache:
            who += f" that reads at most {self.window} tokens of a prompt"
        said = f"assisted by {who}, {self.schedule} K of {'at most ' * (self.schedule == 'adaptive')}{self.tokens}"
        if self.branches == 1:
            return said
        return f"{said}, up to {self.branches} branches split above {self.p_split:g}, tree verified by the Python step"


def asked(call: dict, generation_config, draft: nn.Module | None) -> Asked:
    """What a call asks for: its own arguments, then the draft's generation config, then transformers' defaults.

    For prompt lookup, `generation_config` stands for the draft's. Raises `ValueError` for what is not allowed.
    """
    config = generation_config if draft is None else draft.generation_config

    def value(name: str, default):
        if call.get(name) is not None:
            return call[name]
        found = getattr(config, name, None)
        return default if found is None else found

    name = "num_assistant_tokens" if draft is not None else "prompt_lookup_num_tokens"
    tokens = value(name, _DEFAULT_TOKENS)
    if isinstance(tokens, bool) or not isinstance(tokens, int | float) or tokens < 1 or tokens != int(tokens):
        raise ValueError(f"{name}={tokens!r} is not allowed; allowed: an integer >= 1")
    schedule = value("num_assistant_tokens_schedule", "constant")
    if schedule not in SCHEDULES:
        raise ValueError(f"num_assistant_tokens_schedule={schedule!r} is not allowed; allowed: {', '.join(SCHEDULES)}")
    defaults = config._get_default_generation_params() if hasattr(config, "_get_default_generation_params") else {}
    # The adaptive schedule weighs what a draft costs; a fixed threshold would end one that costs next to nothing.
    usual = 0.0 if schedule == "adaptive" else defaults.get("assistant_confidence_threshold") or 0.0
    threshold = value("assistant_confidence_threshold", usual)
    if not 0 <= threshold <= 1:
        raise ValueError(f"assistant_confidence_threshold={threshold!r} is not allowed; allowed: 0 to 1")
    ngram = generation_config.max_matching_ngram_size or _DEFAULT_NGRAM
    if not isinstance(ngram, int) or ngram < 1:
        raise ValueError(f"max_matching_ngram_size={ngram!r} is not allowed; allowed: an integer >= 1")
    asked = Asked(int(tokens), schedule, float(threshold), ngram, call.get("num_assistant_tokens") is None)
    # For prompt lookup, what the model's own config says is of that model as a draft.
    p_split, branches, window = (call.get(name) if draft is None else value(name, None) for name in OWN)
    return asked._replace(**_splitting(p_split, branches, draft), window=_window(window, draft))


def _window(tokens, draft: nn.Module | None) -> int | None:
    if tokens is None:
        return None
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0 or tokens == 1:
        raise ValueError(f"draft_window={tokens!r} is not allowed; allowed: None, 0 for all, or an integer >= 2")
    if draft is None:
        raise ValueError(f"draft_window={tokens!r} is for a draft model: prompt lookup reads the whole text")
    return tokens or None


def _splitting(p_split, branches, draft: nn.Module | None) -> dict:
    if p_split is not None and (isinstance(p_split, bool) or not isinstance(p_split, int | float)):
        raise ValueError(f"p_split={p_split!r} is not allowed; allowed: 0 to 1")
    if p_split is not None and not 0 <= p_split <= 1:
        raise ValueError(f"p_split={p_split!r} is not allowed; allowed: 0 to 1")
    if branches is not None and (isinstance(branches, bool) or not isinstance(branches, int) or branches < 1):
        raise ValueError(f"draft_branches={branches!r} is not allowed; allowed: an integer >= 1")
    if p_split is None and branches is None:
        return {}
    if draft is None:
        name, given = ("p_split", p_split) if p_split is not None else ("draft_branches", branches)
        raise ValueError(f"{name}={given!r} is for a draft model: prompt lookup proposes one branch")
    return {
        "p_split": DEFAULT_SPLIT if p_split is None else float(p_split),
        "branches": DEFAULT_BRANCHES if branches is None else branches,
    }


def own_arguments(kwargs: dict) -> dict:
    """Takes what transformers does not know out of a call's arguments. Raises `ValueError` where no draft is given."""
    found = {name: kwargs.pop(name) for name in OWN if name in kwargs}
    given = [name for name, value in found.items() if value is not None]
    if given and kwargs.get("assistant_model") is None:
        raise ValueError(f"{given[0]}={found[given[0]]!r} needs assistant_model: it says how that model drafts")
    return found


def obstacle(
    model: nn.Module,
    draft: nn.Module | None,
    other_tokenizer: bool,
    input_ids: torch.Tensor,
    inputs: dict,
    logits_processor,
    stopping_criteria,
    generation_config,
) -> str | None:
    """Why this call must run the parent's assisted decoding; None when it need not."""
    if processes(model) > 1:
        return "assistance follows a clock, and each process of a spread model has its own"
    for name in _OTHER_WAYS:
        if getattr(generation_config, name, None):
            return name
    if inputs.get("inputs_embeds") is not None:
        return "inputs_embeds"
    if is_stateful(model.model.rotary_emb):
        return f"rope_type {model.model.rotary_emb.rope_type!r} depends on the longest position"
    if len(input_ids) > 1:
        reason = one_by_one(logits_processor, stopping_criteria, generation_config)
        reason = reason or _unending(stopping_criteria)
        if reason is not None:
            return f"several rows with {reason}"
    return (
        None
        if generation_config.prompt_lookup_num_tokens is not None
        else _draft_obstacle(model, draft, other_tokenizer)
    )


def _draft_obstacle(model: nn.Module, draft: nn.Module, other_tokenizer: bool) -> str | None:
    if other_tokenizer:
        return "the draft has another tokenizer"
    if draft is model:
        return "the draft is the model itself"
    if not isinstance(draft, LlamaForCausalLM):
        return f"the draft is a {type(draft).__name__}"
    reason = model_obstacle(draft) or ("it is spread over processes" if processes(draft) > 1 else None)
    return None if reason is None else f"the draft: {reason}"


def one_by_one(logits_processor, stopping_criteria, generation_config) -> str | None:
    """What must be shown each position in turn, once it is certain; None where nothing must."""
    if not are_pure(logits_processor):
        return "a logits processor that may remember what it was shown"
    if any(type(criterion) not in _KNOWN_CRITERIA for criterion in stopping_criteria):
        return "a stopping criterion of the caller's"
    if generation_config.return_dict_in_generate and (
        generation_config.output_scores or generation_config.output_logits
    ):
        return "scores or logits asked for"
    return None


def _unending(stopping_criteria) -> str | None:
    # Without an end of text transformers goes on writing to rows that are finished.
    kinds = [type(criterion) for criterion in stopping_criteria]
    if EosTokenCriteria not in kinds and any(kind is not MaxLengthCriteria for kind in kinds):
        return "a stopping criterion and no end of text"
    return None
