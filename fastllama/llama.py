"""LlamaForCausalLM: transformers' class, so far unchanged."""

import transformers


class LlamaForCausalLM(transformers.LlamaForCausalLM):
    """A `transformers.LlamaForCausalLM`."""
