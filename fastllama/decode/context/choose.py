"""Which way a text goes on when it is longer than the cache, or than what a model was made for; and what refuses."""

from torch import nn
from transformers.utils import logging

from fastllama.cache.budget import CacheShape
from fastllama.decode.context.extend import SelfExtend
from fastllama.decode.context.shift import ContextShift
from fastllama.model.config import FastConfig
from fastllama.model.rotary import is_stateful

logger = logging.get_logger("fastllama")


def shifts(config: FastConfig) -> bool:
    """Whether a full cache shifts: beside self-extend it does not, as in llama.cpp."""
    return config.context_shift and config.grp_attn_n == 1


def require_context(model: nn.Module, config: FastConfig) -> None:
    """Raises `ValueError` where keys of this model cannot be turned to other positions."""
    rotary = model.model.rotary_emb
    name = "context_shift" if shifts(config) else "grp_attn_n"
    if (shifts(config) or config.grp_attn_n > 1) and is_stateful(rotary):
        raise ValueError(
            f"{name}={getattr(config, name)} cannot be honoured: rope_type {rotary.rope_type!r} has frequencies that "
            "depend on the longest position, so cached keys cannot be turned to others"
        )


def require_unmoved(config: FastConfig, where: str) -> None:
    """Raises `ValueError` where a context that moves is asked for, and `where`, in words, cannot have it."""
    name = "context_shift" if shifts(config) else "grp_attn_n" if config.grp_attn_n > 1 else None
    if name is not None:
        raise ValueError(f"{name}={getattr(config, name)} cannot be honoured in {where}: call preallocate() without it")


def context_for(model: nn.Module, config: FastConfig, shape: CacheShape) -> ContextShift | SelfExtend | None:
    """None where a text must fit the cache and the model. Raises `ValueError` as `require_context` does."""
    require_context(model, config)
    if config.grp_attn_n > 1:
        if config.context_shift:
            logger.warning_once(f"fastllama: context_shift is ignored beside grp_attn_n={config.grp_attn_n}")
        return SelfExtend(config.grp_attn_n, config.grp_attn_w, shape.batch_size, shape.device)
    if config.context_shift:
        begin_id = model.config.bos_token_id
        return ContextShift(
            config.keep, begin_id if isinstance(begin_id, int) else None, model.config.max_position_embeddings
        )
    return None


def positions_needed(config: FastConfig, held: int | None, longest: int, prompt_length: int, positions: int) -> int:
    """Cache positions of a row for a text of `positions` tokens; `held`: those of an explicit cache, else None.

    Raises `ValueError` where a cache that shifts has none left beside the prompt.
    """
    if not shifts(config):
        return positions
    if held is None:
        return min(positions, max(longest, prompt_length + 1))
    if prompt_length == held:
        raise ValueError(
            f"context_shift needs a position to spare: the prompt has {prompt_length} tokens and preallocate() "
            f"reserved {held} positions"
        )
    return positions if prompt_length > held else min(positions, held)


def positions_used(config: FastConfig, cache_length: int) -> int:
    """Positions that the tokens of a full cache stand at."""
    shrunk = config.grp_attn_w - config.grp_attn_w // config.grp_attn_n
    return cache_length - cache_length // config.grp_attn_w * shrunk


def words(config: FastConfig, context: ContextShift | SelfExtend | None) -> str:
    """What became of the context in the last call, for people, as the end of a sentence."""
    said = [] if context is None else [context.words]
    if config.context_shift and not shifts(config):
        said.append("context_shift ignored beside it")
    if config.keep and not shifts(config):
        said.append(f"keep={config.keep} without effect")
    return "".join(f", {word}" for word in said)
