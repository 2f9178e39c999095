"""Which virtual workers each data-parallel replica computes. Plain integers: no torch."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise


def deal(virtual_workers: int, speeds: Sequence[float], least: int = 0) -> tuple[tuple[int, ...], ...]:
    """Deals contiguous runs of virtual workers to replicas in proportion to their speeds (0: none), at least `least` to
    each that has a speed.

    Counts are chosen to minimise the slowest replica's time (greedy by the finish time of one more virtual worker,
    which is optimal for identical tasks on uniform machines), and contiguous runs keep each replica's share a few whole
    subtrees of the summation tree. Ties go to the lower index, so the answer depends on the arguments only.

    >>> deal(8, [1, 1, 1])
    ((0, 1, 2), (3, 4, 5), (6, 7))
    """
    if not any(speed > 0 for speed in speeds):
        raise ValueError(f"no rank can take work: speeds {list(speeds)}")
    counts = [least if speed > 0 else 0 for speed in speeds]
    if sum(counts) > virtual_workers:
        raise ValueError(f"{virtual_workers} virtual workers are too few for {least} each at speeds {list(speeds)}")
    finish = [((least + 1) / speed, rank) for rank, speed in enumerate(speeds) if speed > 0]
    heapq.heapify(finish)
    for _ in range(virtual_workers - sum(counts)):
        rank = finish[0][1]
        counts[rank] += 1
        heapq.heapreplace(finish, ((counts[rank] + 1) / speeds[rank], rank))
    assignment: list[tuple[int, ...]] = []
    start = 0
    for count in counts:
        assignment.append(tuple(range(start, start + count)))
        start += count
    return tuple(assignment)


def deal_in_turn(
    virtual_workers: int, replicas: int, counts: Sequence[int] | None = None
) -> tuple[tuple[int, ...], ...]:
    """Deals virtual workers to replicas like cards: replica k gets k, k + replicas, k + 2 replicas, ...; with `counts`
    a replica that has its number gets no more.

    Replicas then finish neighbours in the summation tree at the same time, so that the rank that adds them up
    waits with few partial sums.

    >>> deal_in_turn(8, 3)
    ((0, 3, 6), (1, 4, 7), (2, 5))
    >>> deal_in_turn(8, 3, [4, 3, 1])
    ((0, 3, 5, 7), (1, 4, 6), (2,))
    """
    if replicas < 1:
        raise ValueError(f"cannot deal to {replicas} replicas")
    if counts is None:
        return tuple(tuple(range(replica, virtual_workers, replicas)) for replica in range(replicas))
    if len(counts) != replicas or sum(counts) != virtual_workers:
        raise ValueError(f"{list(counts)} does not deal {virtual_workers} virtual workers to {replicas} replicas")
    dealt: list[list[int]] = [[] for _ in counts]
    index = 0
    for number in range(max(counts)):
        for replica, count in enumerate(counts):
            if count > number:
                dealt[replica].append(index)
                index += 1
    return tuple(tuple(held) for held in dealt)


def deal_subtrees(counts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Deals this many virtual workers to each replica, as few and large whole subtrees of the summation tree as can be.

    A replica sends the partial sum of every subtree it holds, so a run of 5 that lies across subtrees costs up to three
    times the traffic of 4. Aligned blocks of a power of two are whole subtrees; counts are taken apart into those, and
    the largest are placed first (Knowlton 1965, "A fast storage allocator": buddies).

    >>> deal_subtrees([5, 2, 1])
    ((0, 1, 2, 3, 6), (4, 5), (7,))
    """
    total = sum(counts)
    free = []
    start = 0
    for bit in range(total.bit_length() - 1, -1, -1):
        if total >> bit & 1:
            free.append((1 << bit, start))
            start += 1 << bit
    wanted = [
        (-(1 << bit), replica)
        for replica, count in enumerate(counts)
        for bit in range(count.bit_length())
        if count >> bit & 1
    ]
    heapq.heapify(wanted)
    held: list[list[int]] = [[] for _ in counts]
    while wanted:
        size, replica = heapq.heappop(wanted)
        size = -size
        # The smallest block that is large enough, lowest first; none: two halves will do.
        fitting = min(((block, at) for block, at in free if block >= size), default=None)
        if fitting is None:
            for _ in range(2):
                heapq.heappush(wanted, (-(size // 2), replica))
            continue
        free.remove(fitting)
        block, at = fitting
        while block > size:
            block //= 2
            free.append((block, at + block))
        held[replica] += range(at, at + size)
    return tuple(tuple(sorted(each)) for each in held)


def even(total: int, parts: int, multiple: int = 1) -> tuple[int, ...]:
    """Cuts `total` into `parts` sizes that differ by at most `multiple`; all but the last are multiples of it."""
    if parts < 1:
        raise ValueError(f"cannot cut into {parts} parts")
    units = -(-total // multiple)
    bounds = [min(total, (units * part // parts) * multiple) for part in range(parts + 1)]
    return tuple(stop - start for start, stop in pairwise(bounds))
