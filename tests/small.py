"""Models with weights of few bits, and what specifies them: vanilla transformers with the expanded weights."""

import copy

import torch
from transformers.models.llama.modeling_llama import LlamaForCausalLM as Vanilla

import fastllama
from fastllama.model.small_linear import SmallEmbedding, SmallLinear
from tests import tiny


def write(folder, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "10GB", **changes) -> str:
    """A float checkpoint of a tiny model whose columns divide into groups of 64; returns its folder."""
    torch.manual_seed(seed)
    model = Vanilla(tiny.config(**({"intermediate_size": 128} | changes)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers makes them zeros
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return str(folder)


def load(folder, weights: str, **arguments) -> fastllama.LlamaForCausalLM:
    return fastllama.LlamaForCausalLM.from_pretrained(folder, fast=fastllama.FastConfig(weights=weights), **arguments)


def specification(ours, dtype: torch.dtype | None = None) -> Vanilla:
    """Vanilla transformers with ours' weights, expanded to `dtype` (ours' own), in which it computes."""
    dtype = dtype or ours.dtype
    config = copy.deepcopy(ours.config)
    del config.quantization_config
    vanilla = Vanilla(config).to(dtype).eval()
    small = {
        f"{name}.weight": module
        for name, module in ours.named_modules()
        if isinstance(module, (SmallLinear, SmallEmbedding))
    }
    state = {
        name: small[name].dequantised(dtype) if name in small else tensor
        for name, tensor in ours.state_dict().items()
        if not name.endswith("weight_scale")
    }
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    vanilla.load_state_dict(state)
    return vanilla


def teacher_forced(model, inputs: dict, tokens_BQ: torch.Tensor) -> torch.Tensor:
    """Logits [B, Q + 1, V] after the prompt and after each of `tokens_BQ`: ours step by step, vanilla in one pass."""
    if isinstance(model, fastllama.LlamaForCausalLM):
        steps = [model.prefill(**inputs)[:, None]]
        steps += [model.step(tokens_BQ[:, place : place + 1]) for place in range(tokens_BQ.shape[1])]
        return torch.cat(steps, dim=1).float()
    ids = torch.cat((inputs["input_ids"], tokens_BQ), dim=1)
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(tokens_BQ)), dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return logits[:, inputs["input_ids"].shape[1] - 1 :].float()
