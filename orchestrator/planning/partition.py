"""Cutting a row of blocks into stages of nearly equal cost."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate


def bottleneck(costs: Sequence[int], parts: int) -> int:
    """The smallest possible cost of the dearest part when `costs` is cut into at most `parts` contiguous parts.

    Parametric search with exact bounds (Pinar and Aykanat 2004, "Fast optimal load balancing algorithms for 1D
    partitioning"): a bound that is too small is raised to the least sum that would have changed the greedy cut, one
    that is enough is lowered to the dearest part that was cut. Costs are integers, so the answer is exact.
    Raises ValueError when there is nothing to cut or no part to cut it into.
    """
    if parts < 1 or not costs or min(costs) < 0:
        raise ValueError(f"cannot cut {len(costs)} blocks with costs >= 0 into {parts} parts")
    sums = [0, *accumulate(costs)]
    low, high = max(max(costs), -(-sums[-1] // parts)), sums[-1]
    while low < high:
        bound = (low + high) // 2
        dearest, overflow = _greedy(sums, parts, bound)
        if overflow is None:
            high = max(low, dearest)
        else:
            low = overflow
    return high


def _greedy(sums: Sequence[int], parts: int, bound: int) -> tuple[int, int | None]:
    """Fills parts up to `bound`: the dearest, and if blocks were left over the least sum that did not fit."""
    start, dearest, overflow = 0, 0, sums[-1]
    last = len(sums) - 1
    for _ in range(parts):
        stop = bisect_right(sums, sums[start] + bound) - 1
        dearest = max(dearest, sums[stop] - sums[start])
        if stop == last:
            return dearest, None
        overflow = min(overflow, sums[stop + 1] - sums[start])
        start = stop
    return dearest, overflow


def cut(costs: Sequence[int], parts: int) -> tuple[tuple[int, int], ...]:
    """Contiguous, non-empty parts `(start, stop)`: the dearest as cheap as can be, the others as even as that allows.

    Parts are filled from the end, because it is there that a model has its one heavy block, the head.
    Raises ValueError when there are fewer blocks than parts.

    >>> cut([1, 1, 1, 1, 4], 3)
    ((0, 2), (2, 4), (4, 5))
    """
    backwards = _cut_from_start(costs[::-1], parts)
    return tuple((len(costs) - stop, len(costs) - start) for start, stop in reversed(backwards))


def _cut_from_start(costs: Sequence[int], parts: int) -> list[tuple[int, int]]:
    if len(costs) < parts:
        raise ValueError(f"{len(costs)} blocks cannot fill {parts} parts")
    bound = bottleneck(costs, parts)
    sums = [0, *accumulate(costs)]
    needed = _parts_needed(sums, bound)
    stages: list[tuple[int, int]] = []
    start = 0
    for left in range(parts - 1, -1, -1):
        # Ends this part may have: within the bound, enough blocks left for the other parts, and not too many.
        furthest = min(bisect_right(sums, sums[start] + bound) - 1, len(costs) - left)
        ends = [stop for stop in range(start + 1, furthest + 1) if needed[stop] <= left]
        even = sums[start] + (sums[-1] - sums[start]) / (left + 1)
        stop = min(ends, key=lambda end: (abs(sums[end] - even), -end))
        stages.append((start, stop))
        start = stop
    return stages


def _parts_needed(sums: Sequence[int], bound: int) -> list[int]:
    """For each start, how few parts within `bound` the rest can be cut into."""
    last = len(sums) - 1
    needed = [0] * len(sums)
    for start in range(last - 1, -1, -1):
        needed[start] = 1 + needed[bisect_right(sums, sums[start] + bound) - 1]
    return needed
