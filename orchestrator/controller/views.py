"""What the controller knows: its configuration, its workers, its open incidents, its results."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from orchestrator.messages import Left, Ready, WorkerId


class RunState(Enum):
    """Where the run is. The value is what users read."""

    WAITING = "waiting for workers"
    SETTLING = "members are leaving the generation"
    FORMING = "a generation is forming"
    RUNNING = "training"
    FINALIZING = "collecting the final state"
    OVER = "over"


class WorkerState(Enum):
    """Where one worker is in its life."""

    REQUESTED = "asked for, not placed yet"
    STARTING = "placed, warming up"
    IDLE = "warm, in no generation"
    MEMBER = "in the current generation"
    GONE = "released, dead or fenced off"


@dataclass(frozen=True)
class ControllerConfig:
    """The part of the job that the controller's decisions depend on; times in seconds."""

    total_steps: int
    virtual_workers: int
    min_workers: int
    max_workers: int
    standby: int = 0
    checkpointing: bool = False
    heartbeat_timeout_s: float = 3.0
    progress_timeout_s: float = 60.0
    start_timeout_s: float = 300.0
    wait_timeout_s: float | None = None
    placement_grace_s: float = 3.0
    interrupt_timeout_s: float = 3.0
    max_failures_per_step: int = 3
    max_start_failures: int = 5
    epoch: int = 0


@dataclass
class WorkerView:
    """One worker as the controller sees it."""

    worker: WorkerId
    requested_at: float
    state: WorkerState = WorkerState.REQUESTED
    node: str = ""
    ready: Ready | None = None
    placed_at: float | None = None
    committed: int = 0
    prepared: bool = False
    has_trained: bool = False
    left: Left | None = None
    joined: bool = False
    last_heard: float = 0.0
    position: tuple[int, int] = (0, 0)
    phase: str = ""
    fault_at: float | None = None
    draining_until: float | None = None

    @property
    def alive(self) -> bool:
        return self.state is not WorkerState.GONE

    @property
    def draining(self) -> bool:
        return self.draining_until is not None


@dataclass
class Incident:
    """Something that made a generation end, from the event to the first step committed after it."""

    kind: str
    cause: str
    worker: WorkerId | None
    at: float
    detected_at: float
    step: int
    generation: int | None = None
    steps_lost: int = 0
    source: str = "peers"
    bytes_moved: int = 0

    def recovery(self, committed_at: float, pause_s: float, median_step_s: float) -> dict[str, Any]:
        """The record for result.json; times in seconds."""
        return {
            "generation": self.generation,
            "cause": self.cause,
            "kind": self.kind,
            "worker": None if self.worker is None else self.worker.slot,
            "step": self.step,
            "detect_seconds": round(max(0.0, self.detected_at - self.at), 4),
            "stall_seconds": round(max(0.0, committed_at - self.at - median_step_s), 4),
            "pause_seconds": round(max(0.0, pause_s - median_step_s), 4),
            "steps_lost": self.steps_lost,
            "source": self.source,
            "bytes_moved": self.bytes_moved,
        }


VOLUNTARY = frozenset({"grow", "shrink", "drain"})
"""Incident kinds that are no failures: everyone leaves at a step boundary, by agreement."""


@dataclass
class Progress:
    """What has been committed and how fast; step times in seconds, the newest last."""

    committed: int = 0
    last_commit_at: float | None = None
    step_seconds: list[float] = field(default_factory=list)

    def median_step_s(self) -> float:
        """The median of the last hundred step times, 0 before the first."""
        recent = sorted(self.step_seconds[-100:])
        return recent[len(recent) // 2] if recent else 0.0
