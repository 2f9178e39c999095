"""What decisions about processes depend on; times in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.control.core.workers import WorkerId

if TYPE_CHECKING:
    from orchestrator.job import Job


@dataclass(frozen=True)
class ScalingRules:
    """How nodes that come and go are taken and asked for; see `elastic.scaling` and `resources.market` of the job."""

    settle_s: float = 0.0
    flap_window_s: float = 120.0
    shortage_after_s: float = 60.0
    fallback_after_s: float = 600.0
    fallback_hold_s: float = 600.0
    markets: tuple[str, ...] = ()

    @classmethod
    def for_job(cls, job: Job) -> ScalingRules:
        return cls(**job.elastic.scaling.model_dump(exclude={"turn_s"}), markets=tuple(job.resources.market))


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """How many workers there are to be, and how long each may take for what."""

    min_workers: int
    max_workers: int
    standby: int = 0
    heartbeat_timeout_s: float = 3.0
    start_timeout_s: float = 300.0
    wait_timeout_s: float | None = None
    placement_grace_s: float = 3.0
    max_start_failures: int = 5
    term: int = 0
    scaling: ScalingRules = field(default_factory=ScalingRules)

    @property
    def unit(self) -> int:
        """Slots in a unit: workers of use only together, on one node. Unit u has the slots from u * unit on."""
        return 1

    @property
    def most_useful(self) -> int:
        """The most workers that could ever have work."""
        return self.max_workers

    @property
    def least(self) -> int:
        """The fewest workers to work with, in whole units."""
        return min(-(-self.min_workers // self.unit) * self.unit, self._most)

    def within_limits(self, workers: int) -> int:
        """The size closest to `workers` that is allowed, in whole units. There may never be work for this many."""
        return min(max(workers // self.unit * self.unit, self.least), self._most)

    @property
    def _most(self) -> int:
        return max(1, min(self.max_workers, self.most_useful) // self.unit) * self.unit

    def unit_of(self, worker: WorkerId) -> int:
        return worker.slot // self.unit
