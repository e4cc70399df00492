"""The draft beside a target: whether its tokens are the target's, and the model, reserved like the target."""

import functools
from dataclasses import replace

import torch

import fastllama
from fastllama.decode.assisted.sharing import is_same_model
from fastllama.demo.tokenizer import RESERVED_ID
from fastllama.lab.fault import explained
from fastllama.lab.measuring import checkpoint, vanilla
from fastllama.lab.measuring.checkpoint import Checkpoint
from fastllama.lab.points.point import Point
from fastllama.model.config import FastConfig


def find(point: Point) -> Checkpoint | None:
    """The draft's checkpoint, None where no model drafts. Raises as `checkpoint.find` does."""
    name = point.assistance.draft_model(point.model)
    return None if name is None else checkpoint.find(name, point.torch_dtype)


def require_match(point: Point, tokenizer) -> None:
    """Raises `ValueError` where a token of the draft would be another one of the target."""
    found = find(point)
    if found is None or point.assistance.draft is None:
        return
    ours, theirs = tokenizer.get_vocab(), checkpoint.tokenizer(found).get_vocab()
    if ours == theirs:  # rows that stand for no token may differ
        return
    apart = sum(theirs.get(token) != place for token, place in ours.items())
    raise ValueError(
        f"the vocabularies of {point.model_name} and of the draft {point.identity()['assisted']['draft']} do not match "
        f"({len(ours)} and {len(theirs)} tokens, {apart} of the first are others in the second): the draft needs the "
        f"target's tokenizer"
    )


def widen(draft, rows: int) -> None:
    """Give the draft as many vocabulary rows as the target has, which transformers asks of a pair.

    A new row is that of a token which is not predicted: the demo's reserved one, which pads nothing and ends nothing.
    """
    known = draft.config.vocab_size
    if known >= rows:
        return
    draft.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for module in (draft.get_input_embeddings(), draft.get_output_embeddings()):
            module.weight[known:] = module.weight[RESERVED_ID]


def config(point: Point) -> FastConfig:
    """How the draft is reserved: as the target, but with its own weights' bits, and with floats in its cache.

    On another kind of device than the target's, a compiled step is that device's own: native on a CPU, else static.
    """
    bits = point.assistance.draft_weights
    products = point.config.products if bits is None else "auto"
    changes = {"weights": bits, "products": products, "cache_k": None, "cache_v": None}
    if is_elsewhere(point):
        compiled = "native" if device(point).type == "cpu" else "static"
        changes |= {"products": "auto", "compile": "no" if point.compile == "no" else compiled}
        changes |= {"fuse": "all"} if changes["compile"] == "native" else {}
    return replace(point.config, **changes)


def device(point: Point) -> torch.device:
    """Where the draft runs."""
    return torch.device(point.assistance.draft_device or point.device)


def is_elsewhere(point: Point) -> bool:
    """Whether the draft runs on another kind of device than the target, and lies in other memory."""
    return device(point).type != torch.device(point.device).type


def load(point: Point, pad: int) -> fastllama.LlamaForCausalLM | None:
    """The draft, loaded and preallocated for the point's rows and positions; None where no model drafts."""
    found = find(point)
    if found is None:
        return None
    how = config(point)
    fast = {} if how.weights is None else {"fast": how}
    draft, _ = checkpoint.load(found, fastllama.LlamaForCausalLM, point.torch_dtype, device(point), **fast)
    window = point.assistance.draft_window
    if window is None:
        window = getattr(draft.generation_config, "draft_window", None)
    vanilla.plain_greedy(draft, pad)
    tokens = point.assistance.tokens
    if point.assistance.draft_tokens is None:  # the usual number shrinks to what fits
        tokens = max(min(tokens, point.positions - 1), 1)
    draft.generation_config.num_assistant_tokens = tokens
    draft.generation_config.num_assistant_tokens_schedule = point.assistance.draft_schedule
    if window is not None:
        draft.generation_config.draft_window = window
    if point.assistance.splits:
        draft.generation_config.p_split = point.assistance.p_split
        draft.generation_config.draft_branches = point.assistance.branches
    rows = point.workload.batch_size
    with explained(f"the draft {found.name}, batch {rows}, cache of {point.positions}"):
        draft.preallocate(batch_size=rows, cache_length=point.positions, config=how)
    return draft


def window(target, draft) -> int | None:
    """How many tokens of a prompt the draft reads at most; None for all, and where it reads the target's cache."""
    return None if is_same_model(target, draft) else getattr(draft.generation_config, "draft_window", None) or None


def arguments(point: Point, target, draft) -> dict:
    """What `generate` of the target is given to be assisted."""
    if draft is not None:
        same = draft.config.vocab_size == target.config.vocab_size
        return {"assistant_model": draft} if same else {"assistant_model": draft, **_tokenizers(point)}
    if point.assistance.prompt_lookup is None:
        return {}
    target.generation_config.num_assistant_tokens_schedule = point.assistance.draft_schedule
    return {"prompt_lookup_num_tokens": point.assistance.prompt_lookup}


def _tokenizers(point: Point) -> dict:
    """What transformers asks for beside a draft with another number of vocabulary rows."""
    return _loaded_tokenizers(point.model, point.assistance.draft_model(point.model), point.torch_dtype)


@functools.cache
def _loaded_tokenizers(model: str, draft: str, dtype: torch.dtype) -> dict:
    ours, theirs = (checkpoint.tokenizer(checkpoint.find(name, dtype)) for name in (model, draft))
    return {"tokenizer": ours, "assistant_tokenizer": theirs}
