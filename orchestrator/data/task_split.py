"""Dealing the source out to tasks by bytes, not by files: a large file whose documents can be told apart is shared."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from orchestrator.data.opening import WHOLE, ByteSpan

MIN_PART_BYTES = 1 << 20
"""No part is smaller than this unless its file is: a task has a cost of its own."""


@dataclass(frozen=True)
class FilePart:
    """A part of a file for one task. file: its index; weight: about its size in bytes."""

    file: int
    span: ByteSpan
    weight: int


def cut(
    sizes: Sequence[int], grains: Sequence[Callable[[], Sequence[int]] | None], max_groups: int
) -> list[list[FilePart]]:
    """Files of some `sizes` [n] in bytes, in order, as at most max_groups runs of pieces of similar weight, none empty.

    grains [n]: None for a file that must stay whole; else a function that gives the weights of its row groups, between
    which it is cut, or nothing for a file that can be cut at any byte. Asked only for files that are to be cut.
    """
    weights = [max(size, 1) for size in sizes]  # a size that is not known counts for nothing
    total = sum(weights)
    bounds = [total * number // max_groups for number in range(1, max_groups)]
    pieces: list[FilePart] = []
    before = 0
    for index, (weight, grain) in enumerate(zip(weights, grains, strict=True)):
        inner = [] if grain is None else _inner(bounds, before, weight)
        groups = grain() if grain is not None and inner else ()
        if inner and groups:
            pieces += _between_groups(index, groups, inner, weight)
        elif inner:
            edges = [0, *inner, weight]
            for start, stop in pairwise(edges):
                pieces.append(FilePart(index, ByteSpan(start, None if stop == weight else stop), stop - start))
        else:
            pieces.append(FilePart(index, WHOLE, weight))
        before += weight
    return [[pieces[i] for i in members] for members in group([piece.weight for piece in pieces], max_groups)]


def _inner(bounds: Sequence[int], before: int, weight: int) -> list[int]:
    """The bounds of groups inside a file that lies at `before`, from its beginning; not too near to its ends."""
    inner = [bound - before for bound in bounds if MIN_PART_BYTES <= bound - before <= weight - MIN_PART_BYTES]
    kept: list[int] = []
    for bound in inner:
        if not kept or bound - kept[-1] >= MIN_PART_BYTES:
            kept.append(bound)
    return kept


def _between_groups(index: int, groups: Sequence[int], inner: Sequence[int], weight: int) -> list[FilePart]:
    """A file cut between the row groups that are nearest to where it should be; groups: their weights, in any unit."""
    ends = [0, *accumulate(max(one, 1) for one in groups)]
    edges = [0]
    for bound in inner:
        aim = bound / weight * ends[-1]
        after = min(bisect_left(ends, aim), len(groups))
        nearest = after if after == 0 or ends[after] - aim <= aim - ends[after - 1] else after - 1
        if edges[-1] < nearest < len(groups):
            edges.append(nearest)
    edges.append(len(groups))
    whole = len(edges) == 2
    return [
        FilePart(
            index,
            WHOLE if whole else ByteSpan(start, None if stop == len(groups) else stop),
            weight * (ends[stop] - ends[start]) // ends[-1],
        )
        for start, stop in pairwise(edges)
    ]


def group(sizes: Sequence[int], max_groups: int) -> list[list[int]]:
    """Indices of `sizes` [n] in runs of similar total, in order: at most max_groups of them, none empty."""
    weights = [max(size, 1) for size in sizes]  # a size that is not known counts for nothing
    total = sum(weights)
    groups: list[list[int]] = [[] for _ in range(max_groups)]
    before = 0
    for i, weight in enumerate(weights):
        middle = before + weight // 2
        groups[min(middle * max_groups // total, max_groups - 1)].append(i)
        before += weight
    return [members for members in groups if members]
