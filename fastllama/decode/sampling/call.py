"""`generate(sampling=...)`: what the parent's generate is told instead."""

import copy
import inspect

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.utils import GenerationMixin

from fastllama.decode.sampling.options import Sampling
from fastllama.decode.sampling.processor import SamplingProcessor, StatelessSamplingProcessor

# The parent's arguments that say what `Sampling` says, or would act after it, and what makes them do nothing.
_PARENTS = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
}


def arguments(model: nn.Module, sampling: Sampling, args: tuple, kwargs: dict) -> dict:
    """Keyword arguments for the parent's generate.

    `sampling` goes before what a generation config says, as an argument does. Raises `ValueError` for arguments that
    cannot be combined with it.
    """
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling={sampling!r} is not allowed; allowed: None or a Sampling")
    names = list(inspect.signature(GenerationMixin.generate).parameters)[1:]
    kwargs = dict(zip(names, args, strict=False)) | kwargs
    config, defaults = kwargs.get("generation_config"), GenerationConfig()
    for name in _PARENTS:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}={kwargs[name]!r} cannot be combined with sampling: give it one of the two")
    if kwargs.get("do_sample") is False and not sampling.is_greedy:
        raise ValueError("do_sample=False cannot be combined with sampling: Sampling(temperature=0) takes the best")
    beams = kwargs.get("num_beams") or _of(config, "num_beams") or _of(model.generation_config, "num_beams") or 1
    if beams > 1:
        raise ValueError(f"num_beams={beams} cannot be combined with sampling")

    processors = LogitsProcessorList(kwargs.get("logits_processor") or [])
    if not sampling.is_greedy or sampling.penalises:
        processors.append((StatelessSamplingProcessor if sampling.is_stateless else SamplingProcessor)(sampling))
    kwargs["logits_processor"] = processors
    # Where rows draw by themselves, one token is left, and taking the best takes it; but transformers wants to draw
    # where there are several texts of a prompt.
    several = kwargs.get("num_return_sequences") or _of(config, "num_return_sequences") or 1
    do_sample = not sampling.is_greedy and (not sampling.draws_itself or several > 1)
    if config is None:
        return kwargs | {name: None for name in _PARENTS if hasattr(defaults, name)} | {"do_sample": do_sample}
    # transformers frowns on arguments beside a config, and fills what is None there from the model's.
    kwargs["generation_config"] = config = copy.deepcopy(config)
    config.do_sample = do_sample
    kwargs.pop("do_sample", None)
    for name, neutral in _PARENTS.items():
        if neutral is not None:
            setattr(config, name, neutral)
        elif _of(model.generation_config, name) is not None:
            kwargs[name] = None
    return kwargs


def begin(logits_processor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Tells our processors that a call begins, with prompts [B, P]."""
    for processor in logits_processor:
        if isinstance(processor, StatelessSamplingProcessor):
            processor.begin(input_ids, attention_mask)


def require_stateless(logits_processor, reason: str) -> None:
    """Raises `ValueError` where a processor of ours would be shown tokens that do not stand."""
    if any(isinstance(each, SamplingProcessor) and not each.sampling.is_stateless for each in logits_processor):
        raise ValueError(f"mirostat and seeds by row cannot be combined with assisted generation here: {reason}")


def _of(config, name: str):
    return getattr(config, name, None)
