"""Which rank does what: parallel degrees, stages of the pipeline, and the dealing of virtual workers to replicas.

Ranks are numbered tensor first, then pipeline, then data: the ranks of a tensor-parallel group are neighbours, and so
are the stages of a pipeline. Knows no torch, so that the driver can reason about layouts too.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from strategies.layout.assignment import deal
from strategies.layout.schedule import SCHEDULES, parts_of

SHARDS = ("none", "optimizer", "gradients", "parameters")
"""What is sharded among data-parallel ranks: ZeRO stages 0 to 3 (Rajbhandari et al. 2020)."""


class Coordinates(NamedTuple):
    """A rank's coordinates: its data-parallel replica, its pipeline stage, its place in the tensor-parallel group."""

    data: int
    stage: int
    tensor: int


@dataclass(frozen=True)
class ParallelLayout:
    """A complete answer to "who computes what" for one generation.

    `assignment[k]` are the virtual workers of data-parallel replica k, ascending. `parts` cuts the model for a
    pipeline: part i has the blocks `start <= block < stop`; block 0 is the embedding, then come the layers, and the
    last is the norm and the head. Empty when there is one stage. `spares` are ranks after all others that have no part
    in the work: they only hand over state (a worker about to leave, for example). `first` is the first virtual worker,
    of a layout of some of them only. With `virtual_replicas`, which train by themselves
    (`strategies.layout.replicas`), a data-parallel replica has whole ones, or a part of one.
    """

    data: int
    assignment: tuple[tuple[int, ...], ...]
    tensor: int = 1
    pipeline: int = 1
    shard: str = "none"
    schedule: str = "1f1b"
    parts: tuple[tuple[int, int], ...] = ()
    spares: int = 0
    first: int = 0
    virtual_replicas: int = 0

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
        if dealt != list(range(self.first, self.first + len(dealt))) or not dealt:
            raise ValueError(f"virtual workers must be dealt exactly once each, got {self.assignment}")
        if any(a >= b for held in self.assignment for a, b in pairwise(held)):
            raise ValueError(f"a replica's virtual workers must ascend, got {self.assignment}")
        if self.virtual_replicas > 1:
            self._check_virtual_replicas()
        if self.pipeline > 1:
            self._check_parts()

    def _check_virtual_replicas(self) -> None:
        size, rest = divmod(self.virtual_workers, self.virtual_replicas)
        if rest or size < 1:
            raise ValueError(f"{self.virtual_workers} virtual workers are no {self.virtual_replicas} equal replicas")
        for held in self.assignment:
            if len({index // size for index in held}) > 1 and len(held) % size:
                raise ValueError(f"data-parallel replicas must have whole virtual replicas, or a part of one: {held}")
        parts = [{index // size for index in held} for held in self.assignment if held]
        if any(a & b and len(a | b) > 1 for number, a in enumerate(parts) for b in parts[:number]):
            raise ValueError(f"who shares a virtual replica must have nothing else: {self.assignment}")

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

    @property
    def root(self) -> tuple[int, int]:
        """The tree along which its virtual workers are added up (`strategies.reduction.tree`)."""
        return self.first, self.first + self.virtual_workers

    @property
    def effective_shard(self) -> str:
        """`shard`, or "none" for one replica, which has nobody to shard with: then all shards are one layout."""
        return self.shard if self.data > 1 else "none"

    @property
    def is_replicated(self) -> bool:
        """Whether every rank that computes holds the whole state."""
        return self.tensor == self.pipeline == 1 and self.effective_shard == "none"

    @property
    def computes_together(self) -> bool:
        """Whether ranks need one another while they compute: for activations, or for each other's weights."""
        return self.tensor > 1 or self.pipeline > 1 or self.effective_shard == "parameters"

    def place(self, rank: int) -> Coordinates | None:
        """Where a rank is; None for a spare."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not one of {self.world_size}")
        if rank >= self.num_placed:
            return None
        replica, inside = divmod(rank, self.pipeline * self.tensor)
        return Coordinates(replica, *divmod(inside, self.tensor))

    def rank_of(self, data: int, stage: int = 0, tensor: int = 0) -> int:
        return (data * self.pipeline + stage) * self.tensor + tensor

    def data_group(self, rank: int) -> tuple[int, ...]:
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
