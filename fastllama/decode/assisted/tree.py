"""Trees of proposed tokens on the host, and what a forward pass must know of them.

Legend: B rows, Q newest tokens, T tokens of the tree, the newest last.
"""

import numpy as np
import torch

from fastllama.model.tree import Branching


class Tree:
    """One row's proposals. Node 0 is the row's newest certain token; every other node follows its parent.

    `depths` counts from node 0; `places`: where a node lies in the draft's cache, from the first of the tree on; None
    where the draft was not shown it. `branches` is how many there are, ended or not.
    """

    def __init__(self):
        self.tokens, self.parents, self.depths = [0], [-1], [0]
        self.places: list[int | None] = [None]
        self.branches = 1

    def __len__(self) -> int:
        """Proposed tokens."""
        return len(self.tokens) - 1

    @property
    def nodes(self) -> range:
        """The proposed ones; a parent comes before those that follow it."""
        return range(1, len(self.tokens))

    @property
    def depth(self) -> int:
        """Tokens of the longest branch."""
        return max(self.depths)

    def add(self, parent: int, token: int) -> int:
        """The new node."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.places.append(None)
        return len(self.tokens) - 1

    def path(self, node: int) -> list[int]:
        """The nodes from the first proposed one to `node`."""
        nodes = []
        while node > 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def children(self) -> list[list[int]]:
        """Of each node those that follow it, in the order in which they were added."""
        found: list[list[int]] = [[] for _ in self.tokens]
        for node in self.nodes:
            found[self.parents[node]].append(node)
        return found

    def branch_by_branch(self) -> "Tree":
        """The same with the first branch's nodes first, so that they lie in the cache as if there were no other."""
        children, order, waiting = self.children(), [], [0]
        while waiting:
            node = waiting.pop()
            order.append(node)
            waiting += reversed(children[node])
        place = {node: number for number, node in enumerate(order)}
        made = Tree()
        made.tokens = [self.tokens[node] for node in order]
        made.parents = [place.get(self.parents[node], -1) for node in order]
        made.depths, made.places = [self.depths[node] for node in order], [self.places[node] for node in order]
        made.branches = self.branches
        return made


def walked(tree: Tree, choose, stop=lambda: False) -> tuple[list[int], list[int]]:
    """(tokens that are kept, nodes that stand): from node 0 on, the node that `choose(node)`'s token is, while there is
    one and not `stop()`; the last token is the target's own."""
    children, node = tree.children(), 0
    kept: list[int] = []
    stood: list[int] = []
    while True:
        kept.append(choose(node))
        if stop():
            return kept, stood
        following = [child for child in children[node] if tree.tokens[child] == kept[-1]]
        if not following:
            return kept, stood
        node = following[0]
        stood.append(node)


def verified(trees: list[Tree], newest: list[int], device: torch.device) -> tuple[torch.Tensor, Branching]:
    """ids [B, 1 + nodes] for one pass of the target, where node n lies at n, and who sees whom.

    Rows with fewer nodes end in tokens that nobody else sees.
    """
    total, rows = max(map(len, trees)) + 1, np.arange(len(trees))
    ids, parents, depths = (np.zeros((len(trees), total), np.int64) for _ in range(3))
    parents[:] = np.arange(total)
    for row, tree in enumerate(trees):
        nodes = len(tree) + 1
        ids[row, :nodes], parents[row, 1:nodes], depths[row, :nodes] = tree.tokens, tree.parents[1:], tree.depths
    ids[:, 0] = newest
    seen_BTT = np.eye(total, dtype=bool)[None].repeat(len(trees), 0)
    for node in range(1, total):  # parents come before
        seen_BTT[:, node] |= seen_BTT[rows, parents[:, node]]
    return _on(device, ids, depths, seen_BTT)


def drafted(
    trees: list[Tree], nodes: list[list[int]], before: int, device: torch.device
) -> tuple[torch.Tensor, Branching]:
    """(ids [B, Q], who sees whom) for a draft's pass over the newest `nodes` of each row, `before` tokens of the tree
    being in its cache; notes where they come to lie."""
    wide = max(map(len, nodes))
    ids, depths = (np.zeros((len(trees), wide), np.int64) for _ in range(2))
    seen_BQT = np.zeros((len(trees), wide, before + wide), bool)
    seen_BQT[:, range(wide), range(before, before + wide)] = True
    for row, (tree, some) in enumerate(zip(trees, nodes, strict=True)):
        for column, node in enumerate(some):
            tree.places[node] = before + column
            ids[row, column], depths[row, column] = tree.tokens[node], tree.depths[node] - 1
            seen_BQT[row, column, [tree.places[each] for each in tree.path(node)]] = True
    return _on(device, ids, depths, seen_BQT)


def _on(device: torch.device, ids, depths, seen) -> tuple[torch.Tensor, Branching]:
    ids, depths, seen = (torch.from_numpy(each).to(device) for each in (ids, depths, seen))
    return ids, Branching(depths, seen)
