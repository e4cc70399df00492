"""What the fast path's weights were read from, so that a later call can tell whether they still hold."""

from torch import nn

from fastllama.model.released import is_released
from fastllama.model.spread import local


def all_modules(model: nn.Module) -> list[nn.Module]:
    """Every module whose weights a forward pass reads."""
    body = model.model
    found = [body.embed_tokens, body.norm, model.lm_head]
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        found += [layer.input_layernorm, layer.post_attention_layernorm, mlp.act_fn]
        found += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        found += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return found


def does_as_its_class(module: nn.Module) -> bool:
    """Whether nothing was hung on the module, or put in its forward's place."""
    return not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)


def is_plain(module: nn.Module, cls: type[nn.Module] = nn.Linear) -> bool:
    """Whether the module computes what its class does from its weights, and nothing else."""
    return (
        type(module) is cls
        and does_as_its_class(module)
        and (is_released(module) or module.weight.device.type != "meta")
    )


def _addresses(module: nn.Module) -> tuple:
    if is_released(module):
        return ("packed",)
    tensors = (*module._parameters.items(), *module._buffers.items())
    return tuple((name, local(t).data_ptr(), t.dtype) for name, t in tensors if t is not None and not t.is_meta)


class Sources:
    """The modules and the addresses of their weights, as they were when this was made."""

    def __init__(self, model: nn.Module):
        self.modules = all_modules(model)
        self.addresses = [_addresses(module) for module in self.modules]

    def are_current(self, model: nn.Module) -> bool:
        """Adapters, moves, replaced modules and assigned state dicts rebind what is read; training does not."""
        modules = all_modules(model)
        return (
            len(modules) == len(self.modules)
            and all(ours is theirs for ours, theirs in zip(self.modules, modules, strict=True))
            and all(old == _addresses(module) for old, module in zip(self.addresses, modules, strict=True))
        )
