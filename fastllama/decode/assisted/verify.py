"""What the target's logits over proposed tokens say: the tokens that each row keeps, and the one after them.

Legend: B rows, K proposed tokens, Q = K + 1 verified positions, T nodes of a tree, V vocabulary.
"""

import functools

import torch

from fastllama.decode.assisted.accept import draw, matching, speculative, stands, without
from fastllama.decode.assisted.processing import Processing
from fastllama.decode.assisted.rows import Rows
from fastllama.decode.assisted.tree import Tree, walked
from fastllama.decode.choice import Choice


def _kept(chosen_BQ: torch.Tensor, counts_B: torch.Tensor) -> list[list[int]]:
    """The first counts + 1 of each row, in one transfer."""
    table = torch.cat((counts_B[:, None], chosen_BQ), 1).tolist()
    return [tokens[: count + 1] for count, *tokens in table]


class GreedyVerifier:
    """The largest logit, where nothing but an end of text that is not yet allowed takes part.

    `first`: columns from which an end of text is allowed.
    """

    scores = raw_logits = None
    finished = False

    def __init__(self, first: int):
        self.first = first

    def __call__(self, rows: Rows, draft_BK: torch.Tensor | None, q_BKV, logits_BQV: torch.Tensor) -> list[list[int]]:
        if logits_BQV.device.type == "cpu":
            chosen = logits_BQV.float().numpy().argmax(-1).tolist()
            draft = [[]] * rows.batch if draft_BK is None else draft_BK.tolist()
        else:
            chosen = logits_BQV.argmax(-1)
            both = chosen if draft_BK is None else torch.cat((chosen, draft_BK), 1)
            tokens = chosen.shape[1]
            lists = both.tolist()
            chosen, draft = [row[:tokens] for row in lists], [row[tokens:] for row in lists]
        kept = []
        for row, (found, proposed) in enumerate(zip(chosen, draft, strict=True)):
            count = 0
            for place, token in enumerate(found):
                if token in rows.eos and rows.lengths[row] + place < self.first:
                    token = found[place] = self._without_end(rows, logits_BQV[row, place])
                if place == len(proposed) or token != proposed[place]:
                    break
                count += 1
            kept.append(found[: count + 1])
        return kept

    def tree(self, rows: Rows, trees: list[Tree], logits_BTV: torch.Tensor) -> list[tuple[list[int], list[int]]]:
        """Of each row the tokens that it keeps, and the nodes that stand."""
        chosen = logits_BTV.argmax(-1).tolist()

        def choose(row: int, node: int) -> int:
            token = chosen[row][node]
            early = token in rows.eos and rows.lengths[row] + trees[row].depths[node] < self.first
            return self._without_end(rows, logits_BTV[row, node]) if early else token

        return [walked(tree, functools.partial(choose, row)) for row, tree in enumerate(trees)]

    @staticmethod
    def _without_end(rows: Rows, logits_V: torch.Tensor) -> int:
        ends = torch.tensor(sorted(rows.eos), device=logits_V.device)
        return int(logits_V.index_fill(0, ends, float("-inf")).argmax())


class ProcessedVerifier:
    """Greedy or sampled, with processors that are pure, for any number of rows."""

    scores = raw_logits = None
    finished = False

    def __init__(self, processing: Processing, do_sample: bool):
        self.processing, self.do_sample = processing, do_sample

    def __call__(self, rows: Rows, draft_BK: torch.Tensor | None, q_BKV, logits_BQV: torch.Tensor) -> list[list[int]]:
        scores_BQV = self.processing.verified(rows, draft_BK, logits_BQV)
        draft_BK = None if draft_BK is None else draft_BK.to(scores_BQV.device)
        none_B = torch.zeros(rows.batch, dtype=torch.int64, device=scores_BQV.device)
        if not self.do_sample:
            chosen_BQ = scores_BQV.argmax(-1)
            return _kept(chosen_BQ, none_B if draft_BK is None else matching(draft_BK, chosen_BQ))
        p_BQV = scores_BQV.softmax(-1)
        if draft_BK is None or q_BKV is None:
            # Proposals that were not drawn: a draw of the target's own that repeats one accepts it.
            chosen_BQ = draw(p_BQV)
            return _kept(chosen_BQ, none_B if draft_BK is None else matching(draft_BK, chosen_BQ))
        counts_B, next_B = speculative(p_BQV, q_BKV.to(p_BQV), draft_BK, torch.rand_like(draft_BK, dtype=p_BQV.dtype))
        chosen_BQ = torch.cat((draft_BK, next_B[:, None]), 1).scatter(1, counts_B[:, None], next_B[:, None])
        return _kept(chosen_BQ, counts_B)

    def tree(self, rows: Rows, trees: list[Tree], logits_BTV: torch.Tensor) -> list[tuple[list[int], list[int]]]:
        """Of each row the tokens that it keeps, and the nodes that stand."""
        scores_BTV = self.processing.of_tree(rows, trees, logits_BTV)
        if not self.do_sample:
            chosen = scores_BTV.argmax(-1).tolist()
            return [walked(tree, found.__getitem__) for tree, found in zip(trees, chosen, strict=True)]
        p_BTV = scores_BTV.softmax(-1)
        places = [(row, tree.parents[node], tree.tokens[node]) for row, tree in enumerate(trees) for node in tree.nodes]
        rows_N, parents_N, tokens_N = torch.tensor(places, device=p_BTV.device).T
        chances = iter(p_BTV[rows_N, parents_N, tokens_N].tolist())
        uniforms = iter(torch.rand(len(places), dtype=p_BTV.dtype, device=p_BTV.device).tolist())
        paths, rejected = [], []
        for tree in trees:
            numbers = [(0.0, 0.0)] + [(next(chances), next(uniforms)) for _ in tree.nodes]
            path, following = _descended(tree, numbers)
            paths.append(path)
            rejected.append(following)
        last_BV = p_BTV[torch.arange(len(trees)), [path[-1] if path else 0 for path in paths]]
        ends = draw(without(last_BV, rejected)).tolist()
        found = zip(trees, paths, ends, strict=True)
        return [([*(tree.tokens[node] for node in path), end], path) for tree, path, end in found]


def _descended(tree: Tree, numbers: list[tuple[float, float]]) -> tuple[list[int], list[int]]:
    """(nodes that stand, tokens after them that do not), by the chance and the uniform number of each node."""
    children, node = tree.children(), 0
    path: list[int] = []
    while True:
        chances, uniforms = (
            zip(*(numbers[child] for child in children[node]), strict=True) if children[node] else ((), ())
        )
        place = stands(chances, uniforms)
        if place is None:
            return path, [tree.tokens[child] for child in children[node]]
        node = children[node][place]
        path.append(node)


class SequentialVerifier:
    """One row, position by position, as far as the proposals stand.

    Processors, criteria and random numbers see exactly what they would see without assistance, so any of them will do.
    """

    finished = False  # the criteria have said so

    def __init__(self, choice: Choice):
        self.choice = choice

    @property
    def scores(self):
        return self.choice.scores

    @property
    def raw_logits(self):
        return self.choice.raw_logits

    def tree(self, rows: Rows, trees: list[Tree], logits_BTV: torch.Tensor) -> list[tuple[list[int], list[int]]]:
        """Of the row the tokens that it keeps, and the nodes that stand."""

        def stop() -> bool:
            self.finished = self.choice.finished()
            return self.finished

        return [walked(trees[0], lambda node: int(self.choice.take(logits_BTV[:, node])), stop)]

    def __call__(self, rows: Rows, draft_BK: torch.Tensor | None, q_BKV, logits_BQV: torch.Tensor) -> list[list[int]]:
        proposed, kept = [] if draft_BK is None else draft_BK[0].tolist(), []
        for place in range(logits_BQV.shape[1]):
            kept.append(int(self.choice.take(logits_BQV[:, place])))
            if self.choice.finished():
                self.finished = True
                break
            if place == len(proposed) or kept[-1] != proposed[place]:
                break
        return [kept]
