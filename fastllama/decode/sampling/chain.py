"""The chain of samplers: scores in, scores out, in the order that is asked for.

Legend: B rows, T ids so far, V vocabulary, N candidates in descending order.
"""

import torch

from fastllama.decode.sampling.options import COLD, Sampling
from fastllama.decode.sampling.values import Values
from fastllama.kernels.sampling import filters, mirostat, penalties, warpers
from fastllama.kernels.sampling.candidates import RULED_OUT, candidates, compacted, scattered
from fastllama.kernels.sampling.draw import only


class Chain:
    """What `sampling` does to scores [B, V]. Which steps there are, it knows from the options, not from the scores."""

    def __init__(self, sampling: Sampling, rows: int, device: torch.device):
        self.sampling, self.values = sampling, Values(sampling, rows, device)
        self.of_transformers = sampling.sampler_order == "transformers"
        self.steps = [name for name in sampling.order if name != "penalties" and sampling.acts(name)]
        self.some_cold = sampling.smallest("temperature") <= COLD

    def fits(self, scores_BV: torch.Tensor) -> bool:
        """Whether it was made for as many rows, and for where they are."""
        return self.values.top_p.shape[0] == scores_BV.shape[0] and self.values.top_p.device == scores_BV.device

    def penalised(self, scores_BV: torch.Tensor, ids_BT: torch.Tensor, real_BT: torch.Tensor | None) -> torch.Tensor:
        """Scores after the penalties. `real_BT`: which ids are no padding; None: all."""
        if not self.sampling.penalises:
            return scores_BV
        values, real_BT = self.values, torch.ones_like(ids_BT, dtype=torch.bool) if real_BT is None else real_BT
        counted_BT = penalties.window(real_BT, values.repeat_last_n)
        counts_BV = penalties.counts(ids_BT, counted_BT, scores_BV.shape[-1])
        if self.sampling.acts("repeat_penalty"):
            scores_BV = penalties.repeat_penalty(scores_BV, counts_BV, values.repeat_penalty, self.of_transformers)
        if self.sampling.acts("frequency_penalty") or self.sampling.acts("presence_penalty"):
            each_B = values.frequency_penalty, values.presence_penalty
            scores_BV = penalties.occurrence_penalty(scores_BV, counts_BV, *each_B)
        return scores_BV

    def filtered(self, scores_BV: torch.Tensor) -> torch.Tensor:
        """Scores after the filters and the temperature: -inf for what may not be drawn."""
        if self.sampling.is_greedy:
            return only(scores_BV, scores_BV.argmax(-1))
        out_BV = self._warped(scores_BV) if self.of_transformers else self._sorted_and_filtered(scores_BV)
        return self._with_cold_rows(out_BV, scores_BV)

    def surprising(self, scores_BV: torch.Tensor, mu_B: torch.Tensor) -> torch.Tensor:
        """The same with mirostat instead of the filters, which surprises by `mu_B` bits at most."""
        warm_BV = filters.temperature(scores_BV, self.values.temperature)
        if self.sampling.mirostat == 1:
            logits_BN, index_BN = candidates(warm_BV)
            logits_BN = mirostat.cut_1(logits_BN, mu_B, scores_BV.shape[-1])
            out_BV = scattered(logits_BN, index_BN, scores_BV.shape[-1])
        else:
            out_BV = mirostat.cut_2(warm_BV, mu_B)
        return self._with_cold_rows(out_BV, scores_BV)

    def _with_cold_rows(self, out_BV: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        if not self.some_cold:
            return out_BV
        return torch.where(self.values.temperature[:, None] > 0, out_BV, only(scores_BV, scores_BV.argmax(-1)))

    def _warped(self, scores_BV: torch.Tensor) -> torch.Tensor:
        """transformers' order and arithmetic."""
        names = iter(self.steps)
        for name in names:
            scores_BV = self._warp(name, scores_BV)
            # A CPU's scores can be looked at for nothing: the rest concerns the few that are left, with the same result
            # up to the rounding of a sum.
            if name == "top_k" and name != self.steps[-1] and scores_BV.device.type == "cpu":
                left = int((scores_BV > RULED_OUT).sum(-1).max())
                index_BN = torch.topk(scores_BV, left, sorted=False).indices.sort(-1).values
                few_BN = scores_BV.gather(-1, index_BN)
                for rest in names:
                    few_BN = self._warp(rest, few_BN)
                return scattered(few_BN, index_BN, scores_BV.shape[-1])
        return scores_BV

    def _warp(self, name: str, scores_BV: torch.Tensor) -> torch.Tensor:
        values, sampling = self.values, self.sampling
        if name == "temperature":
            return filters.temperature(scores_BV, values.temperature)
        if name == "top_k":
            return warpers.top_k(scores_BV, values.top_k, values.min_keep, self._most())
        if name == "tfs_z":  # llama.cpp's: transformers has none
            logits_BN, index_BN = candidates(scores_BV)
            logits_BN = filters.tfs(logits_BN, values.tfs_z, values.min_keep)
            return scattered(logits_BN, index_BN, scores_BV.shape[-1])
        if name == "top_p":
            return warpers.top_p(scores_BV, values.top_p, values.min_keep)
        if name == "min_p":
            return warpers.min_p(scores_BV, values.min_p, values.min_keep, sampling.largest("min_keep"))
        return warpers.typical(scores_BV, values.typical_p, values.min_keep)

    def _most(self) -> int | None:
        """How many top-k leaves in any row, but for ties; None: all."""
        if self.sampling.smallest("top_k") <= 0:
            return None
        return max(self.sampling.largest("top_k"), self.sampling.largest("min_keep"))

    def _sorted_and_filtered(self, scores_BV: torch.Tensor) -> torch.Tensor:
        """llama.cpp's arithmetic, in any order."""
        values = self.values
        if all(name == "temperature" for name in self.steps):
            return filters.temperature(scores_BV, values.temperature) if self.steps else scores_BV
        most = self._most() if self.steps[0] == "top_k" else None
        logits_BN, index_BN = candidates(scores_BV, most)
        for name in self.steps:
            if name == "temperature":
                logits_BN = filters.temperature(logits_BN, values.temperature)
                continue
            logits_BN = _FILTERS[name](logits_BN, getattr(values, name), values.min_keep)
            if name == "typical_p" and name != self.steps[-1]:
                logits_BN, index_BN = compacted(logits_BN, index_BN)
        return scattered(logits_BN, index_BN, scores_BV.shape[-1])


_FILTERS = {
    "top_k": filters.top_k,
    "top_p": filters.top_p,
    "min_p": filters.min_p,
    "tfs_z": filters.tfs,
    "typical_p": filters.typical,
}
