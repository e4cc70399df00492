"""The loop of a run: a prompt, and tokens drawn until a text ends, each phase timed.

It gives the tokens of `generate(sampling=...)`; a test says so.

Legend: T tokens so far, V vocabulary.
"""

from dataclasses import dataclass

import torch

from fastllama.decode.sampling.options import Sampling
from fastllama.decode.sampling.processor import SamplingProcessor
from fastllama.lab.options.timings import Stopwatch, Timings


@dataclass(frozen=True)
class Drawn:
    """The new tokens, the end of the text among them where it was reached."""

    ids: list[int]
    timings: Timings


def run(subject, prompt_ids: list[int], sampling: Sampling, new_tokens: int) -> Drawn:
    """Up to `new_tokens` tokens from a subject that is reserved. `sampling` draws by itself, or is greedy."""
    device = subject.model.device
    ids_1T = torch.tensor([prompt_ids], device=device)
    processor = None
    if not sampling.is_greedy or sampling.penalises:
        processor = SamplingProcessor(sampling)
        processor.begin(ids_1T)
    new: list[int] = []
    watch = Stopwatch(device)
    logits_1V = subject.prefill(ids_1T)
    watch.lap("prompt_eval", len(prompt_ids))
    while True:
        scores_1V = logits_1V.float()
        if processor is not None:
            scores_1V = processor(ids_1T, scores_1V)
        token_1 = scores_1V.argmax(-1)
        new.append(int(token_1))
        ids_1T = torch.cat((ids_1T, token_1[:, None]), -1)
        watch.lap("sample")
        if new[-1] in subject.ends or len(new) == new_tokens:
            break
        logits_1V = subject.step(token_1[:, None])
        watch.lap("eval")
    return Drawn(new, watch.timings(subject.load_ms, len(prompt_ids) + len(new)))
