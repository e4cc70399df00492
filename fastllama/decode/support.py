"""Which calls the fast path takes, and the reason when it does not."""

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP

from fastllama.decode.cache_name import CACHE_NAMES
from fastllama.model import spread
from fastllama.model.released import is_released

_KNOWN_INPUTS = {
    "attention_mask",
    "position_ids",
    "cache_position",
    *CACHE_NAMES,
    "use_cache",
    "inputs_embeds",
    "logits_to_keep",
    "num_logits_to_keep",
    "tokenizer",  # comes along where stop strings are asked for
}
# transformers leaves these behind once hidden states were asked for; they act only while they are asked for again.
_IDLE_HOOKS = "transformers.utils.output_capturing"
_EQUIVALENT_ATTENTION = {"sdpa", "eager", "flash_attention_2", "flash_attention_3"}


def model_obstacle(model: nn.Module) -> str | None:
    """Why this model, as it is now, must run the parent's forward; None when it need not."""
    if model.training:
        return "the model is in training mode"
    if type(model).forward is not LlamaForCausalLM.forward:
        return "a subclass has a forward of its own"
    # Prompt learning (PEFT) comes in through here.
    prepare = getattr(model.prepare_inputs_for_generation, "__func__", None)
    if prepare is not LlamaForCausalLM.prepare_inputs_for_generation:
        return "prepare_inputs_for_generation was replaced"
    if model.config._attn_implementation not in _EQUIVALENT_ATTENTION:
        return f"attn_implementation is {model.config._attn_implementation!r}"
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        return "the model is spread over several devices"
    if len(model.model.layers) != model.config.num_hidden_layers:
        return "config.num_hidden_layers is not the number of layers"
    for layer in model.model.layers:
        kinds = (type(layer), type(layer.self_attn), type(layer.mlp))
        if kinds != (LlamaDecoderLayer, LlamaAttention, LlamaMLP):
            return "a decoder layer was replaced"
    for module in model.modules():
        own = vars(module)
        if "forward" in own and not spread.is_spread(module):
            return "a module's forward was replaced"
        if "_hf_hook" in own or any(map(_acts, (own["_forward_hooks"], own["_forward_pre_hooks"]))):
            return "a module carries a forward hook"
        # Asking a module whose weight is packed would bring the weight back.
        if not is_released(module) and any(p is not None and p.is_meta for p in own["_parameters"].values()):
            return "weights are not loaded (meta device)"
    return spread.obstacle(model)


def _acts(hooks: dict) -> bool:
    return any(hook.__module__ != _IDLE_HOOKS for hook in hooks.values())


def call_obstacle(model: nn.Module, generation_config, synced_gpus: bool, inputs: dict) -> str | None:
    """Why this call must run the parent's decoding loop; None when it need not."""
    if synced_gpus:
        return "synced_gpus"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    if generation_config.cache_implementation is not None:
        return f"cache_implementation is {generation_config.cache_implementation!r}"
    if not inputs.get("use_cache", True):
        return "use_cache is off"
    if generation_config.return_dict_in_generate and (
        generation_config.output_attentions or generation_config.output_hidden_states
    ):
        return "attentions or hidden states are asked for"
    unknown = sorted(name for name in inputs.keys() - _KNOWN_INPUTS if inputs[name] is not None)
    if unknown:
        return f"an input that only forward knows: {', '.join(unknown)}"
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        return "a custom attention mask"
    if mask is not None and not bool((mask[:, -1] != 0).all()):
        return "padding on the right"
    if not _positions_are_plain(inputs.get("position_ids"), mask):
        return "custom position_ids"
    return None


def _positions_are_plain(positions: torch.Tensor | None, mask: torch.Tensor | None) -> bool:
    """Whether the real tokens of every row are at positions 0, 1, 2, ..."""
    if positions is None:
        return True
    if positions.dim() != 2:
        return False
    if mask is None:
        return bool((positions == torch.arange(positions.shape[1], device=positions.device)).all())
    if positions.shape[1] != mask.shape[1]:
        return False
    plain = mask.cumsum(-1) - 1
    return bool(((positions == plain) | (mask == 0)).all())
