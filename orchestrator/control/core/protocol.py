"""Events that any machine takes and actions that any gives: what concerns the processes of workers, and the end."""

from __future__ import annotations

from dataclasses import dataclass

from monitoring.events import RunEvent
from orchestrator.control.core.workers import WorkerId

# ---------------------------------------------------------------------------------------- events


@dataclass(frozen=True)
class Start:
    """The run begins (or begins again after its whole cluster was lost)."""


@dataclass(frozen=True)
class Placed:
    """The cluster found room for a worker; its process is starting on `node`."""

    worker: WorkerId
    node: str


@dataclass(frozen=True)
class Tick:
    """Time has passed. `lateness_s` is how late the controller itself has been lately, by what it measured. While it
    `asks_in_vain` the cluster does not answer requests for workers."""

    lateness_s: float = 0.0
    asks_in_vain: bool = False


@dataclass(frozen=True)
class GiveWay:
    """Another run that waits for room is to have it before this one; "": none is any more."""

    to: str


@dataclass(frozen=True)
class NodesStarting:
    """The autoscaler has got this many nodes that are not there yet. They may be for workers that wait for room."""

    count: int


@dataclass(frozen=True)
class Died:
    """A worker's process is gone; `node_lost` when its whole node is."""

    worker: WorkerId
    detail: str
    node_lost: bool = False


@dataclass(frozen=True)
class DrainNotice:
    """These workers' place will go away at `deadline` (on the run's line of time)."""

    workers: tuple[WorkerId, ...]
    reason: str
    deadline: float


@dataclass(frozen=True)
class Resize:
    """A user asks for this many workers."""

    workers: int


@dataclass(frozen=True)
class Stop:
    """A user asks the run to end at the next step boundary."""

    reason: str


@dataclass(frozen=True)
class Abort:
    """The run cannot go on, whatever workers there are: a model that cannot be built, for example."""

    reason: str


@dataclass(frozen=True)
class FaultFired:
    """An injected fault is about to happen. `at` is its time, from which recoveries are measured; in a
    worker's message by its monotonic clock, as all times are there."""

    worker: WorkerId | None
    index: int
    at: float


ProcessEvent = Start | Placed | Tick | GiveWay | NodesStarting | Died | DrainNotice | Resize | Stop | Abort | FaultFired

# ---------------------------------------------------------------------------------------- actions


@dataclass(frozen=True)
class RequestWorker:
    """Ask the cluster for one more worker: on another node than those to `avoid`, if there is room on any; on no
    account on those when it `must_avoid` them. On a node of that `market`, unless it is ""."""

    worker: WorkerId
    avoid: tuple[str, ...] = ()
    must_avoid: bool = False
    market: str = ""


@dataclass(frozen=True)
class TellShortage:
    """These workers have found no room for `waited_s`: put that on record, with what the cluster says of it."""

    workers: tuple[WorkerId, ...]
    waited_s: float
    market: str = ""


@dataclass(frozen=True)
class ReleaseWorker:
    """A worker is no longer needed: let it end in good order and give its place back."""

    worker: WorkerId
    reason: str


@dataclass(frozen=True)
class KillWorker:
    """End a worker for good, without its cooperation."""

    worker: WorkerId
    reason: str


@dataclass(frozen=True)
class Finish:
    """The run is over."""

    status: str
    reason: str
    digest: str | None


ProcessAction = RequestWorker | TellShortage | ReleaseWorker | KillWorker | RunEvent | Finish
"""A `RunEvent` among them belongs on record."""
