"""register(): makes transformers build our class wherever it would build its own for `model_type: llama`."""

import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from fastllama.llama import LlamaForCausalLM

_PARENT = LlamaForCausalLM.__bases__[0]


def register() -> None:
    """Auto classes, `pipeline`, `transformers serve` and lm-eval build `fastllama.LlamaForCausalLM` from now on."""
    AutoModelForCausalLM.register(LlamaConfig, LlamaForCausalLM, exist_ok=True)
    # `transformers serve` looks the architecture's name up on the package.
    transformers.LlamaForCausalLM = LlamaForCausalLM


def unregister() -> None:
    """Undoes `register`."""
    AutoModelForCausalLM._model_mapping._extra_content.pop(LlamaConfig, None)
    transformers.LlamaForCausalLM = _PARENT
