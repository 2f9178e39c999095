"""What nodes of the summation tree have rounded off, to be added in the next step: their state. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from strategies.layout.parallel import ParallelLayout
from strategies.layout.space import FlatRanges, Space
from strategies.layout.virtual import Place, VirtualState
from strategies.reduction.tree import Subtree, cover, split
from strategies.wire.format import WireFormat

RESIDUAL, FACTOR = "residual", "q"


@cache
def rounded_nodes(root: Subtree, wire: WireFormat) -> tuple[Subtree, ...]:
    """Those whose sums are rounded, in a fixed order; with power_sgd virtual workers, which keep something back."""
    if wire.name == "power_sgd":
        return tuple((index, index + 1) for index in range(*root))
    if not wire.rounds(root):
        return ()
    below = [node for child in split(root) for node in rounded_nodes(child, wire)] if root[1] - root[0] > 1 else []
    return (*below, root)


class Residuals(VirtualState):
    """One residual for each node that is rounded. A rank has those of the subtrees that its virtual workers fill; of
    nodes above them the owner of a slice has its slice, and where sums are made round by round of all that are no
    leaves."""

    name = "wire"

    def __init__(self, root: Subtree, wire: WireFormat) -> None:
        self.nodes = rounded_nodes(root, wire)
        self._numbers = {node: number for number, node in enumerate(self.nodes)}
        super().__init__(len(self.nodes), (RESIDUAL,))

    def index(self, node: Subtree) -> int:
        """The number of a node that is rounded."""
        return self._numbers[node]

    def places(self, layout: ParallelLayout, space: Space) -> Iterator[Place]:
        by_rounds = layout.effective_shard == "gradients"
        covers = [cover(held, layout.root) for held in layout.assignment]
        for stage in range(layout.pipeline):
            flat = FlatRanges.of(space.ranges_of(layout.blocks_of(stage)), space.boundary)
            sizes = space.slices(flat, layout.data)
            for index, node in enumerate(self.nodes):
                whole_at = next((k for k, held in enumerate(covers) if _is_in(node, held)), None)
                if by_rounds and node[1] - node[0] > 1:
                    whole_at = None
                for tensor in range(layout.tensor):
                    if whole_at is not None:
                        rank = layout.rank_of(whole_at, stage, tensor)
                        yield Place(index, tensor, tuple(flat.ranges), (rank,))
                        continue
                    start = 0
                    for replica, size in enumerate(sizes):
                        if ranges := tuple(flat.cut(start, start + size)):
                            yield Place(index, tensor, ranges, (layout.rank_of(replica, stage, tensor),))
                        start += size


class Factors(VirtualState):
    """What PowerSGD multiplies with in the next step: it is there once, wherever gradients are summed."""

    name = "power"

    def __init__(self) -> None:
        super().__init__(1, (FACTOR,))

    def places(self, layout: ParallelLayout, space: Space) -> Iterator[Place]:
        for stage in range(layout.pipeline):
            ranges = FlatRanges.of(space.ranges_of(layout.blocks_of(stage)), space.boundary).ranges
            for tensor in range(layout.tensor):
                yield Place(0, tensor, tuple(ranges), layout.data_group(layout.rank_of(0, stage, tensor)))


def virtual_states(root: Subtree, wire: WireFormat) -> list[VirtualState]:
    """What virtual things have for themselves where sums are sent so."""
    found: list[VirtualState] = [Residuals(root, wire)] if wire.feedback else []
    return [*found, Factors()] if wire.name == "power_sgd" else found


def _is_in(node: Subtree, nodes: tuple[Subtree, ...]) -> bool:
    return any(start <= node[0] and node[1] <= stop for start, stop in nodes)
