"""Tiny Llamas with random weights, vanilla and ours with equal values, and prompts for them."""

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM as Vanilla  # register() replaces the other name

import fastllama

VOCAB = 384
ROPES = {
    "default": None,
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 24,
    },
}


def config(kv_heads: int = 2, rope: str = "default", **changes) -> LlamaConfig:
    """4 query heads of 16 dims; positions beyond 32 are past what a dynamic rope was made for."""
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
        # Wide enough that greedy text wanders instead of repeating itself.
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    if ROPES[rope] is not None:
        values["rope_parameters"] = dict(ROPES[rope])
    return LlamaConfig(**(values | changes))


def pair(kv_heads: int = 2, rope: str = "default", seed: int = 0, **changes):
    """(vanilla, ours) in eval mode, equal weights."""
    settings = config(kv_heads, rope, **changes)
    torch.manual_seed(seed)
    vanilla = Vanilla(settings).eval()
    ours = fastllama.LlamaForCausalLM(settings).eval()
    ours.load_state_dict(vanilla.state_dict())
    return vanilla, ours


def prompt(batch: str, length: int = 14, seed: int = 1) -> dict:
    """ids and mask for "one", "three" (no padding) or "padded" (three rows, two of them padded on the left)."""
    generator = torch.Generator().manual_seed(seed)
    rows = 1 if batch == "one" else 3
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if batch == "padded":
        for row, padding in ((0, 3), (2, length - 2)):
            ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs: dict, seed: int = 5, **kwargs):
    """A seeded generate call."""
    torch.manual_seed(seed)
    return model.generate(**inputs, **kwargs)


GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95}
