"""fastllama: a drop-in LlamaForCausalLM that generates the same tokens, faster."""

from fastllama.llama import LlamaForCausalLM
from fastllama.model.config import FastConfig
from fastllama.registration import register, unregister

__all__ = ["FastConfig", "LlamaForCausalLM", "register", "unregister"]
