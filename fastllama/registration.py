"""register(): makes transformers build our class wherever it would build its own for `model_type: llama`."""

import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from fastllama.llama import LlamaForCausalLM

_PARENT = LlamaForCausalLM.__bases__[0]


def _registered() -> dict:
    # AutoModelForCausalLM.register() has no inverse, and in some versions ignores a configuration of transformers' own.
    return AutoModelForCausalLM._model_mapping._extra_content


def register() -> None:
    """Auto classes, `pipeline`, `transformers serve` and lm-eval build `fastllama.LlamaForCausalLM` from now on."""
    _registered()[LlamaConfig] = LlamaForCausalLM
    # `transformers serve` looks the architecture's name up on the package.
    transformers.LlamaForCausalLM = LlamaForCausalLM


def unregister() -> None:
    """Undoes `register`."""
    _registered().pop(LlamaConfig, None)
    transformers.LlamaForCausalLM = _PARENT
