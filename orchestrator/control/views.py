"""What the controller knows: its configuration, its workers, its progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from orchestrator.models.costs import ModelCosts
from orchestrator.training.messages import Left, Ready, StepReport, WorkerId
from strategies.layout.parallel import ParallelLayout
from strategies.layout.statemap import NOTHING, Spans

if TYPE_CHECKING:
    from orchestrator.job import Job

PHASES = ("restore", "form", "collect", "refresh", "data", "compute", "reduce", "gather", "vote", "commit")
_COLLECTIVE = frozenset({"form", "collect", "refresh", "reduce", "gather", "vote"})


def phase_index(phase: str) -> int:
    """How far into a step a phase is; -1 for what is not a phase of a step."""
    return PHASES.index(phase) if phase in PHASES else -1


def is_collective(phase: str, layout: ParallelLayout) -> bool:
    """Whether a rank in this phase may be waiting for others, through no fault of its own."""
    return phase in _COLLECTIVE or (phase == "compute" and layout.computes_together)


class Chooser(Protocol):
    """Which layout a number of workers is given; see `orchestrator.planning.choose.LayoutChooser`."""

    @property
    def tensor(self) -> int:
        """The tensor-parallel degree, which never changes."""

    @property
    def most_workers(self) -> int:
        """The most that could ever have work."""

    def choose(
        self, workers: int, costs: ModelCosts | None, memory_bytes: int, current: ParallelLayout | None
    ) -> ParallelLayout | None:
        """The layout for at most `workers`; None when they are too few for any."""

    def fits(self, layout: ParallelLayout, costs: ModelCosts, memory_bytes: int) -> bool:
        """Whether a pipeline that is cut otherwise fits in memory."""


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
class RebalanceRules:
    """What is done about workers that are slower than others; see `elastic.rebalance` of the job file."""

    enabled: bool = True
    min_gain: float = 0.05
    evict_below: float = 0.5
    evict_after_s: float = 60.0
    has_kinds: bool = False
    """Whether workers may be on several kinds of devices, of which one is slower than another by right."""
    has_short_rounds: bool = True
    """Whether work that is only made up, with `shard: parameters`, takes next to no time."""

    @classmethod
    def for_job(cls, job: Job) -> RebalanceRules:
        return cls(
            **job.elastic.rebalance.model_dump(),
            has_kinds=len(job.resources.kinds) > 1,
            has_short_rounds=job.model.hf is not None,
        )


@dataclass(frozen=True)
class ScalingRules:
    """How a run takes and asks for nodes that come and go; see `elastic.scaling` and `resources.market` of the job."""

    settle_s: float = 0.0
    flap_window_s: float = 120.0
    shortage_after_s: float = 60.0
    fallback_after_s: float = 600.0
    fallback_hold_s: float = 600.0
    markets: tuple[str, ...] = ()

    @classmethod
    def for_job(cls, job: Job) -> ScalingRules:
        return cls(**job.elastic.scaling.model_dump(exclude={"turn_s"}), markets=tuple(job.resources.market))


@dataclass(frozen=True)
class ControllerConfig:
    """The part of the job that the controller's decisions depend on; times in seconds."""

    total_steps: int
    chooser: Chooser
    min_workers: int
    max_workers: int
    standby: int = 0
    checkpointing: bool = False
    save_every_s: float | None = None
    heartbeat_timeout_s: float = 3.0
    progress_timeout_s: float = 60.0
    start_timeout_s: float = 300.0
    wait_timeout_s: float | None = None
    placement_grace_s: float = 3.0
    interrupt_timeout_s: float = 3.0
    finalize_timeout_s: float = 600.0
    final_patience_s: float = 300.0
    max_failures_per_step: int = 3
    max_start_failures: int = 5
    term: int = 0
    rebalance: RebalanceRules = field(default_factory=RebalanceRules)
    scaling: ScalingRules = field(default_factory=ScalingRules)

    @property
    def tensor(self) -> int:
        """Slots in a unit: a tensor-parallel group, which shares a node. Unit u has the slots from u * tensor on."""
        return self.chooser.tensor

    @property
    def least(self) -> int:
        """The fewest workers to train with, in whole units."""
        return min(-(-self.min_workers // self.tensor) * self.tensor, self._most)

    def within_limits(self, workers: int) -> int:
        """The size closest to `workers` that the job allows, in whole units. There may never be work for so many."""
        return min(max(workers // self.tensor * self.tensor, self.least), self._most)

    @property
    def _most(self) -> int:
        return max(1, min(self.max_workers, self.chooser.most_workers) // self.tensor) * self.tensor

    def unit_of(self, worker: WorkerId) -> int:
        return worker.slot // self.tensor


@dataclass
class WorkerView:
    """One worker as the controller sees it.

    `held` is what it is known to hold of the state after `committed` steps; `whole` is all there is of a state. Nothing
    is known of members of a generation that shards its state until they are out of it. `initial` names the state that
    it holds at step 0.
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
    held: Spans = NOTHING
    whole: Spans = NOTHING
    initial: str = ""
    left: Left | None = None
    joined: bool = False
    last_heard: float = 0.0
    position: tuple[int, int] = (0, 0)
    moves: int = 0
    moved_at: float = 0.0
    phase: str = ""
    host_bytes: int = 0
    device_bytes: int = 0
    lateness_s: float = 0.0
    """How late it has been lately, by its own account."""
    fault_at: float | None = None
    fault_committed: int | None = None
    draining_until: float | None = None
    evicting: bool = False
    """It is too slow, and goes when another can take its place."""
    avoids: bool = False
    must_avoid: bool = False
    """It was asked for on other nodes than some: if there is room, or in any case."""
    market: str = ""
    """Where it was asked for; "": anywhere."""
    joined_at: float | None = None
    """When it joined a run that was under way; None when it was there from the beginning."""

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

    @property
    def has_state(self) -> bool:
        """Whether it holds any of a state that training has been through, not only a model as it was built."""
        return self.has_trained and bool(self.held)

    @property
    def holds_part(self) -> bool:
        """Whether it holds a part of such a state, and not all of it."""
        return self.has_state and self.held != self.whole


@dataclass
class Progress:
    """What has been committed and how fast; step times in seconds, the newest last. `norm` is the global gradient norm
    of the last step, None when it is not known."""

    committed: int = 0
    last_commit_at: float | None = None
    step_seconds: list[float] = field(default_factory=list)
    norm: float | None = None

    def commit(self, report: StepReport) -> None:
        """One more step is committed."""
        self.committed += 1
        self.norm = report.grad_norm
        self.last_commit_at = report.committed_at
        self.step_seconds.append(report.seconds)
        del self.step_seconds[:-200]

    def median_step_s(self) -> float:
        """The median of the last hundred step times, 0 before the first."""
        recent = sorted(self.step_seconds[-100:])
        return recent[len(recent) // 2] if recent else 0.0
