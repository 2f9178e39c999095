"""Which rank does what: parallel degrees, stages of the pipeline, and the dealing of virtual workers to replicas.

Ranks are numbered tensor first, then pipeline, then data: the ranks of a tensor-parallel group are neighbours, and so
are the stages of a pipeline. Knows no torch, so that the driver can reason about layouts too.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

SHARDS = ("none", "optimizer", "gradients", "parameters")
"""What is sharded among data-parallel ranks: ZeRO stages 0 to 3 (Rajbhandari et al. 2020)."""
SCHEDULES = ("1f1b", "gpipe", "interleaved-1f1b", "zero-bubble")
"""In which order a pipeline computes its micro-batches; see docs/layouts.md for their sources."""


class Place(NamedTuple):
    """A rank's coordinates: its data-parallel replica, its pipeline stage, its place in the tensor-parallel group."""

    data: int
    stage: int
    tensor: int


def parts_of(schedule: str, stages: int, num_parts: int, stage: int) -> tuple[int, ...]:
    """The model parts on the ranks of a stage: in turn, or for zero bubble (ZB-V) down and up again."""
    if schedule == "zero-bubble" and stages > 1:
        return (stage, num_parts - 1 - stage)
    return tuple(range(stage, num_parts, stages))


@dataclass(frozen=True)
class ParallelLayout:
    """A complete answer to "who computes what" for one generation.

    `assignment[k]` are the virtual workers of data-parallel replica k, ascending. `parts` cuts the model for a
    pipeline: part i has the blocks `start <= block < stop`; block 0 is the embedding, then come the layers, and the
    last is the norm and the head. Empty when there is one stage. `spares` are ranks after all others that have no part
    in the work: they only hand over state (a worker about to leave, for example).
    """

    data: int
    assignment: tuple[tuple[int, ...], ...]
    tensor: int = 1
    pipeline: int = 1
    shard: str = "none"
    schedule: str = "1f1b"
    parts: tuple[tuple[int, int], ...] = ()
    spares: int = 0

    def __post_init__(self) -> None:
        degrees = {"data": self.data, "tensor": self.tensor, "pipeline": self.pipeline}
        if min(degrees.values()) < 1 or self.spares < 0:
            raise ValueError(f"degrees must be at least 1 and spares at least 0, got {degrees}, spares {self.spares}")
        if self.shard not in SHARDS or self.schedule not in SCHEDULES:
            raise ValueError(
                f"unknown shard {self.shard!r} or schedule {self.schedule!r}; known are shards {', '.join(SHARDS)} and "
                f"schedules {', '.join(SCHEDULES)}"
            )
        if len(self.assignment) != self.data:
            raise ValueError(f"data {self.data} replicas, but {len(self.assignment)} are dealt work")
        dealt = sorted(index for held in self.assignment for index in held)
        if dealt != list(range(len(dealt))) or not dealt:
            raise ValueError(f"virtual workers must be dealt exactly once each, got {self.assignment}")
        if any(a >= b for held in self.assignment for a, b in pairwise(held)):
            raise ValueError(f"a replica's virtual workers must ascend, got {self.assignment}")
        if self.pipeline > 1:
            self._check_parts()

    def _check_parts(self) -> None:
        if not self.parts or len(self.parts) % self.pipeline:
            raise ValueError(f"pipeline {self.pipeline} needs a multiple of that many model parts, got {self.parts}")
        if self.parts[0][0] != 0 or any(a[1] != b[0] for a, b in pairwise(self.parts)):
            raise ValueError(f"model parts must follow one another from block 0, got {self.parts}")
        if any(stop <= start for start, stop in self.parts):
            raise ValueError(f"every model part needs a block, got {self.parts}")

    @classmethod
    def fit(
        cls,
        ranks: int,
        virtual_workers: int,
        *,
        tensor: int = 1,
        pipeline: int = 1,
        shard: str = "none",
        schedule: str = "1f1b",
        parts: tuple[tuple[int, int], ...] = (),
    ) -> ParallelLayout:
        """The layout of all `ranks`: the data-parallel degree is what tensor and pipeline leave over.

        Raises ValueError, with every operand, when they do not divide the ranks, or leave replicas without work.
        """
        group = tensor * pipeline
        if group < 1 or ranks < 1 or ranks % group:
            near = sorted({max(1, ranks // max(group, 1)) * group, (ranks // max(group, 1) + 1) * group})
            raise ValueError(
                f"data x tensor {tensor} x pipeline {pipeline} must be {ranks} ranks, but {ranks} is no multiple of "
                f"{tensor} x {pipeline} = {group}; {' or '.join(map(str, near))} ranks would fit"
            )
        data = ranks // group
        if data > virtual_workers:
            raise ValueError(
                f"data {ranks} / ({tensor} x {pipeline}) = {data} is more than the {virtual_workers} virtual workers, "
                f"which are not divided; at most {virtual_workers * group} ranks would have work"
            )
        dealt = deal(virtual_workers, [1.0] * data)
        return cls(data, dealt, tensor, pipeline, shard, schedule, parts)

    @property
    def num_placed(self) -> int:
        """The ranks that compute."""
        return self.data * self.tensor * self.pipeline

    @property
    def world_size(self) -> int:
        return self.num_placed + self.spares

    @property
    def virtual_workers(self) -> int:
        return sum(len(held) for held in self.assignment)

    def place(self, rank: int) -> Place | None:
        """Where a rank is; None for a spare."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not one of {self.world_size}")
        if rank >= self.num_placed:
            return None
        replica, inside = divmod(rank, self.pipeline * self.tensor)
        return Place(replica, *divmod(inside, self.tensor))

    def rank_of(self, data: int, stage: int = 0, tensor: int = 0) -> int:
        return (data * self.pipeline + stage) * self.tensor + tensor

    def plane(self, rank: int) -> tuple[int, ...]:
        """The ranks with the same part of the model as `rank`, one of each replica, in order of replicas."""
        place = self.place(rank)
        assert place is not None
        return tuple(self.rank_of(replica, place.stage, place.tensor) for replica in range(self.data))

    def blocks_of(self, stage: int) -> tuple[tuple[int, int], ...] | None:
        """The runs of blocks of each model part of a stage; None when there is one stage, which has them all."""
        if self.pipeline == 1:
            return None
        return tuple(self.parts[part] for part in parts_of(self.schedule, self.pipeline, len(self.parts), stage))

    def describe(self) -> dict[str, int | str]:
        """The degrees as written to events and result.json."""
        return {"data": self.data, "tensor": self.tensor, "pipeline": self.pipeline, "shard": self.shard}


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

    Replicas then finish neighbours in the summation tree at the same time, so that whoever adds them up waits with few
    partial sums.

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
    """Deals so many virtual workers to each replica, as few and large whole subtrees of the summation tree as can be.

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
