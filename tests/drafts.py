"""Targets, drafts and the arguments of assisted calls, for tests of assisted generation."""

import torch

from tests.tiny import pair


def noisy(model, spread: float = 0.02, seed: int = 7):
    """Makes a draft of a copy: near enough that some of what it proposes stands, and some does not."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * parameter.std().nan_to_num(0.0) * torch.randn_like(parameter)
    return model


def trio() -> tuple:
    """(vanilla, ours, a draft)."""
    vanilla, ours = pair(max_position_embeddings=256)
    return vanilla, ours, noisy(pair(max_position_embeddings=256)[1])


def looping_pair() -> tuple:
    """(vanilla, ours) whose greedy text soon repeats itself, as prompt lookup likes it."""
    return pair(max_position_embeddings=256, initializer_range=0.1)


def assistance(mode: str, draft, tokens: int = 4, **more) -> dict:
    """Arguments of generate. Without a threshold, the draft goes on however sure it is."""
    if mode == "lookup":
        return {"prompt_lookup_num_tokens": tokens, **more}
    return {
        "assistant_model": draft,
        "num_assistant_tokens": tokens,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
        **more,
    }
