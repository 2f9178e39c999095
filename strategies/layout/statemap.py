"""Where state lives, and the plan that brings it to where it is wanted. Plain integers: no torch.

The trained state (weights and optimizer tensors) is one flat vector for each tensor-parallel coordinate; see
`strategies.layout.space`. A *span* is a range of one of them, and stands for all its tensors. What a rank has, and what
a layout wants it to have, are sets of spans; a plan is the transfers that turn the one into the other.

With thousands of ranks that shard every parameter there are millions of spans, so that sets of them are arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_TRANSFER = 4 << 20
"""Elements of one transfer at most: what is on its way is bounded, and several sources can share the work."""

Integers = NDArray[np.int64]


class Span(NamedTuple):
    """Elements `start <= element < stop` of the state of a tensor-parallel coordinate."""

    tensor: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


_BITS = 48
"""An element's *position* counts through all coordinates, each of which has room for 2**48 elements."""
_ELEMENT = (1 << _BITS) - 1


def _span(start: int, stop: int) -> Span:
    """The one between two positions."""
    return Span(start >> _BITS, start & _ELEMENT, stop & _ELEMENT)


class Spans:
    """A set of elements: spans that are ascending, disjoint, and no two of which touch. Immutable; sets of the same
    elements are equal. `union` and `whole` make them. `bounds` are the positions of all starts, and of all stops, of
    shape (2, spans)."""

    __slots__ = ("_hash", "bounds")

    bounds: Integers

    def __init__(self, bounds: Integers | None = None) -> None:
        self.bounds = np.empty((2, 0), np.int64) if bounds is None else np.ascontiguousarray(bounds)
        self.bounds.flags.writeable = False
        self._hash: int | None = None

    def __len__(self) -> int:
        return int(self.bounds.shape[1])

    def __iter__(self) -> Iterator[Span]:
        return map(_span, *self.bounds.tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spans):
            return NotImplemented
        return self is other or self.bounds.tobytes() == other.bounds.tobytes()

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(self.bounds.tobytes())
        return self._hash

    def __repr__(self) -> str:
        return f"Spans({', '.join(f'{tensor}:{start}..{stop}' for tensor, start, stop in self)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _of_bytes, (self.bounds.tobytes(),)


def _of_bytes(bounds: bytes) -> Spans:
    return Spans(np.frombuffer(bounds, np.int64).reshape(2, -1))


NOTHING = Spans()


def union(*groups: Iterable[Span]) -> Spans:
    """All elements of any of them, as few spans as can be. Groups that are no `Spans` may overlap, be in any order, and
    have spans without elements (which stop where they start, or before)."""
    if len(groups) == 1 and isinstance(groups[0], Spans):
        return groups[0]
    found = [_bounds_of(group) for group in groups]
    starts, stops = np.concatenate(found, axis=1) if found else NOTHING.bounds
    if not len(starts):
        return NOTHING
    starts, stops = np.sort(starts), np.sort(stops)
    # As many stop before a gap as start before it.
    gaps = np.flatnonzero(stops[:-1] < starts[1:])
    return Spans(np.stack((starts[np.append(0, gaps + 1)], stops[np.append(gaps, len(stops) - 1)])))


def _bounds_of(group: Iterable[Span]) -> Integers:
    if isinstance(group, Spans):
        return group.bounds
    listed = [span for span in group if span[1] < span[2]]
    if not listed:
        return NOTHING.bounds
    tensors, starts, stops = np.array(listed, np.int64).T
    bounds: Integers = np.stack((starts, stops)) + (tensors << _BITS)
    return bounds


def intersect(first: Spans, second: Spans) -> Spans:
    """The elements that are in both."""
    (starts, stops), (begins, ends) = first.bounds, second.bounds
    one, other = _overlaps(starts, stops, begins, ends)
    return Spans(np.stack((np.maximum(starts[one], begins[other]), np.minimum(stops[one], ends[other]))))


def _overlaps(starts: Integers, stops: Integers, begins: Integers, ends: Integers) -> tuple[Integers, Integers]:
    """Which of the ranges from `starts`, in ascending order, overlap with which of those from `begins`: indices into
    the ones and into the others, of the same length."""
    low, high = np.searchsorted(stops, begins, "right"), np.searchsorted(starts, ends, "left")
    return _ranges(low, high), np.repeat(np.arange(len(begins)), high - low)


def _ranges(low: Integers, high: Integers) -> Integers:
    """All integers from each of `low` to before its `high`, one range after the other."""
    counts = high - low
    found: Integers = np.arange(counts.sum()) + np.repeat(low - (np.cumsum(counts) - counts), counts)
    return found


def subtract(first: Spans, second: Spans) -> Spans:
    """The elements of the first that are not in the second."""
    if not first or first == second:
        return NOTHING
    starts, stops = second.bounds
    ends = np.array((0, np.iinfo(np.int64).max))
    gaps = Spans(np.stack((np.append(ends[:1], stops), np.append(starts, ends[1:]))))
    return intersect(first, gaps)


@cache
def whole(size: int, tensor: int) -> Spans:
    """The whole state: `size` elements for each of `tensor` coordinates."""
    return union(Span(coordinate, 0, size) for coordinate in range(tensor))


@dataclass(frozen=True)
class CutSpans:
    """What groups of spans have, cut wherever one of them begins or ends: a piece is in a group as a whole or not at
    all. `bounds` are the positions where pieces start and stop, of shape (2, pieces), ascending; some may be in no
    group. `of` are for each group the numbers of its pieces, ascending."""

    bounds: Integers
    of: list[Integers]

    def __len__(self) -> int:
        return int(self.bounds.shape[1])

    @property
    def lengths(self) -> Integers:
        starts, stops = self.bounds
        lengths: Integers = stops - starts
        return lengths


def cut_up(groups: Sequence[Spans]) -> CutSpans:
    """See `CutSpans`."""
    together = np.concatenate([NOTHING.bounds, *(group.bounds for group in groups)], axis=1)
    cuts = np.sort(together, axis=None)
    cuts = cuts[np.append(cuts[:1] >= 0, cuts[1:] > cuts[:-1])]
    low, high = np.searchsorted(cuts, together)
    pieces = _ranges(low, high)
    # Where in `pieces` those of each group begin, and the last ends.
    begins = np.append(0, np.cumsum(high - low))[np.cumsum([0, *(len(group) for group in groups)])]
    of = [pieces[begin:end] for begin, end in pairwise(begins.tolist())]
    return CutSpans(np.stack((cuts[:-1], cuts[1:])), of)


def _by_piece(pieces: Sequence[Integers], asked: NDArray[np.bool_]) -> dict[int, list[int]]:
    """Which ranks have each of the pieces that are `asked` (a truth value per piece), ascending; `pieces` are by
    rank."""
    found: dict[int, list[int]] = {}
    for rank, own in enumerate(pieces):
        for piece in own[asked[own]].tolist():
            found.setdefault(piece, []).append(rank)
    return found


@dataclass(frozen=True)
class Transfer:
    """One span on its way from one rank to another."""

    span: Span
    source: int
    target: int


class NotCovered(ValueError):
    """Some wanted part of the state has no holder."""


def plan_transfers(held: Sequence[Spans], wanted: Sequence[Spans], max_elements: int = MAX_TRANSFER) -> list[Transfer]:
    """Who sends what to whom, so that every rank has what is `wanted` of it; both are by rank.

    Nothing that is in place moves, every missing element moves once, and sources share the work: each piece comes from
    the holder that has sent least so far. Deterministic, so that every rank can compute the plan for itself.

    Raises NotCovered when a wanted element has no holder.
    """
    missing = [subtract(want, have) for have, want in zip(held, wanted, strict=True)]
    pieces = cut_up([*held, *missing])
    asked = np.zeros(len(pieces), np.bool_)
    for own in pieces.of[len(held) :]:
        asked[own] = True
    holders, targets = (_by_piece(own, asked) for own in (pieces.of[: len(held)], pieces.of[len(held) :]))
    sent = [0] * len(held)
    plan = []
    for piece, ranks in sorted(targets.items()):
        tensor, start, stop = _span(*pieces.bounds[:, piece].tolist())
        for target in ranks:
            for first in range(start, stop, max_elements):
                span = Span(tensor, first, min(stop, first + max_elements))
                have = holders.get(piece)
                if not have:
                    raise NotCovered(f"no living holder of elements {span.start}..{span.stop} of part {tensor}")
                source = min(have, key=lambda rank: (sent[rank], rank))
                sent[source] += span.length
                plan.append(Transfer(span, source, target))
    return plan


_ROUNDS = 4


def share_out(held: Sequence[Spans], granule: int = 16) -> list[Spans]:
    """Divides the state among its holders: all that anybody holds comes up exactly once, at a rank that holds it, and
    loads are about as even as that allows; cuts are multiples of `granule` away
    from where holders change. Both are by rank. The answer depends on the arguments only."""
    pieces = cut_up(held)
    holders = sorted(_by_piece(pieces.of, np.ones(len(pieces), np.bool_)).items())
    lengths = pieces.lengths.tolist()
    load = [0] * len(held)
    dealt: dict[int, list[tuple[int, int]]] = {}
    # The first round does not know what is to come; the others mend what it did.
    for _ in range(_ROUNDS):
        for piece, ranks in holders:
            for rank, length in dealt.get(piece, ()):
                load[rank] -= length
            dealt[piece] = list(_fill_up(load, ranks, lengths[piece], granule))
            for rank, length in dealt[piece]:
                load[rank] += length
    shares: list[list[Span]] = [[] for _ in held]
    for piece, parts in dealt.items():
        tensor, start, _ = _span(*pieces.bounds[:, piece].tolist())
        for rank, length in parts:
            shares[rank].append(Span(tensor, start, start + length))
            start += length
    return [union(spans) for spans in shares]


def _fill_up(load: Sequence[int], ranks: Sequence[int], total: int, granule: int) -> Iterable[tuple[int, int]]:
    """How much of `total` each of these ranks takes, so that those with the least load come level; in rank order."""
    order = sorted(ranks, key=lambda rank: (load[rank], rank))
    level, count, left = load[order[0]], 1, total
    while count < len(order) and (load[order[count]] - level) * count <= left:
        left -= (load[order[count]] - level) * count
        level = load[order[count]]
        count += 1
    level += -(-left // count)
    left = total
    for rank in sorted(order[:count]):
        length = min(left, -(-max(0, level - load[rank]) // granule) * granule)
        left -= length
        if length:
            yield rank, length
    assert left == 0
