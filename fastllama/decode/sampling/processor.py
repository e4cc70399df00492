"""SamplingProcessor: `Sampling` as a logits processor, for any model of transformers.

Legend: B rows, T ids so far, P prompt tokens, V vocabulary.
"""

from collections import deque
from typing import NamedTuple, cast

import torch
from transformers import LogitsProcessor
from transformers.utils import logging

from fastllama.decode.sampling.chain import Chain
from fastllama.decode.sampling.options import Sampling
from fastllama.kernels.sampling import mirostat
from fastllama.kernels.sampling.draw import drawn, only
from fastllama.kernels.sampling.uniform import uniform

logger = logging.get_logger("fastllama")


class StatelessSamplingProcessor(LogitsProcessor):
    """Samplings without mirostat and without seeds by row: a function of the ids and the scores, in any order of calls.

    `attention_mask` [B, P] says which ids of the prompt are padding; without one none is.
    """

    def __init__(self, sampling: Sampling, attention_mask: torch.Tensor | None = None):
        if not isinstance(sampling, Sampling):
            raise ValueError(f"sampling={sampling!r} is not allowed; allowed: a Sampling")
        for words in sampling.ignored:
            logger.warning_once(f"fastllama: {words}")
        self.sampling, self.mask = sampling, attention_mask
        self._chain: Chain | None = None
        self._real: torch.Tensor | None = None

    def begin(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
        """A call begins, with the prompt [B, P] (P = 0 beside embeddings).

        Raises `ValueError` where options by row, or a mask, are for another prompt.
        """
        rows, width = input_ids.shape
        self._chain = Chain(self.sampling, rows, input_ids.device)
        mask = self.mask if attention_mask is None else attention_mask
        self._real = None
        if mask is not None and width > 0:
            if mask.shape[1] != width or rows % mask.shape[0]:
                raise ValueError(f"attention_mask is {list(mask.shape)} and the prompt is {[rows, width]}")
            # num_return_sequences repeats each row.
            self._real = mask.to(input_ids.device).repeat_interleave(rows // mask.shape[0], dim=0) != 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.FloatTensor:
        """Scores [B, V], float32, with -inf for what may not be drawn."""
        if self._chain is None or not self._chain.fits(scores):
            self.begin(input_ids)
        return cast(torch.FloatTensor, self._chain.filtered(self._penalised(input_ids, scores)))

    def _penalised(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        real_BT = None
        if self._real is not None:
            new = input_ids.shape[1] - self._real.shape[1]
            real_BT = torch.nn.functional.pad(self._real, (0, new), value=True)
        return self._chain.penalised(scores.float(), input_ids, real_BT)


class State(NamedTuple):
    """Before a step: mirostat's mu [B], the steps of each row so far [B], and, for
    mirostat, the logarithms of the probabilities that its last token was drawn from.

    `length` is the ids that the step will be shown.
    """

    mu_B: torch.Tensor | None
    steps_B: torch.Tensor
    logp_BV: torch.Tensor | None
    length: int


class SamplingProcessor(StatelessSamplingProcessor):
    """Any `Sampling` as a logits processor.

    With transformers' own generate: `generate(logits_processor=[SamplingProcessor(sampling)], do_sample=True,
    temperature=1.0, top_k=0, top_p=1.0)`, and `attention_mask` here where the prompt is padded on the left and there
    are penalties. With seeds by row it draws by itself, and leaves -inf everywhere but at the drawn token.

    What it remembers (mirostat's mu, how far each row's draws are) starts anew at a call whose ids are not one token
    longer than at the last: a call that goes on exactly where another ended goes on with its state, unless `reset`.
    """

    def __init__(self, sampling: Sampling, attention_mask: torch.Tensor | None = None):
        super().__init__(sampling, attention_mask)
        self._state: State | None = None
        self.keep(0)

    @property
    def mu(self) -> torch.Tensor | None:
        """float64 [B]: mirostat's bound on the surprise, in bits, of the last step; None without mirostat."""
        return None if self._state is None else self._state.mu_B

    def keep(self, steps: int) -> None:
        """From now on so many steps (0: none) can be taken back."""
        self._earlier: deque[State] = deque(maxlen=steps)

    def undo(self, steps: int) -> None:
        """Takes the last steps back. Raises `IndexError` for more than `keep` said, or than there were."""
        for _ in range(steps):
            self._state = self._earlier.pop()

    def reset(self) -> None:
        """The next call is a new text."""
        self._chain = self._state = None
        self._earlier.clear()

    def begin(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
        """A call begins; see `StatelessSamplingProcessor.begin`."""
        self.reset()
        super().begin(input_ids, attention_mask)
        mu_B = 2 * self._chain.values.mirostat_tau.to(torch.float64) if self.sampling.mirostat else None
        steps_B = torch.zeros(len(input_ids), dtype=torch.int64, device=input_ids.device)
        self._state = State(mu_B, steps_B, None, input_ids.shape[1])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.FloatTensor:
        """Scores [B, V], float32, with -inf for what may not be drawn."""
        if self._state is None or not self._chain.fits(scores) or self._state.length != input_ids.shape[1]:
            self.begin(input_ids)
        self._earlier.append(self._state)
        chain, (mu_B, steps_B, logp_BV, length) = self._chain, self._state
        scores_BV = self._penalised(input_ids, scores)
        if self.sampling.mirostat and not self.sampling.is_greedy:
            if logp_BV is not None:
                tau_B, eta_B = chain.values.mirostat_tau, chain.values.mirostat_eta
                mu_B = mirostat.updated(mu_B, logp_BV, input_ids[:, -1], tau_B, eta_B)
            scores_BV = chain.surprising(scores_BV, mu_B)
            logp_BV = scores_BV.log_softmax(-1)
        else:
            scores_BV = chain.filtered(scores_BV)
        if chain.values.seed is not None:
            scores_BV = only(scores_BV, drawn(scores_BV, uniform(chain.values.seed, steps_B)))
        self._state = State(mu_B, steps_B + 1, logp_BV, length + 1)
        return cast(torch.FloatTensor, scores_BV)
