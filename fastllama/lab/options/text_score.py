"""What a text is like: against the default's, under the model, and against itself. Pure functions of token ids.

Legend: T tokens, V vocabulary.
"""

import math
from itertools import zip_longest

import torch
from torch import nn

from fastllama.lab.measuring.parity import output_hash


def text_hash(ids: list[int]) -> str:
    """8 hex digits over the new ids, as everywhere in the laboratory."""
    return output_hash(torch.tensor([ids], dtype=torch.int64))


def first_difference(ids: list[int], default: list[int]) -> int | None:
    """Place, from 0, of the first token that is not the default's; the end of one is a difference. None: equal."""
    pairs = enumerate(zip_longest(ids, default))
    return next((place for place, (one, other) in pairs if one != other), None)


def distinct(ids: list[int], n: int) -> float | None:
    """Distinct n-grams over n-grams (Li et al. 2016); None for a text shorter than n."""
    grams = [tuple(ids[place : place + n]) for place in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(ids: list[int]) -> float | None:
    """Share of 4-grams that occurred before (seq-rep-4 of Welleck et al. 2020); None for a text shorter than 4."""
    found = distinct(ids, 4)
    return None if found is None else 1 - found


@torch.no_grad()
def perplexity(model: nn.Module, prompt_ids: list[int], ids: list[int], longest: int) -> float:
    """exp of the mean negative log-likelihood, nats, of the new tokens behind the prompt, in one fresh pass.

    The model reads the last `longest` tokens where there are more.
    """
    both = (prompt_ids + ids)[-longest:]
    count = min(len(ids), len(both) - 1)
    ids_1T = torch.tensor([both], device=model.device)
    logits_TV = model(input_ids=ids_1T, use_cache=False, logits_to_keep=count + 1).logits[0].float()
    log_TV = logits_TV[-count - 1 : -1].log_softmax(-1)
    return math.exp(-log_TV.gather(-1, ids_1T[0, -count:, None]).mean().item())
