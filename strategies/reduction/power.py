"""PowerSGD (Vogels, Karimireddy and Jaggi 2019), to the same bits for any number of ranks.

In place of a matrix M [m, n] two thin ones are summed over virtual workers, along the tree: P = M Q [m, r], for the Q
of the step before, and after its columns have been made orthonormal, Q = M^T P [n, r]. The sum of all M is taken to be
P Q^T. What a virtual worker's own M differs by from P times its own Q^T it adds to M in the next step. Vectors, and
what a model uses twice, are summed as they are, and so is everything in the first steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from strategies.comm.groups import Groups
from strategies.layout.parallel import ParallelLayout
from strategies.layout.space import FlatRanges, Space
from strategies.reduction.coded import Residual
from strategies.reduction.reducer import Reducer
from strategies.reduction.tree import Subtree
from strategies.reduction.tree_sum import Summing, TreeSum
from strategies.wire.blocks import Blocks, is_coded

EPSILON = 1e-30
"""Added to norms that are divided by."""


class Matrix(NamedTuple):
    """One that is sent as two: where it is in a buffer, and its shape; `key` names its first Q."""

    start: int
    rows: int
    columns: int
    key: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        """A view."""
        return buffer[self.start : self.stop].view(self.rows, self.columns)


def matrices_of(
    space: Space, flat: FlatRanges, rank: int, key_of: Callable[[str], int] = lambda name: 0
) -> list[Matrix]:  # fmt: skip
    """Those of a buffer of these ranges that are worth it, with keys by their names."""
    found = []
    for slot in space.slots:
        for _, offset, count in flat.locate(slot.offset, slot.offset + slot.numel):
            rows, columns = slot.shape[0], math.prod(slot.shape[1:])
            if is_coded(space, slot) and count == slot.numel and rank * (rows + columns) < rows * columns:
                found.append(Matrix(offset, rows, columns, key_of(slot.name)))
    return found


class LeafSum(TreeSum):
    """Keeps the gradients of virtual workers apart."""

    def add(self, node: Subtree, tensor: torch.Tensor) -> None:
        self.pieces[node] = tensor


class LeavesApart(Summing):
    """The way to a `LeafSum`."""

    def start(self, root: Subtree, pool: list[torch.Tensor]) -> TreeSum:
        return LeafSum(root, pool)


class PowerReducer(Reducer):
    """A `Reducer` of the gradients of virtual workers, each by itself. `factor` is Q, laid out like weights:
    what it is, and where that of the next step is put. `begins_at` is the first step that is compressed."""

    def __init__(
        self, groups: Groups, layout: ParallelLayout, flat: FlatRanges, matrices: Sequence[Matrix], rank: int,
        device: torch.device, slices: Sequence[int], factor: Callable[[], Residual],
        residual_of: Callable[[Subtree], Residual] | None, begins_at: int,
    ) -> None:  # fmt: skip
        super().__init__(groups, layout, flat.size, device, slices=slices)
        self._step = 0
        self._matrices, self._rank, self._begins_at = matrices, rank, begins_at
        self._factor, self._residual_of = factor, residual_of
        # As far as the rest goes, a matrix is a block of its own.
        self._rest = Blocks([(m.start, m.stop) for m in matrices], 1, flat.size)
        bounds = list(pairwise([0, *accumulate(self.slices)]))
        self._bounds = bounds[groups.rank]
        self._rest_of = [self._rest.cut(start, stop) for start, stop in bounds]
        counts = [each.num_plain for each in self._rest_of]
        self._plain = Reducer(groups, layout, self._rest.num_plain, device, slices=counts)
        self._ps = Reducer(groups, layout, sum(m.rows for m in matrices) * rank, device)
        self._qs = Reducer(groups, layout, sum(m.columns for m in matrices) * rank, device)
        self._exact = Reducer(groups, layout, flat.size, device, slices=slices)
        self._whole: torch.Tensor | None = None

    def begin(self, step: int) -> None:
        self._step = step

    def check_pieces(self, pieces: Mapping[Subtree, torch.Tensor]) -> None:
        held = {(index, index + 1) for index in self.layout.assignment[self.groups.rank]}
        if set(pieces) != held:
            raise ValueError(f"replica {self.groups.rank} must bring the leaves {sorted(held)}, got {sorted(pieces)}")

    def reduce(
        self, pieces: Mapping[Subtree, torch.Tensor], codes: Mapping[Subtree, torch.Tensor] | None = None
    ) -> torch.Tensor:  # fmt: skip
        self.check_pieces(pieces)
        if self._step < self._begins_at or not self._matrices:
            self._whole = None
            return self._exact.reduce(self._sums(pieces, lambda node, leaf: leaf.clone()))
        traffic = self.groups.traffic
        with traffic.of("plain"):
            rest = self._plain.reduce(self._sums(pieces, lambda node, leaf: torch.cat(self._rest.plain(leaf))))
        factors = self._cut(self._factor().now, "columns", start_of="weights")
        before = [self._first(m) if not q.any() else q for m, q in zip(self._matrices, factors, strict=True)]
        ps = self._total(self._ps, pieces, lambda m, number, own: own @ before[number])
        bases = [_orthonormal(p) for p in self._cut(ps, "rows")]
        qs = self._total(self._qs, pieces, lambda m, number, own: own.t() @ bases[number])
        whole = torch.zeros(self.size, device=self._device)
        after = self._factor().next
        for number, (m, q) in enumerate(zip(self._matrices, self._cut(qs, "columns"), strict=True)):
            torch.mm(bases[number], q.t(), out=m.of(whole))
            after[m.start : m.start + q.numel()] = q.reshape(-1)
        self._keep(pieces, bases)
        self._whole = whole
        mine = whole[self._bounds[0] : self._bounds[1]]
        _spread(rest, self._rest_of[self.groups.rank].plain(mine))
        return mine

    def gather_sum(self, mine: torch.Tensor, everything: torch.Tensor) -> None:
        if self._whole is None:
            self._exact.gather(mine, everything)
            return
        rest = torch.empty(self._rest.num_plain, device=self._device)
        with self.groups.traffic.of("plain"):
            self._plain.gather(torch.cat([mine[:0], *self._rest_of[self.groups.rank].plain(mine)]), rest)
        everything.copy_(self._whole)
        _spread(rest, self._rest.plain(everything))

    def _sums(
        self, pieces: Mapping[Subtree, torch.Tensor], of: Callable[[Subtree, torch.Tensor], torch.Tensor]
    ) -> dict[Subtree, torch.Tensor]:  # fmt: skip
        """The sums along the tree, as far as this rank can add up, of something that is made of each gradient."""
        sums = TreeSum(self.layout.root, [])
        for node, leaf in sorted(pieces.items()):
            sums.add(node, of(node, leaf))
        return sums.pieces

    def _own(self, node: Subtree, leaf: torch.Tensor) -> Iterator[tuple[int, Matrix, torch.Tensor]]:
        """The matrices of a virtual worker, with what it has kept back of them."""
        kept = None if self._residual_of is None else self._residual_of(node).now
        for number, m in enumerate(self._matrices):
            yield number, m, m.of(leaf) if kept is None else m.of(leaf) + m.of(kept)

    def _total(
        self, reducer: Reducer, pieces: Mapping[Subtree, torch.Tensor],
        product: Callable[[Matrix, int, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """The sum over all virtual workers of a product with each of their matrices, end to end."""

        def of(node: Subtree, leaf: torch.Tensor) -> torch.Tensor:
            return torch.cat([product(m, number, own).reshape(-1) for number, m, own in self._own(node, leaf)])

        found = torch.empty(reducer.size, device=self._device)
        reducer.gather(reducer.reduce(self._sums(pieces, of)), found)
        return found

    def _keep(self, pieces: Mapping[Subtree, torch.Tensor], bases: Sequence[torch.Tensor]) -> None:
        """What no virtual worker has sent of its own."""
        if self._residual_of is None:
            return
        for node, leaf in pieces.items():
            after = self._residual_of(node).next
            for number, m, own in self._own(node, leaf):
                basis = bases[number]
                m.of(after).copy_(own - basis @ (basis.t() @ own))

    def _cut(self, values: torch.Tensor, side: str, start_of: str = "") -> list[torch.Tensor]:
        """The thin matrices in a buffer: end to end, or each where the weights that it stands for begin."""
        found, at = [], 0
        for m in self._matrices:
            long = getattr(m, side)
            start = m.start if start_of else at
            found.append(values[start : start + long * self._rank].view(long, self._rank))
            at += long * self._rank
        return found

    def _first(self, m: Matrix) -> torch.Tensor:
        """A Q to begin with."""
        generator = torch.Generator().manual_seed(m.key)
        return torch.randn((m.columns, self._rank), generator=generator).to(self._device)


def _orthonormal(p: torch.Tensor) -> torch.Tensor:
    """Columns of length 1 that are at right angles to one another, over the same space (Gram and Schmidt)."""
    columns = p.double()
    for number in range(columns.shape[1]):
        column = columns[:, number]
        column /= column.norm() + EPSILON
        rest = columns[:, number + 1 :]
        rest -= torch.outer(column, column @ rest)
    return columns.float()


def _spread(values: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    at = 0
    for part in parts:
        part.copy_(values[at : at + len(part)])
        at += len(part)


def compressed_share(space: Space, rank: int) -> float:
    """What is sent of all gradients, as a share of fp32."""
    matrices = matrices_of(space, FlatRanges.of([(0, space.size)], space.boundary), rank)
    thin = sum(rank * (m.rows + m.columns) for m in matrices)
    whole = sum(m.rows * m.columns for m in matrices)
    return (space.size - whole + thin) / space.size
