"""What the controller knows: its configuration, its workers, its progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

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
    finalize_timeout_s: float = 600.0
    max_failures_per_step: int = 3
    max_start_failures: int = 5
    epoch: int = 0


@dataclass
class WorkerView:
    """One worker as the controller sees it.

    `committed` counts the steps its state holds; with `torn` that state is part old, part new (a transfer into it was
    cut short) and good for nothing. `initial` names the state that it holds at step 0.
    """

    worker: WorkerId
    requested_at: float
    state: WorkerState = WorkerState.REQUESTED
    node: str = ""
    ready: Ready | None = None
    placed_at: float | None = None
    committed: int = 0
    prepared: bool = False
    has_trained: bool = False
    torn: bool = False
    initial: str = ""
    left: Left | None = None
    joined: bool = False
    last_heard: float = 0.0
    position: tuple[int, int] = (0, 0)
    phase: str = ""
    fault_at: float | None = None
    fault_committed: int | None = None
    draining_until: float | None = None

    @property
    def alive(self) -> bool:
        return self.state is not WorkerState.GONE

    @property
    def draining(self) -> bool:
        return self.draining_until is not None


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
