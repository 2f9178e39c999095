"""A worker: its name, and what is known of its process."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple


class WorkerId(NamedTuple):
    """A worker: the slot users see ("worker 1") and which incarnation of it this process is."""

    slot: int
    incarnation: int

    def __str__(self) -> str:
        return f"{self.slot}.{self.incarnation}"


class WorkerState(Enum):
    """Where one worker is in its life."""

    REQUESTED = "asked for, not placed yet"
    STARTING = "placed, warming up"
    IDLE = "warm, in no generation"
    MEMBER = "in the current generation"
    GONE = "released, dead or fenced off"


@dataclass
class ProcessView:
    """The process of one worker as the controller sees it; what the process works at, others add. Times in seconds on
    the run's line of time, memory in bytes.

    More than 15 attributes: each is one thing that is known of a process, and nothing is derived from another.
    """

    worker: WorkerId
    requested_at: float
    state: WorkerState = WorkerState.REQUESTED
    node: str = ""
    placed_at: float | None = None
    last_heard: float = 0.0
    host_bytes: int = 0
    device_bytes: int = 0
    lateness_s: float = 0.0
    """How late it has been lately, by its own account."""
    fault_at: float | None = None
    """When the injected fault began that it has not outlived yet."""
    draining_until: float | None = None
    evicting: bool = False
    """It is too slow, and goes when another can take its place."""
    faulty: bool = False
    """Its device ought not to be used any more: the same, however fast it is."""
    avoids: bool = False
    must_avoid: bool = False
    """It was asked for on other nodes than some: if there is room, or in any case."""
    market: str = ""
    """Where it was asked for; "": anywhere."""
    joined_at: float | None = None
    """When it joined others that were at work; None when it was there from the beginning."""

    @property
    def alive(self) -> bool:
        return self.state is not WorkerState.GONE

    @property
    def draining(self) -> bool:
        return self.draining_until is not None

    @property
    def leaving(self) -> bool:
        """Whether it is to be replaced."""
        return self.evicting or self.draining_until is not None


@dataclass(frozen=True)
class PastWorkers:
    """What the records of earlier controllers say of workers.

    `incarnations` are the last of each slot ever asked for, so that no name is used twice; `gone` are those that were
    heard to have gone; `draining` had to leave by these times, `evicting` were found too slow on these nodes.
    `suspects` are nodes of which a device failed, `faulty` those that compute on a device that ought not to be used.
    """

    incarnations: dict[int, int]
    gone: set[WorkerId]
    draining: dict[WorkerId, float]
    evicting: dict[WorkerId, str]
    suspects: set[str] = field(default_factory=set)
    faulty: set[WorkerId] = field(default_factory=set)
