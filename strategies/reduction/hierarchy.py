"""The canonical reduction between nodes: partial sums meet inside a node before they cross the network.

A gradient goes to its owners in two exchanges. In the first every rank gets, from the ranks of its node, what its
*rail* owns (the ranks with its place on all nodes), and adds it up along the tree as far as its node can. In the second
it gets, from its rail, its own slice of what the other nodes have. So of all that the ranks of a node hold, one partial
sum for each whole subtree crosses the network, and not one for each rank: with eight ranks on a node an eighth of the
bytes. The finished slices go the same ways back. What is added to what is the tree's, as always: the bits are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch

from strategies.comm.fabric import Hierarchy
from strategies.comm.groups import Groups
from strategies.layout.parallel import ParallelLayout
from strategies.reduction.reducer import Reducer
from strategies.reduction.tree import Subtree, cover, fold
from strategies.reduction.tree_sum import TreeSum


class HierarchicalReducer(Reducer):
    """A `Reducer` for ranks on several nodes."""

    def __init__(
        self, groups: Groups, hierarchy: Hierarchy, layout: ParallelLayout, size: int, device: torch.device,
        slices: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(groups, layout, size, device, slices=slices)
        self._hierarchy = hierarchy
        nodes = hierarchy.nodes
        held = [tuple(index for rank in ranks for index in layout.assignment[rank]) for ranks in nodes]
        self._node_covers = [cover(indices, layout.root) for indices in held]
        bounds = [0, *accumulate(self.slices)]
        self._slice_of = [slice(start, stop) for start, stop in pairwise(bounds)]
        self._rails = list(zip(*nodes, strict=True))
        """The ranks of each."""

    def reduce(
        self, pieces: Mapping[Subtree, torch.Tensor], codes: Mapping[Subtree, torch.Tensor] | None = None
    ) -> torch.Tensor:
        self.check_pieces(pieces)
        hierarchy, mine = self._hierarchy, self.covers[self.groups.rank]
        fellows, rail = hierarchy.nodes[hierarchy.node], self._rails[hierarchy.place]
        lengths = [sum(self.slices[rank] for rank in ranks) for ranks in self._rails]
        length = lengths[hierarchy.place]
        outgoing = [pieces[node][self._slice_of[rank]] for ranks in self._rails for node in mine for rank in ranks]
        received = _exchange(
            hierarchy.inner, outgoing, [len(self.covers[rank]) * length for rank in fellows],
            [len(mine) * other for other in lengths], self._device,
        )  # fmt: skip
        sums = TreeSum(self.layout.root, [])
        nodes = [node for rank in fellows for node in self.covers[rank]]
        for node, part in zip(nodes, received.split(length) if length else [received] * len(nodes), strict=True):
            sums.add(node, part)
        ours = self._node_covers[hierarchy.node]
        sizes = [self.slices[rank] for rank in rail]
        parts = [sums.pieces[node].split(sizes) for node in ours]
        own = sizes[hierarchy.node]
        received = _exchange(
            hierarchy.rail, [part[node] for node in range(len(rail)) for part in parts],
            [len(nodes) * own for nodes in self._node_covers], [len(ours) * size for size in sizes], self._device,
        )  # fmt: skip
        if not own:
            return received
        all_nodes = [node for nodes in self._node_covers for node in nodes]
        arrived = dict(zip(all_nodes, received.split(own), strict=True))
        total: torch.Tensor = fold(arrived, self.layout.root, torch.Tensor.add_)
        return total

    def gather(self, mine: torch.Tensor, everything: torch.Tensor) -> None:
        hierarchy = self._hierarchy
        rail = self._rails[hierarchy.place]
        sizes = [self.slices[rank] for rank in rail]
        mine = mine.to(everything)
        of_rail = _exchange(hierarchy.rail, [mine] * len(rail), sizes, [len(mine)] * len(rail), self._device)
        lengths = [sum(self.slices[rank] for rank in ranks) for ranks in self._rails]
        count = len(lengths)
        received = _exchange(hierarchy.inner, [of_rail] * count, lengths, [len(of_rail)] * count, self._device)
        order = [rank for ranks in self._rails for rank in ranks]
        for rank, part in zip(order, received.split([self.slices[rank] for rank in order]), strict=True):
            everything[self._slice_of[rank]].copy_(part)


def _exchange(
    groups: Groups, outgoing: Sequence[torch.Tensor], received: list[int], sent: list[int], device: torch.device
) -> torch.Tensor:
    """What arrives, by source, of what goes out, by destination."""
    dtype = outgoing[0].dtype if outgoing else torch.float32
    arrived = torch.empty(sum(received), dtype=dtype, device=device)
    groups.all_to_all(arrived, torch.cat(list(outgoing)) if outgoing else arrived[:0], received, sent)
    return arrived
