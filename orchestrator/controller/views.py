"""What the controller knows: its configuration, its workers, its progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from orchestrator.messages import Left, Ready, StepReport, WorkerId

PHASES = ("restore", "form", "data", "compute", "reduce", "gather", "vote", "commit")
_COLLECTIVE = frozenset({"form", "reduce", "gather", "vote"})


def phase_index(phase: str) -> int:
    """How far into a step a phase is; -1 for what is not a phase of a step."""
    return PHASES.index(phase) if phase in PHASES else -1


def is_collective(phase: str) -> bool:
    """Whether a rank in this phase may be waiting for others, through no fault of its own."""
    return phase in _COLLECTIVE


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

    def within_limits(self, workers: int) -> int:
        """The size closest to `workers` that the job allows. A virtual worker is not divided, so there is never work
        for more workers than that."""
        limit = min(self.max_workers, self.virtual_workers)
        return min(max(workers, self.min_workers), limit)


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
    moves: int = 0
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

    @property
    def has_state(self) -> bool:
        """Whether it holds a whole state that training has been through, not only a model as it was built."""
        return self.has_trained and not self.torn


@dataclass
class Progress:
    """What has been committed and how fast; step times in seconds, the newest last."""

    committed: int = 0
    last_commit_at: float | None = None
    step_seconds: list[float] = field(default_factory=list)

    def commit(self, report: StepReport) -> None:
        """One more step is committed."""
        self.committed += 1
        self.last_commit_at = report.committed_at
        self.step_seconds.append(report.seconds)
        del self.step_seconds[:-200]

    def median_step_s(self) -> float:
        """The median of the last hundred step times, 0 before the first."""
        recent = sorted(self.step_seconds[-100:])
        return recent[len(recent) // 2] if recent else 0.0
