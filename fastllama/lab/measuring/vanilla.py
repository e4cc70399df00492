"""Vanilla transformers: what we are compared with."""

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig

# From its own module: fastllama.register() may have put ours in place of transformers.LlamaForCausalLM.
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRotaryEmbedding


def share(model: nn.Module, config: LlamaConfig) -> LlamaForCausalLM:
    """A vanilla model whose parameters are the memory of `model`'s, on the same device."""
    with torch.device("meta"):
        vanilla = LlamaForCausalLM(config)
    vanilla.load_state_dict(model.state_dict(), assign=True)
    vanilla.tie_weights()
    # Frequencies are in no checkpoint, so assigning left them on the meta device.
    vanilla.model.rotary_emb = LlamaRotaryEmbedding(config=vanilla.config).to(model.device)
    meta = [name for name, tensor in (*vanilla.named_parameters(), *vanilla.named_buffers()) if tensor.is_meta]
    if meta:
        raise RuntimeError(f"vanilla's {meta[0]} was not shared")
    return vanilla.eval()


def compile_forward(vanilla: LlamaForCausalLM, mode: str) -> None:
    """Compile the forward pass in place; generate with a static cache then runs it for prefill and steps."""
    torch_mode = None if vanilla.device.type == "cpu" else "reduce-overhead"
    vanilla.forward = torch.compile(vanilla.forward, dynamic=mode == "dynamic", fullgraph=True, mode=torch_mode)


def plain_greedy(model, pad: int) -> None:
    """Drop the sampling defaults that a checkpoint brings: they warn under greedy, and penalties change it."""
    old = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=old.bos_token_id, eos_token_id=old.eos_token_id, pad_token_id=pad
    )
