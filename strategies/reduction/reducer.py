"""The canonical reduction: sums over virtual workers whose bits do not depend on who computed what.

Each rank sends, to the owner of every slice of the gradient, the partial sums of the largest whole subtrees it holds;
the owner adds the pieces along the tree (`strategies.reduction.tree`); an exchange brings the finished slices back to
everyone. Two all-to-alls of one gradient each: what a ring all-reduce moves, without its order. Where gradients are
sharded, the same is done one virtual worker of each replica at a time, so that nobody ever has more than its slice of a
sum.

Everything happens in a data-parallel group: the ranks that compute the same part of the model, one for each replica.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from strategies.comm.groups import Groups
from strategies.layout.assignment import even
from strategies.layout.parallel import ParallelLayout
from strategies.layout.space import ALIGNMENT
from strategies.reduction.tree import Subtree, cover, fold
from strategies.reduction.tree_sum import TreeSum


class Reducer:
    """Reduces gradients of `size` elements over the ranks of a data-parallel group, all virtual workers at once.

    Each owns a slice, all of about the same size or of these `slices`, by rank. With `native`, the local sum goes
    through the backend's own all-reduce instead: equal on all ranks and within rounding of the canonical result, but
    its bits depend on the ranks.
    """

    def __init__(
        self, groups: Groups, layout: ParallelLayout, size: int, device: torch.device, native: bool = False,
        slices: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.groups = groups
        self.layout = layout
        self.size = size
        self.native = native
        self.slices = even(size, layout.data, ALIGNMENT) if slices is None else tuple(slices)
        self.covers = tuple(cover(held, layout.root) for held in layout.assignment)
        self._start = sum(self.slices[: groups.rank])
        self._device = device
        # Kept for the life of the generation from their first use on: fresh memory of this size costs the kernel a page
        # fault every 4 KiB.
        self._received = torch.empty(0, device=device)
        self._outgoing = torch.empty(0, device=device)

    def own_slice(self, gradient: torch.Tensor) -> torch.Tensor:
        """This rank's slice (a view) of a full gradient [size]."""
        return gradient[self._start : self._start + self.slices[self.groups.rank]]

    def reduce(
        self, pieces: Mapping[Subtree, torch.Tensor], codes: Mapping[Subtree, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Sums `pieces` (this rank's partial sums [size], one per node of its cover) with everyone's. `codes` are those
        of pieces that have been rounded (`strategies.reduction.coded`).

        Returns this rank's finished slice, or with `native` the whole sum; the pieces stay as they are, for another
        attempt should this one fail. Raises PeerLost.
        """
        self.check_pieces(pieces)
        ranks, rank = self.layout.data, self.groups.rank
        mine = self.covers[rank]
        if self.native:
            total = torch.zeros(self.size, device=self._device)
            for node in mine:
                total += pieces[node]
            self.groups.all_reduce(total)
            return total
        if ranks == 1:
            return pieces[mine[0]]
        if len(mine) == 1:
            outgoing = pieces[mine[0]]
        else:
            parts = [pieces[node].split(list(self.slices)) for node in mine]
            ordered = [part[peer] for peer in range(ranks) for part in parts]
            outgoing = torch.cat(ordered) if ordered else torch.empty(0, device=self._device)
        length = self.slices[rank]
        sizes = [len(nodes) * length for nodes in self.covers]
        if self._received.numel() != sum(sizes):
            self._received = torch.empty(sum(sizes), device=self._device)
        self.groups.all_to_all(
            self._received,
            outgoing,
            sizes,
            [len(mine) * other for other in self.slices],
        )
        arrived = dict(
            zip((node for nodes in self.covers for node in nodes), self._received.split(length), strict=True)
            if length
            else {}
        )
        return fold(arrived, self.layout.root, torch.Tensor.add_) if length else self._received

    def joined(self, pieces: Mapping[Subtree, torch.Tensor]) -> Mapping[Subtree, torch.Tensor]:
        """Pieces of which some may still be apart, as `reduce` wants them."""
        if set(pieces) == set(self.covers[self.groups.rank]):
            return pieces
        sums = TreeSum(self.layout.root, [])
        for node, piece in sorted(pieces.items()):
            sums.add(node, piece.clone())
        return sums.pieces

    def begin(self, step: int) -> None:
        """A step begins, whose number may make a difference."""

    def check_pieces(self, pieces: Mapping[Subtree, torch.Tensor]) -> None:
        """Raises ValueError unless these are what this rank has to bring."""
        mine = self.covers[self.groups.rank]
        if set(pieces) != set(mine):
            raise ValueError(f"replica {self.groups.rank} must bring the subtrees {mine}, got {sorted(pieces)}")

    def gather_sum(self, mine: torch.Tensor, everything: torch.Tensor) -> None:
        """Like `gather`, of what the last `reduce` has given."""
        self.gather(mine, everything)

    def gather(self, mine: torch.Tensor, everything: torch.Tensor) -> None:
        """Brings every rank's slice together into `everything` [size] on every rank, in the type of that. Raises
        PeerLost."""
        ranks = self.layout.data
        if ranks == 1:
            everything.copy_(mine)
            return
        if self._outgoing.numel() != ranks * len(mine) or self._outgoing.dtype != everything.dtype:
            self._outgoing = torch.empty(ranks * len(mine), dtype=everything.dtype, device=self._device)
        self._outgoing.view(ranks, -1).copy_(mine)
        self.groups.all_to_all(everything, self._outgoing, list(self.slices), [len(mine)] * ranks)


class RoundReducer:
    """Reduces gradients over the ranks of a data-parallel group, one virtual worker of each replica in every round.

    `sizes` are the elements each rank owns, by rank. Memory for what is summed is this rank's slice for every subtree
    that still waits for its sibling.
    """

    def __init__(self, groups: Groups, layout: ParallelLayout, sizes: Sequence[int], device: torch.device) -> None:
        self.groups = groups
        self.layout = layout
        self.sizes = tuple(sizes)
        self.num_rounds = max(len(held) for held in layout.assignment)
        self._pool: list[torch.Tensor] = []
        self._sums = TreeSum(layout.root, self._pool)
        self._device = device

    def begin(self) -> None:
        """Forgets what was added."""
        self._sums.clear()

    def add(self, number: int, gradient: torch.Tensor, codes: torch.Tensor | None = None) -> None:
        """Round `number`: the gradient [sum(sizes)] of this replica's virtual worker of that round, with its codes if
        it was rounded; of a replica that has none it is not looked at. Raises PeerLost."""
        ranks, rank = self.layout.data, self.groups.rank
        brings = [self.sizes if number < len(held) else (0,) * ranks for held in self.layout.assignment]
        length = self.sizes[rank]
        received = torch.empty(sum(sizes[rank] for sizes in brings), device=self._device)
        outgoing = gradient if number < len(self.layout.assignment[rank]) else gradient[:0]
        self.groups.all_to_all(received, outgoing, [sizes[rank] for sizes in brings], list(brings[rank]))
        workers = [held[number] for held in self.layout.assignment if number < len(held)]
        parts = received.split(length) if length else [received] * len(workers)
        self._sums.add_round([((worker, worker + 1), part) for worker, part in zip(workers, parts, strict=True)])

    def total(self) -> torch.Tensor:
        """This rank's slice of the sum over all virtual workers."""
        return self._sums.total()
