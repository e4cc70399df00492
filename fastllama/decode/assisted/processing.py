"""The parent's processors over many positions at once.

Legend: B rows, Q verified positions, K proposed tokens, V vocabulary.
"""

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as processors

from fastllama.decode.assisted.rows import Rows
from fastllama.decode.assisted.tree import Tree
from fastllama.decode.stop import STATELESS

# Functions of the scores alone.
_WARPERS = tuple(
    getattr(processors, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopPLogitsWarper",
        "TopKLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "SuppressTokensLogitsProcessor",
    )
    if hasattr(processors, name)
)


def are_pure(logits_processor) -> bool:
    """Whether every processor is known to be a function of a row's ids and scores: it may see what does not stand."""
    return all(type(processor) in STATELESS for processor in logits_processor)


class Processing:
    """Processors that are pure, at `home`, the device of the input ids."""

    def __init__(self, logits_processor, home: torch.device):
        self.all = logits_processor
        self.warpers = LogitsProcessorList(each for each in logits_processor if type(each) in _WARPERS)
        self.home = home

    def verified(self, rows: Rows, draft_BK: torch.Tensor | None, logits_BQV: torch.Tensor) -> torch.Tensor:
        """Scores [B, Q, V] in fp32, each position's processors having seen the proposed tokens before it."""
        scores_BQV = logits_BQV.to(self.home, torch.float32, copy=True)
        batch, tokens, _ = scores_BQV.shape
        if len(self.warpers) == len(self.all):
            return self.warpers(None, scores_BQV.flatten(0, 1)).unflatten(0, (batch, tokens))
        ids = rows.ids[:, : max(rows.lengths) + tokens].to(self.home, copy=True)
        starts_B1 = torch.tensor(rows.lengths, device=self.home)[:, None]
        if draft_BK is not None:
            places_BK = starts_B1 + torch.arange(draft_BK.shape[1], device=self.home)
            wide = torch.nn.functional.pad(ids, (0, max(max(rows.lengths) + tokens - ids.shape[1], 0)))
            ids = wide.scatter(1, places_BK, draft_BK.to(self.home))
        out_BQV = scores_BQV.clone()
        index_B = torch.arange(batch, device=self.home)
        going = [length for length, unfinished in zip(rows.lengths, rows.unfinished, strict=True) if unfinished]
        # Rows of different length meet the processors at different calls: they may hold something for each row.
        for length in sorted({start + place for start in going for place in range(tokens)}):
            place_B = length - starts_B1[:, 0]
            inside_B1 = ((place_B >= 0) & (place_B < tokens))[:, None]
            place_B = place_B.clamp(0, tokens - 1)
            scored_BV = self.all(ids[:, :length], scores_BQV[index_B, place_B])
            out_BQV[index_B, place_B] = torch.where(inside_B1, scored_BV, out_BQV[index_B, place_B])
        return out_BQV

    def warped(self, logits_BQV: torch.Tensor) -> torch.Tensor:
        """Scores [B, Q, V] in fp32, at home, by what looks at scores alone."""
        scores = logits_BQV.to(self.home, torch.float32, copy=True).flatten(0, 1)
        return self.warpers(None, scores).unflatten(0, logits_BQV.shape[:2])

    def of_tree(self, rows: Rows, trees: list[Tree], logits_BTV: torch.Tensor) -> torch.Tensor:
        """Scores [B, T, V] in fp32 of the nodes, each node's processors having seen the branch that leads to it."""
        if len(self.warpers) == len(self.all):
            return self.warped(logits_BTV)
        logits_BTV = logits_BTV.to(self.home, torch.float32)
        scores_BTV = logits_BTV.clone()
        for node in range(scores_BTV.shape[1]):
            here = [row for row, tree in enumerate(trees) if rows.unfinished[row] and node <= len(tree)]
            lengths = {row: rows.lengths[row] + trees[row].depths[node] for row in here}
            longest = max(lengths.values())
            ids = torch.nn.functional.pad(rows.ids, (0, max(longest - rows.ids.shape[1], 0)))[:, :longest].clone()
            for row in here:
                path = [trees[row].tokens[each] for each in trees[row].path(node)]
                ids[row, rows.lengths[row] : lengths[row]] = torch.tensor(path, dtype=ids.dtype)
            ids = ids.to(self.home)
            # All rows are shown, as in `verified`; those of another length are not written.
            for length in sorted(set(lengths.values())):
                scored_BV = self.all(ids[:, :length], logits_BTV[:, node].clone())
                for row in here:
                    if lengths[row] == length:
                        scores_BTV[row, node] = scored_BV[row]
        return scores_BTV

    def drafted(self, rows: Rows, before: list[torch.Tensor], logits_BV: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] of a draft's next token after `before`, its proposals [B] of this round.

        Rows that have come apart do without what looks at ids: any distribution to propose from will do.
        """
        if len(self.warpers) == len(self.all) or rows.batch > 1:
            # What processors hold is at home, where a draft on another device is not.
            return self.warpers(None, logits_BV.to(self.home, torch.float32, copy=True)).to(logits_BV.device)
        ids = rows.ids[:, : rows.lengths[0]].to(self.home)
        ids = torch.cat((ids, *(token_B[:, None].to(self.home) for token_B in before)), 1)
        return self.all(ids, logits_BV.to(self.home, torch.float32, copy=True)).to(logits_BV.device)
