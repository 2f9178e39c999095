"""Which rank does what: the parallel degrees and the dealing of virtual workers to ranks."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class ParallelLayout:
    """A complete answer to "who computes what" for one generation.

    `assignment[rank]` are the virtual workers of that rank, ascending. A rank with none still takes part in every
    collective (a worker about to leave that donates its state, for example).
    """

    data: int
    assignment: tuple[tuple[int, ...], ...]
    tensor: int = 1
    pipeline: int = 1
    shard: str = "none"

    def __post_init__(self) -> None:
        ranks = len(self.assignment)
        if self.data * self.tensor * self.pipeline != ranks:
            raise ValueError(
                f"data {self.data} x tensor {self.tensor} x pipeline {self.pipeline} = "
                f"{self.data * self.tensor * self.pipeline} ranks, but {ranks} are dealt work"
            )
        dealt = sorted(index for held in self.assignment for index in held)
        if dealt != list(range(len(dealt))) or not dealt:
            raise ValueError(f"virtual workers must be dealt exactly once each, got {self.assignment}")
        if any(a >= b for held in self.assignment for a, b in pairwise(held)):
            raise ValueError(f"a rank's virtual workers must ascend, got {self.assignment}")

    @property
    def world_size(self) -> int:
        return len(self.assignment)

    @property
    def virtual_workers(self) -> int:
        return sum(len(held) for held in self.assignment)

    def describe(self) -> dict[str, int | str]:
        """The degrees as written to events and result.json."""
        return {"data": self.data, "tensor": self.tensor, "pipeline": self.pipeline, "shard": self.shard}


def deal(virtual_workers: int, speeds: Sequence[float]) -> tuple[tuple[int, ...], ...]:
    """Deals contiguous runs of virtual workers to ranks in proportion to their speeds (0: none).

    Counts are chosen to minimise the slowest rank's time (greedy by the finish time of one more virtual worker, which
    is optimal for identical tasks on uniform machines), and contiguous runs keep each rank's share a few whole
    subtrees of the summation tree. Ties go to the lower rank, so the answer depends on the arguments only.

    >>> deal(8, [1, 1, 1])
    ((0, 1, 2), (3, 4, 5), (6, 7))
    """
    if not any(speed > 0 for speed in speeds):
        raise ValueError(f"no rank can take work: speeds {list(speeds)}")
    counts = [0] * len(speeds)
    finish = [(1 / speed, rank) for rank, speed in enumerate(speeds) if speed > 0]
    heapq.heapify(finish)
    for _ in range(virtual_workers):
        rank = finish[0][1]
        counts[rank] += 1
        heapq.heapreplace(finish, ((counts[rank] + 1) / speeds[rank], rank))
    assignment: list[tuple[int, ...]] = []
    start = 0
    for count in counts:
        assignment.append(tuple(range(start, start + count)))
        start += count
    return tuple(assignment)


def even(total: int, parts: int, multiple: int = 1) -> tuple[int, ...]:
    """Cuts `total` into `parts` sizes that differ by at most `multiple`; all but the last are multiples of it."""
    if parts < 1:
        raise ValueError(f"cannot cut into {parts} parts")
    units = -(-total // multiple)
    bounds = [min(total, (units * part // parts) * multiple) for part in range(parts + 1)]
    return tuple(stop - start for start, stop in pairwise(bounds))
