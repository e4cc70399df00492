"""How long choosing takes within `generate`: the loop's own choice of each token, timed from outside."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from fastllama.decode.choice import Choice, GreedyChoice
from fastllama.lab.measuring.contestant import synchronize


@contextmanager
def told(device: torch.device, on_choice: Callable[[float, int], None]) -> Iterator[None]:
    """Within it, `on_choice(seconds, tokens)` is called after each choice of a loop on the fast path.

    What is on its way on the device is waited for first, so that no forward pass is counted.
    """

    def timed(take: Callable) -> Callable:
        def run(choice, logits_BV: torch.Tensor) -> torch.Tensor:
            synchronize(device)
            start = time.perf_counter()
            chosen_B = take(choice, logits_BV)
            synchronize(device)
            on_choice(time.perf_counter() - start, len(chosen_B))
            return chosen_B

        return run

    with patch.object(Choice, "take", timed(Choice.take)), patch.object(GreedyChoice, "take", timed(GreedyChoice.take)):
        yield
