"""transformers' own continuous batching, as its manager runs it: what ours is measured beside."""

import time
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

_PAGE = 32  # positions of a block of its cache
_PASS_TOKENS = 512  # of all requests in one of its passes
_WAIT_S = 1.0


def obstacle() -> str | None:
    """Why this version of transformers does not have it; None where it does."""
    try:
        from transformers import ContinuousBatchingConfig  # noqa: F401
        from transformers.generation.continuous_batching import ContinuousMixin
    except ImportError as fault:
        return f"this version of transformers has no continuous batching of this kind ({fault})"
    if not hasattr(ContinuousMixin, "continuous_batching_context_manager"):
        return "this version of transformers has no manager of continuous batching"
    return None


def generate(
    model: nn.Module, prompts: list[list[int]], limits: list[int], rows: int, config: GenerationConfig
) -> tuple[list[list[int]], float]:
    """(new ids of each prompt, seconds from the first request to the last result), up to `rows` requests at a time.

    Its cache has as many blocks as so many requests can need; left to itself it would take 60 % of a machine's memory.
    Raises `RuntimeError` where it fails.
    """
    from transformers import ContinuousBatchingConfig

    longest = max(len(ids) + limit for ids, limit in zip(prompts, limits, strict=True))
    how = ContinuousBatchingConfig(
        page_size=_PAGE,
        num_blocks=rows * (-(-longest // _PAGE) + 1),
        max_batch_tokens=_PASS_TOKENS,
        max_requests_per_batch=rows,
    )
    found: dict[str, Any] = {}
    with (
        torch.no_grad(),
        model.continuous_batching_context_manager(generation_config=config, continuous_batching_config=how) as manager,
    ):
        start = time.perf_counter()
        names = [manager.add_request(ids, max_new_tokens=limit) for ids, limit in zip(prompts, limits, strict=True)]
        while len(found) < len(names):
            result = manager.get_result(timeout=_WAIT_S)
            if result is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching ended before its requests")
            if result is not None and result.error is not None:
                raise RuntimeError(f"transformers' continuous batching failed: {result.error}")
            if result is not None and result.is_finished():
                found[result.request_id] = list(result.generated_tokens)
        seconds = time.perf_counter() - start
    return [found[name] for name in names], seconds
