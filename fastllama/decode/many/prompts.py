"""The prompts of a call: what each says, or why it cannot run; and what all of them begin with."""

from collections.abc import Sequence
from numbers import Integral

import torch


def ids_of(prompt) -> list[int]:
    """The ids of a list of ids or a 1-D tensor. `ValueError` for anything else."""
    if isinstance(prompt, str):
        raise ValueError("the prompt is text and not token ids: tokenise it first")
    if isinstance(prompt, torch.Tensor):
        if prompt.dim() != 1 or prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
            raise ValueError(
                f"the prompt is a tensor {list(prompt.shape)} of {prompt.dtype} and not one of ids in one dimension"
            )
        return prompt.tolist()
    try:
        ids = list(prompt)
    except TypeError:
        raise ValueError(f"the prompt is a {type(prompt).__name__} and not a list of token ids") from None
    wrong = next((token for token in ids if not isinstance(token, Integral) or isinstance(token, bool)), None)
    if wrong is not None:
        raise ValueError(f"the prompt holds {wrong!r}, which is no token id")
    return [int(token) for token in ids]


def checked(prompt, vocabulary: int) -> list[int]:
    """The same, each id below `vocabulary`, at least one. `ValueError` where that is not so."""
    ids = ids_of(prompt)
    if not ids:
        raise ValueError("the prompt is empty")
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise ValueError(f"token id {wrong} is outside the vocabulary of {vocabulary}")
    return ids


def limits(max_new_tokens, count: int) -> list[int | None]:
    """Most new tokens of each prompt, of one number (None: what the generation config says) or of one for each.

    Raises `ValueError` for what is no integer of 1 or more, or another number of them than `count`.
    """
    if isinstance(max_new_tokens, torch.Tensor):
        max_new_tokens = max_new_tokens.tolist()
    one = max_new_tokens is None or not isinstance(max_new_tokens, Sequence) or isinstance(max_new_tokens, str)
    each = [max_new_tokens] * count if one else list(max_new_tokens)
    if len(each) != count:
        raise ValueError(f"max_new_tokens has {len(each)} numbers for {count} prompts: give one, or one for each")
    for value in (max_new_tokens,) if one else each:
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
            raise ValueError(f"max_new_tokens={value!r} is not allowed; allowed: an integer >= 1, or one for each")
    return [None if value is None else int(value) for value in each]


def shared(prompts: list[list[int]], least: int | None) -> int:
    """How many tokens all prompts begin with; 0 where that is fewer than `least`, or a prompt is alone.

    The last token of a prompt is never shared: what follows it must be computed for each.
    """
    if least is None or len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # in between, in order of tokens, none differs earlier
    most = min(map(len, prompts)) - 1
    count = next((place for place in range(most) if first[place] != last[place]), most)
    return count if count >= least else 0
