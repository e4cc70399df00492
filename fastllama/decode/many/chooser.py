"""Chooser: the next token of each of several rows, each by its own rules.

Legend: R rows, T ids of a row, V vocabulary.
"""

import torch

from fastllama.decode.many.row import Row


class Chooser:
    """Takes the best, or draws from torch's own generator for all rows together, in their order.

    `home`: where processors and criteria are shown ids, the device of the model.
    """

    def __init__(self, home: torch.device):
        self.home = home

    def __call__(self, rows: list[Row], logits_RV: torch.Tensor) -> list[int]:
        """The chosen ids of `rows`: the one time in a step that the host waits for the device."""
        draws = [row.rules.do_sample for row in rows]  # a Sampling may have cold rows among others
        if not any(draws) and not any(row.rules.processors for row in rows):
            return _largest(logits_RV)
        scores_RV = self._scored(rows, logits_RV.to(self.home, torch.float32, copy=True))
        if not any(draws):
            return _largest(scores_RV)
        drawn_R = torch.multinomial(scores_RV.softmax(dim=-1), num_samples=1).squeeze(1)
        if not all(draws):
            drawn_R = torch.where(torch.tensor(draws, device=self.home), drawn_R, scores_RV.argmax(dim=-1))
        return drawn_R.tolist()

    def _scored(self, rows: list[Row], scores_RV: torch.Tensor) -> torch.Tensor:
        if not any(row.rules.by_row for row in rows):  # the same functions of the scores for all
            return rows[0].rules.processors(None, scores_RV)
        parts = zip(rows, scores_RV.split(1), strict=True)
        return torch.cat([row.rules.processors(row.as_tensor(self.home), score_1V) for row, score_1V in parts])


def _largest(scores_RV: torch.Tensor) -> list[int]:
    # On a CPU, numpy needs a tenth of the time, and finds the same: the first of the largest.
    if scores_RV.device.type == "cpu":
        return scores_RV.float().numpy().argmax(-1).tolist()
    return scores_RV.argmax(dim=-1).tolist()
