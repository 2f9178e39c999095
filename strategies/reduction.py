"""The canonical reduction: sums over virtual workers whose bits do not depend on who computed what.

Each rank sends, to the owner of every slice of the gradient, the partial sums of the largest whole subtrees it holds;
the owner adds the pieces along the tree (`strategies.tree`); an exchange brings the finished slices back to everyone.
Two all-to-alls of one gradient each: what a ring all-reduce moves, without its order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from strategies.flat import ALIGNMENT
from strategies.groups import Groups
from strategies.layout import ParallelLayout, even
from strategies.tree import Node, cover, fold


class Reducer:
    """Reduces gradients of `size` elements over the ranks of one generation.

    With `native`, the local sum goes through the backend's own all-reduce instead: equal on all ranks and within
    rounding of the canonical result, but its bits depend on the ranks.
    """

    def __init__(
        self, groups: Groups, layout: ParallelLayout, size: int, device: torch.device, native: bool = False
    ) -> None:
        self.groups = groups
        self.layout = layout
        self.size = size
        self.native = native
        self.slices = even(size, layout.world_size, ALIGNMENT)
        self.covers = tuple(cover(held, layout.virtual_workers) for held in layout.assignment)
        self._start = sum(self.slices[: groups.rank])
        self._device = device
        self._received = torch.empty(
            0 if native else sum(len(nodes) for nodes in self.covers) * self.slices[groups.rank],
            device=device,
        )
        # Kept for the life of the generation: fresh memory of this size costs the kernel a page fault every 4 KiB.
        copies = 0 if native or layout.world_size == 1 else layout.world_size
        self._outgoing = torch.empty(copies * self.slices[groups.rank], device=device)

    def own_slice(self, gradient: torch.Tensor) -> torch.Tensor:
        """This rank's slice (a view) of a full gradient [size]."""
        return gradient[self._start : self._start + self.slices[self.groups.rank]]

    def reduce(self, pieces: Mapping[Node, torch.Tensor]) -> torch.Tensor | None:
        """Sums `pieces` (this rank's partial sums [size], one per node of its cover) with everyone's.

        Returns this rank's finished slice, or with `native` the whole sum; the pieces stay as they are, for another
        attempt should this one fail. Raises PeerLost.
        """
        world_size, rank = self.layout.world_size, self.groups.rank
        mine = self.covers[rank]
        if set(pieces) != set(mine):
            raise ValueError(f"rank {rank} must bring the subtrees {mine}, got {sorted(pieces)}")
        if self.native:
            total = torch.zeros(self.size, device=self._device)
            for node in mine:
                total += pieces[node]
            self.groups.all_reduce(total)
            return total
        if world_size == 1:
            return pieces[mine[0]]
        if len(mine) == 1:
            outgoing = pieces[mine[0]]
        else:
            parts = [pieces[node].split(list(self.slices)) for node in mine]
            ordered = [part[peer] for peer in range(world_size) for part in parts]
            outgoing = torch.cat(ordered) if ordered else torch.empty(0, device=self._device)
        length = self.slices[rank]
        self.groups.all_to_all(
            self._received,
            outgoing,
            [len(nodes) * length for nodes in self.covers],
            [len(mine) * other for other in self.slices],
        )
        arrived = dict(
            zip((node for nodes in self.covers for node in nodes), self._received.split(length), strict=True)
            if length
            else {}
        )
        return fold(arrived, self.layout.virtual_workers, torch.Tensor.add_) if length else self._received

    def gather(self, reduced: torch.Tensor, gradient: torch.Tensor) -> None:
        """Brings every rank's finished slice together into `gradient` [size] on every rank. Raises PeerLost."""
        world_size = self.layout.world_size
        if self.native or world_size == 1:
            gradient.copy_(reduced)
            return
        self._outgoing.view(world_size, -1).copy_(reduced)
        self.groups.all_to_all(gradient, self._outgoing, list(self.slices), [len(reduced)] * world_size)
