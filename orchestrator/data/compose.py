"""Which samples of a step go together, where they differ in length: virtual workers of even predicted cost.

The samples of a step are given; here they only change places. A pure function of their lengths, so of the job file and
its data.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MAX_SWAPS = 32
_PARTNERS = 3
"""How many of the cheapest groups are tried as partners of the dearest."""


@dataclass(frozen=True)
class Composition:
    """The samples of a step in the order in which they are used.

    ids: int64 [global_batch], virtual worker by virtual worker, micro-batch by micro-batch; widths: the positions
    computed for each sample of a micro-batch, int64 [virtual_workers, micro-batches of each]; costs: predicted, of each
    virtual worker, as `Composer.cost` has it.
    """

    ids: NDArray[np.int64]
    widths: NDArray[np.int64]
    costs: tuple[int, ...]


class Composer:
    """Composes steps of samples that have `lengths` [samples] tokens, by their ids.

    token_cost: what a token costs by itself, in units of what it costs for every token that it can attend to; in a
    decoder layer of width h the matrix products need about 12 h times as much work for a token as attention needs for
    each pair of tokens.
    """

    def __init__(self, lengths: NDArray[np.integer], micro_batch: int, virtual_workers: int, token_cost: int) -> None:
        self.lengths = lengths
        self.micro_batch = micro_batch
        self.virtual_workers = virtual_workers
        self.token_cost = token_cost

    def cost(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The predicted cost of rows with this many positions (any shape): linear and quadratic, in whole numbers."""
        return positions * (self.token_cost + positions)

    def compose(self, ids: NDArray[np.int64]) -> Composition:
        """The samples `ids` [global_batch] of a step, in the order of the shuffled line, composed.

        Samples of similar length make a micro-batch, as it is padded to its longest. Every virtual worker gets the same
        number of micro-batches, the longest first. Runs of neighbouring virtual workers are even too, as that is what a
        rank computes: where a few long samples make one virtual worker cost more, its rank need not cost more.
        """
        positions = self.lengths[ids].astype(np.int64) - 1
        groups = np.argsort(-positions, kind="stable").reshape(-1, self.micro_batch)
        widths = positions[groups[:, 0]]
        costs: list[int] = (self.cost(widths) * self.micro_batch).tolist()
        order = _halve(list(range(len(costs))), costs, self.virtual_workers)
        arranged = np.array(order, dtype=np.int64).reshape(self.virtual_workers, -1)
        loads = [sum(costs[group] for group in held) for held in arranged.tolist()]
        return Composition(ids[groups[arranged].reshape(-1)], widths[arranged], tuple(loads))


def _halve(items: list[int], costs: Sequence[int], shares: int) -> list[int]:
    """`items` in an order in which each of `shares` equal runs costs about the same, and so do the halves of the whole,
    the halves of each half, and so on: a holder of neighbouring shares has an even part of the whole."""
    if shares == 1:
        return items
    first = (shares + 1) // 2
    size = len(items) // shares
    parts = deal([costs[item] for item in items], [first * size, (shares - first) * size])
    left, right = ([items[index] for index in sorted(part)] for part in parts)
    return _halve(left, costs, first) + _halve(right, costs, shares - first)


def deal(costs: Sequence[int], capacities: Sequence[int]) -> list[list[int]]:
    """Deals items of these costs into groups of exactly these sizes, whose costs are as even (for their sizes) as a
    greedy deal and a few swaps make them. Returns the items of each group.

    From the dearest item to the cheapest, each goes to the group that has the least so far (Graham, "Bounds on
    Multiprocessing Timing Anomalies", 1969), among those that are not full. Then items of the dearest group are swapped
    for those of a cheap one while that makes the dearer of the two cheaper. Both are in whole numbers, ties go to the
    lower index, so the result is the same everywhere.
    """
    common = math.lcm(*capacities)
    scale = [common // capacity for capacity in capacities]
    heap = [(0, group) for group in range(len(capacities))]
    groups: list[list[int]] = [[] for _ in capacities]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        load, group = heapq.heappop(heap)
        groups[group].append(item)
        if len(groups[group]) < capacities[group]:
            heapq.heappush(heap, (load + costs[item] * scale[group], group))
    loads = [sum(costs[item] for item in items) * scale[group] for group, items in enumerate(groups)]
    for _ in range(_MAX_SWAPS):
        by_load = sorted(range(len(groups)), key=lambda group: (loads[group], group))
        if not any(_swap(groups, loads, costs, scale, by_load[-1], cheap) for cheap in by_load[:-1][:_PARTNERS]):
            break
    return groups


def _swap(
    groups: list[list[int]], loads: list[int], costs: Sequence[int], scale: Sequence[int], dear: int, cheap: int
) -> bool:
    """Swaps the two items that bring a dear and a cheap group closest together; False when none does."""
    gap = loads[dear] - loads[cheap]
    here = sorted(groups[cheap], key=lambda item: (costs[item], item))
    keys = [costs[item] for item in here]
    wanted = gap // (scale[dear] + scale[cheap])
    best: tuple[int, int, int] | None = None
    for item in groups[dear]:
        at = bisect_left(keys, costs[item] - wanted)
        for other in here[max(0, at - 1) : at + 1]:
            moved = costs[item] - costs[other]
            left = max(loads[dear] - moved * scale[dear], loads[cheap] + moved * scale[cheap])
            if moved > 0 and left < loads[dear] and (best is None or (left, item, other) < best):
                best = (left, item, other)
    if best is None:
        return False
    _, item, other = best
    moved = costs[item] - costs[other]
    groups[dear][groups[dear].index(item)] = other
    groups[cheap][groups[cheap].index(other)] = item
    loads[dear] -= moved * scale[dear]
    loads[cheap] += moved * scale[cheap]
    return True
