"""Where state lives, and the plan that brings it to where it is wanted. Plain integers: no torch.

The trained state (weights and optimizer tensors) is one flat vector for each tensor-parallel coordinate; see
`strategies.space`. A *span* is a range of one of them, and stands for all its tensors. What a rank has, and what a
layout wants it to have, are sets of spans; a plan is the transfers that turn the one into the other.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MAX_TRANSFER = 4 << 20
"""Elements of one transfer at most: what is on its way is bounded, and several sources can share the work."""


class Span(NamedTuple):
    """Elements `start <= element < stop` of the state of a tensor-parallel coordinate."""

    tensor: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


Spans = tuple[Span, ...]
"""A set of elements: ascending, disjoint, and no two that touch."""


def union(*groups: Iterable[Span]) -> Spans:
    """All elements of any of them, as few spans as can be."""
    merged: list[Span] = []
    for span in sorted(Span(*span) for group in groups for span in group):
        if span.length <= 0:
            continue
        if merged and merged[-1].tensor == span.tensor and span.start <= merged[-1].stop:
            merged[-1] = Span(span.tensor, merged[-1].start, max(merged[-1].stop, span.stop))
        else:
            merged.append(span)
    return tuple(merged)


def intersect(first: Spans, second: Spans) -> Spans:
    """The elements that are in both."""
    found, a, b = [], 0, 0
    while a < len(first) and b < len(second):
        x, y = first[a], second[b]
        if x.tensor == y.tensor and max(x.start, y.start) < min(x.stop, y.stop):
            found.append(Span(x.tensor, max(x.start, y.start), min(x.stop, y.stop)))
        if (x.tensor, x.stop) <= (y.tensor, y.stop):
            a += 1
        else:
            b += 1
    return tuple(found)


def subtract(first: Spans, second: Spans) -> Spans:
    """The elements of the first that are not in the second."""
    left: list[Span] = []
    b = 0
    for span in first:
        start = span.start
        while b < len(second) and (second[b].tensor, second[b].stop) <= (span.tensor, start):
            b += 1
        index = b
        while index < len(second) and second[index].tensor == span.tensor and second[index].start < span.stop:
            if second[index].start > start:
                left.append(Span(span.tensor, start, second[index].start))
            start = max(start, second[index].stop)
            index += 1
        if start < span.stop:
            left.append(Span(span.tensor, start, span.stop))
    return tuple(left)


def whole(size: int, tensor: int) -> Spans:
    """The whole state: `size` elements for each of `tensor` coordinates."""
    return tuple(Span(coordinate, 0, size) for coordinate in range(tensor))


def num_elements(spans: Spans) -> int:
    return sum(span.length for span in spans)


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
    cuts: dict[int, set[int]] = {}
    for spans in (*held, *missing):
        for span in spans:
            cuts.setdefault(span.tensor, set()).update((span.start, span.stop))
    bounds = {tensor: sorted(points) for tensor, points in cuts.items()}
    holders: dict[tuple[int, int], list[int]] = {}
    targets: dict[tuple[int, int], list[int]] = {}
    for sets, by_piece in ((held, holders), (missing, targets)):
        for rank, spans in enumerate(sets):
            for piece in _pieces(spans, bounds):
                by_piece.setdefault(piece, []).append(rank)
    sent = [0] * len(held)
    plan = []
    for (tensor, start), ranks in sorted(targets.items()):
        stop = bounds[tensor][bisect_right(bounds[tensor], start)]
        for target in ranks:
            for first in range(start, stop, max_elements):
                span = Span(tensor, first, min(stop, first + max_elements))
                have = holders.get((tensor, start))
                if not have:
                    raise NotCovered(f"no living holder of elements {span.start}..{span.stop} of part {tensor}")
                source = min(have, key=lambda rank: (sent[rank], rank))
                sent[source] += span.length
                plan.append(Transfer(span, source, target))
    return plan


def _pieces(spans: Spans, bounds: dict[int, list[int]]) -> Iterable[tuple[int, int]]:
    for span in spans:
        points = bounds[span.tensor]
        for index in range(bisect_left(points, span.start), bisect_left(points, span.stop)):
            yield span.tensor, points[index]


_ROUNDS = 4


def share_out(held: Sequence[Spans], granule: int = 16) -> list[Spans]:
    """Divides the state among its holders: all that anybody holds comes up exactly once, at a rank that holds it, and
    loads are about as even as that allows; cuts are multiples of `granule` away
    from where holders change. Both are by rank. The answer depends on the arguments only."""
    cuts: dict[int, set[int]] = {}
    for spans in held:
        for span in spans:
            cuts.setdefault(span.tensor, set()).update((span.start, span.stop))
    bounds = {tensor: sorted(points) for tensor, points in cuts.items()}
    holders: dict[tuple[int, int], list[int]] = {}
    for rank, spans in enumerate(held):
        for piece in _pieces(spans, bounds):
            holders.setdefault(piece, []).append(rank)
    load = [0] * len(held)
    dealt: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # The first round does not know what is to come; the others mend what it did.
    for _ in range(_ROUNDS):
        for (tensor, start), ranks in sorted(holders.items()):
            for rank, length in dealt.get((tensor, start), ()):
                load[rank] -= length
            stop = bounds[tensor][bisect_right(bounds[tensor], start)]
            dealt[tensor, start] = list(_fill_up(load, ranks, stop - start, granule))
            for rank, length in dealt[tensor, start]:
                load[rank] += length
    shares: list[list[Span]] = [[] for _ in held]
    for (tensor, start), pieces in dealt.items():
        for rank, length in pieces:
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
