"""A draft model that proposes a tree: a branch splits where the draft gives more than one token a fair chance.

When to split is the rule of llama.cpp's examples/speculative: a branch's likeliest token goes on with it, and while the
next likeliest has a probability above p_split and there are fewer branches than allowed, it begins another.

Legend: B rows, Q tokens of a step, V vocabulary, C candidates.
"""

import torch

from fastllama.decode.assisted.proposer import USUALLY_BEHIND, DraftProposer, Proposal
from fastllama.decode.assisted.rows import Rows
from fastllama.decode.assisted.schedule import Weighing
from fastllama.decode.assisted.tree import Tree, drafted


class TreeProposer(DraftProposer):
    """Proposes the likeliest tokens, never drawn ones, and looks at them on the host after each depth.

    As long as no row has split its branch, the draft's steps are those of one that does not.
    """

    mode = "tree"
    knows_doubt = False  # p_split says what becomes of an unsure token

    def __init__(self, *how, p_split: float, branches: int):
        super().__init__(*how)
        self.p_split, self.branches = p_split, branches

    def nodes(self, rows: Rows, most: int, room: int | None) -> int:
        """How many tokens a tree of depth `most` may have where the target has room for `room`; None for any number."""
        rooms = [most * self.branches, room, super().most(rows)]
        return min(each for each in rooms if each is not None)

    def propose(self, rows: Rows, most: int, room: int | None = None, weighing: Weighing | None = None) -> Proposal:
        """As `DraftProposer.propose`; a tree of at most `room` tokens, or a plain proposal where no branch split.

        It weighs nothing.
        """
        budget = max(self.nodes(rows, most, room), 1)
        most = min(most, budget)
        logits_BV, forwards, behind = self._caught_up(rows, budget)
        trees = [Tree() for _ in range(rows.batch)]
        leaves = [[0] if going else [] for going in rows.unfinished]
        logits_BQV, fed, whole = logits_BV[:, None], 0, True
        for depth in range(1, most + 1):
            allowed = min(self.branches, (budget - fed) // (most - depth + 1))
            leaves = self._grown(rows, trees, leaves, logits_BQV, allowed)
            wide = max(map(len, leaves))
            if depth == most or wide == 0:
                break
            whole = whole and all(tree.branches == 1 for tree in trees)
            ids, branching = drafted(trees, leaves, fed, self.device)
            if self.last_id is not None:
                ids = ids.clamp_max(self.last_id)
            logits_BQV = self.engine.step(ids) if whole else self.engine.step(ids, branching)
            forwards, fed = forwards + 1, fed + wide
        self.held, self.trees = self.read_of(rows), [tree.branch_by_branch() for tree in trees]
        meant, late = [tree.depth for tree in self.trees], behind > USUALLY_BEHIND
        if any(tree.branches > 1 for tree in trees):
            return Proposal(None, None, meant, forwards, late, self.trees)
        longest = max(meant)
        ids = torch.tensor([tree.tokens[1:] + [0] * (longest - len(tree)) for tree in self.trees])
        return Proposal(ids, None, meant, forwards, late)

    def _grown(self, rows: Rows, trees, leaves, logits_BQV: torch.Tensor, allowed: int) -> list[list[int]]:
        """Adds each leaf's next tokens to its tree; returns the leaves that go on."""
        candidates = max(allowed - min(tree.branches for tree in trees), 0) + 1
        p_BQC, token_BQC = self._likeliest(rows, trees, leaves, logits_BQV, candidates)
        grown: list[list[int]] = []
        for row, tree in enumerate(trees):
            grown.append([])
            for column, leaf in enumerate(leaves[row]):
                for number, (p, token) in enumerate(zip(p_BQC[row][column], token_BQC[row][column], strict=True)):
                    if number > 0:
                        if p <= self.p_split or tree.branches >= allowed:
                            break
                        tree.branches += 1
                    node = tree.add(leaf, token)
                    # As without a tree, an end of text or a doubtful token is proposed, and nothing after it.
                    if token not in rows.eos and p_BQC[row][column][0] >= self.threshold:
                        grown[row].append(node)
        return grown

    def _likeliest(self, rows: Rows, trees, leaves, logits_BQV: torch.Tensor, candidates: int) -> tuple[list, list]:
        if self.vocabulary is not None:
            logits_BQV = logits_BQV[..., : self.vocabulary]
        # Where it samples: the target's own ways with scores, as far as they do not look at ids.
        scores_BQV = logits_BQV.float() if self.processing is None else self.processing.warped(logits_BQV)
        largest_BQC, token_BQC = scores_BQV.topk(min(candidates, scores_BQV.shape[-1]), dim=-1)
        p_BQC = (largest_BQC - scores_BQV.logsumexp(-1, keepdim=True)).exp()
        return p_BQC.tolist(), token_BQC.tolist()

    def settle(self, added: list[int], paths: list[list[int]] | None = None) -> None:
        """As `DraftProposer.settle`; `paths`: the nodes of each row that stand, in a tree that has branched."""
        for row, count in enumerate(added):
            tree = self.trees[row]
            nodes = tree.nodes if paths is None else paths[row]
            places = [tree.places[node] for node in nodes[: max(count - 1, 0)]]
            places = [place for place in places if place is not None]
            self.engine.keep_branch(row, self.held[row], places)
            self.held[row] += len(places)
