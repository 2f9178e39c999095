"""Sums of tensors along the tree, as its subtrees become complete."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from strategies.reduction.tree import Subtree, split


class Summing:
    """How gradients are summed along the tree: as they are, or some other way that is made of this."""

    def start(self, root: Subtree, pool: list[torch.Tensor]) -> TreeSum:
        """A sum to be made."""
        return TreeSum(root, pool)

    def go_on(self, sums: TreeSum) -> bool:
        """One that was started in an earlier layout is gone on with; whether that can be."""
        return True

    def round(self, node: Subtree, values: torch.Tensor) -> torch.Tensor | None:
        """Rounds the sum of a node in place, and returns its codes; None where it is not rounded."""
        return None


class TreeSum:
    """Sums tensors of one shape along the tree under `root`, as soon as siblings are there. What is added is taken
    over; buffers that are no longer needed go to `pool`."""

    def __init__(self, root: Subtree, pool: list[torch.Tensor]) -> None:
        self.root = root
        self.pieces: dict[Subtree, torch.Tensor] = {}
        self.codes: dict[Subtree, torch.Tensor] = {}
        """Of `pieces`, where they are rounded."""
        self._pool = pool

    def add(self, node: Subtree, tensor: torch.Tensor) -> None:
        """Adds a finished subtree, and joins it with its sibling for as long as that one is complete too."""
        self._join(node, tensor, self._above(node))

    def add_from(self, node: Subtree, tensor: torch.Tensor) -> None:
        """The same of a tensor that is not taken over: where its sibling is there, no other is needed."""
        parents = self._above(node)
        if parents:
            left, right = split(parents[-1])
            if (other := self.pieces.pop(left if node == right else right, None)) is not None:
                # Which of two summands comes first makes no difference.
                node = parents.pop()
                self._join(node, self._made(node, other.add_(tensor)), parents)
                return
        own = self._pool.pop() if self._pool else torch.empty_like(tensor)
        # As if it were added to zeros: what is -0 is 0.
        self._join(node, torch.add(tensor, 0.0, out=own), parents)

    def add_round(self, found: Sequence[tuple[Subtree, torch.Tensor]]) -> None:
        """Adds what is there at once, in tensors that are changed but not taken over: siblings among them need no
        other."""
        joined: list[tuple[Subtree, torch.Tensor]] = []
        for node, tensor in sorted(found, key=lambda each: each[0]):
            while joined and self._are_siblings(joined[-1][0], node):
                left, total = joined.pop()
                node = left[0], node[1]
                tensor = self._made(node, total.add_(tensor))
            joined.append((node, tensor))
        for node, tensor in joined:
            self.add_from(node, tensor)

    def _are_siblings(self, left: Subtree, right: Subtree) -> bool:
        parents = self._above(left)
        return bool(parents) and split(parents[-1]) == (left, right)

    def _above(self, node: Subtree) -> list[Subtree]:
        """The subtrees that it is in, from the whole tree down."""
        parents: list[Subtree] = []
        at = self.root
        while at != node:
            parents.append(at)
            left, right = split(at)
            at = left if node[1] <= left[1] else right
        return parents

    def _join(self, node: Subtree, tensor: torch.Tensor, parents: list[Subtree]) -> None:
        while parents:
            left, right = split(parents[-1])
            sibling = left if node == right else right
            if sibling not in self.pieces:
                break
            other = self.pieces.pop(sibling)
            first, second = (other, tensor) if sibling == left else (tensor, other)
            node = parents.pop()
            tensor = self._made(node, first.add_(second))
            self._pool.append(second)
        self.pieces[node] = tensor

    def _made(self, node: Subtree, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a node of which both children were there."""
        return tensor

    def total(self) -> torch.Tensor:
        """The sum over all virtual workers, which must all have been added."""
        return self.pieces[self.root]

    def clear(self) -> None:
        self._pool += self.pieces.values()
        self.pieces, self.codes = {}, {}
