"""fastllama: a drop-in LlamaForCausalLM that generates the same tokens, faster."""

from fastllama.decode.exported.loaded import ExportedStep, load_step
from fastllama.decode.many.result import Generated
from fastllama.decode.sampling.options import Sampling
from fastllama.decode.sampling.processor import SamplingProcessor
from fastllama.exporting import export
from fastllama.llama import LlamaForCausalLM
from fastllama.model.config import FastConfig
from fastllama.registration import register, unregister

__version__ = "0.1.0"
__all__ = [
    "ExportedStep",
    "FastConfig",
    "Generated",
    "LlamaForCausalLM",
    "Sampling",
    "SamplingProcessor",
    "export",
    "load_step",
    "register",
    "unregister",
]
