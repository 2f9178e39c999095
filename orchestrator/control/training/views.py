"""What the controller knows: its configuration, its workers, its progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from orchestrator.control.core.config import PoolConfig, ScalingRules
from orchestrator.control.core.workers import ProcessView
from orchestrator.evaluation.judge import EvaluationRules
from orchestrator.job.parts import virtual_states_of
from orchestrator.models.costs import ModelCosts
from orchestrator.training.messages import GpuReading, GpuTrouble, Left, Ready, StepReport
from strategies.layout.parallel import ParallelLayout
from strategies.layout.statemap import NOTHING, Spans

if TYPE_CHECKING:
    from orchestrator.job import Job

PHASES = (
    "restore",
    "form",
    "collect",
    "evaluate",
    "tally",
    "refresh",
    "data",
    "compute",
    "reduce",
    "gather",
    "update",
    "vote",
    "commit",
)
_COLLECTIVE = frozenset({"form", "collect", "tally", "refresh", "reduce", "gather", "vote"})


def phase_index(phase: str) -> int:
    """How far into a step a phase is; -1 for what is not a phase of a step."""
    return PHASES.index(phase) if phase in PHASES else -1


def is_collective(phase: str, layout: ParallelLayout) -> bool:
    """Whether a rank in this phase may be waiting for others, through no fault of its own."""
    return phase in _COLLECTIVE or (phase in ("compute", "evaluate") and layout.computes_together)


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

    has_own_state: bool = False
    """Whether virtual workers have state of their own."""

    @classmethod
    def for_job(cls, job: Job) -> RebalanceRules:
        return cls(
            **job.elastic.rebalance.model_dump(),
            has_kinds=len(job.resources.kinds) > 1,
            has_short_rounds=job.model.hf is not None,
            has_own_state=bool(virtual_states_of(job)),
        )


ON_CPUS_S, ON_GPUS_S = 3.0, 15.0
"""How long a member has to leave a collective that it was told to break out of: on a GPU kernels have to end."""


@dataclass(frozen=True, kw_only=True)
class ControllerConfig(PoolConfig):
    """The part of the job that the controller's decisions depend on; times in seconds."""

    total_steps: int
    chooser: Chooser
    save_every_s: float | None = None
    progress_timeout_s: float = 60.0
    interrupt_timeout_s: float = 3.0
    mixed_numerics: bool = False
    finalize_timeout_s: float = 600.0
    final_patience_s: float = 300.0
    max_failures_per_step: int = 3
    rebalance: RebalanceRules = field(default_factory=RebalanceRules)
    evaluation: EvaluationRules | None = None

    @classmethod
    def for_job(cls, job: Job, chooser: Chooser, *, term: int = 0) -> ControllerConfig:
        """Of a job whose layouts `chooser` knows, for the controller of this `term`."""
        elastic = job.elastic
        return cls(
            total_steps=job.train.steps,
            chooser=chooser,
            min_workers=elastic.workers.min,
            max_workers=elastic.workers.max,
            standby=elastic.standby,
            save_every_s=job.checkpoint.every_seconds,
            heartbeat_timeout_s=elastic.heartbeat_timeout_s,
            progress_timeout_s=elastic.progress_timeout_s,
            interrupt_timeout_s=elastic.interrupt_timeout_s or (ON_GPUS_S if job.resources.gpu else ON_CPUS_S),
            mixed_numerics=elastic.mixed_numerics,
            start_timeout_s=elastic.start_timeout_s,
            wait_timeout_s=elastic.wait_timeout_s,
            max_failures_per_step=elastic.max_failures_per_step,
            final_patience_s=job.checkpoint.final_patience_s,
            term=term,
            rebalance=RebalanceRules.for_job(job),
            scaling=ScalingRules.for_job(job),
            evaluation=EvaluationRules.of(job),
        )

    @property
    def tensor(self) -> int:
        """The tensor-parallel degree: such a group is a unit of workers, which shares a node."""
        return self.chooser.tensor

    @property
    def unit(self) -> int:
        return self.tensor

    @property
    def most_useful(self) -> int:
        return self.chooser.most_workers


@dataclass
class WorkerView(ProcessView):
    """One worker as training's controller sees it.

    `held` is what it is known to hold of the state after `committed` steps; `whole` is all there is of a state. Nothing
    is known of members of a generation that shards its state until they are out of it. `initial` names the state that
    it holds at step 0.

    More than 15 attributes: each is one thing that a worker told.
    """

    ready: Ready | None = None
    committed: int = 0
    prepared: int = 0
    has_trained: bool = False
    held: Spans = NOTHING
    whole: Spans = NOTHING
    initial: str = ""
    left: Left | None = None
    joined: bool = False
    position: tuple[int, int] = (0, 0)
    moves: int = 0
    moved_at: float = 0.0
    phase: str = ""
    fault_committed: int | None = None
    gpu: GpuReading | None = None
    gpu_trouble: GpuTrouble | None = None

    @property
    def has_state(self) -> bool:
        """Whether it holds any of a state that training has been through, not only a model as it was built."""
        return self.has_trained and bool(self.held)

    @property
    def has_virtual(self) -> bool:
        """Whether there is state of virtual things, of which each worker has its own."""
        return self.ready is not None and self.ready.virtual > 0

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
