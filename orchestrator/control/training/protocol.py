"""Events that training's state machine takes and actions it gives, beyond those of processes and the workers' own
messages."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.control.core.orders import Order
from orchestrator.control.core.protocol import Placed, ProcessAction, ProcessEvent
from orchestrator.training.messages import (
    CheckpointSaved,
    Finalized,
    GpuTrouble,
    Heartbeat,
    Joined,
    Left,
    PartSaved,
    Ready,
    SaveBegun,
    SaveDelayed,
    Status,
    StepReport,
)

# ---------------------------------------------------------------------------------------- events


@dataclass(frozen=True)
class TakeOver:
    """A restarted controller found these living workers of its run, and those that are `starting`."""

    workers: tuple[Status, ...]
    starting: tuple[Placed, ...] = ()


@dataclass(frozen=True)
class SaveRequested:
    """A user asks for a checkpoint."""


Event = (
    ProcessEvent
    | TakeOver
    | SaveRequested
    | Ready
    | Heartbeat
    | GpuTrouble
    | Joined
    | Left
    | Finalized
    | SaveBegun
    | SaveDelayed
    | PartSaved
    | CheckpointSaved
)

# ---------------------------------------------------------------------------------------- actions


@dataclass(frozen=True)
class StepCommitted:
    """A step counts as committed from here on: put it on record. Given once for each step, in order; after a
    `Rollback` the steps taken off the record are given again."""

    report: StepReport


@dataclass(frozen=True)
class Rollback:
    """Committed steps from `committed` on are lost and will be replayed: take them off the record."""

    committed: int


Action = ProcessAction | Order | StepCommitted | Rollback
