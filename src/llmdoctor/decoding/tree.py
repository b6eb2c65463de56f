"""The shape of a round's guesses: a tree, the same for all rows, its tokens each row's own."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Tree:
    """Guesses, the root's place in front, a parent always before its children and the shallower before the deeper.

    Attributes:
        parents: of each node but the root, which is node 0.
        ranks: of each node but the root: it is the candidate of that rank after its parent, 0 the first.
    """

    parents: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()

    @property
    def guesses(self) -> int:
        """Nodes but the root."""
        return len(self.parents)

    @cached_property
    def children(self) -> list[list[int]]:
        """Of each node, in the order of their ranks."""
        found: list[list[int]] = [[] for _ in range(self.guesses + 1)]
        for node, parent in enumerate(self.parents, 1):
            found[parent].append(node)
        return found

    @cached_property
    def levels(self) -> list[list[int]]:
        """Nodes by their depth; the root alone is the first level."""
        found = [[0]]
        while below := [child for node in found[-1] for child in self.children[node]]:
            found.append(below)
        return found


class Branching:
    """The trees that are expected to give most tokens, of every size: each holds the smaller ones.

    Args:
        rates: that the candidate of rank r is the token drawn, where its parent was; their sum is at most 1.
        most: nodes; fewer where the tree is full.
        depth: of the deepest node.

    Attributes:
        tokens: expected of the trees of 0, 1, 2, … nodes.
        levels: of these trees, the root's not counted.
    """

    def __init__(self, rates: Sequence[float], most: int, depth: int) -> None:
        # A node is worth the chance that all of its branch is drawn, so it is worth less than its parent and than the
        # candidate before it: the best ones one after the other are a tree.
        self._chosen: list[tuple[int, int, int]] = []  # parent, rank and depth, in the order of choice
        self.tokens, self.levels = [1.0], [0]
        heap = [(-rates[0], 0, 0, 1)] if rates and depth >= 1 else []  # −worth, parent, rank, depth
        while heap and len(self._chosen) < most:
            worth, parent, rank, level = heapq.heappop(heap)
            self._chosen.append((parent, rank, level))
            self.tokens.append(self.tokens[-1] - worth)
            self.levels.append(max(self.levels[-1], level))
            if rank + 1 < len(rates):
                heapq.heappush(heap, (worth * rates[rank + 1] / max(rates[rank], 1e-9), parent, rank + 1, level))
            if level < depth:
                heapq.heappush(heap, (worth * rates[0], len(self._chosen), 0, level + 1))

    def tree(self, guesses: int) -> Tree:
        """That of so many nodes, or of all there are."""
        chosen = self._chosen[:guesses]
        # Numbered level by level: by the parent's number, then by rank.
        place, order = {0: 0}, []
        for level in range(1, self.levels[len(chosen)] + 1):
            here = [index for index in range(len(chosen)) if chosen[index][2] == level]
            here.sort(key=lambda index: (place[chosen[index][0]], chosen[index][1]))
            order += here
            place |= {index + 1: len(place) + number for number, index in enumerate(here)}
        return Tree(tuple(place[chosen[index][0]] for index in order), tuple(chosen[index][1] for index in order))
