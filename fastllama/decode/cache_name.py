"""What transformers calls a cache of keys and values, in its arguments and in its outputs."""

import inspect

from transformers import LlamaForCausalLM

CACHE_NAMES = ("cache", "past_key_values")  # since 5.24, and before, which 5.24 still takes
CACHE_NAME = next(name for name in CACHE_NAMES if name in inspect.signature(LlamaForCausalLM.forward).parameters)
