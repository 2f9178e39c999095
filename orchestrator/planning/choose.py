"""Which layout a generation gets: the job's own degrees where they can be had, else what the planner finds best.

Plain numbers in and out, and the same answer for the same question: the controller asks at every change of membership.
Knows no torch, no Ray and no clock.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from orchestrator.errors import PlanError
from orchestrator.job.parts import update_rule_of
from orchestrator.models.costs import ModelCosts
from orchestrator.planning.assume import CPU_CORE, HardwareOptions, hardware_for
from orchestrator.planning.hardware import Hardware
from orchestrator.planning.memory import predict_memory
from orchestrator.planning.search import Limits, Plan, Planner
from orchestrator.planning.stages import stages_of
from orchestrator.planning.units import show_bytes
from orchestrator.planning.work import Degrees, StepSettings, Work, step_settings
from strategies.layout.assignment import deal_in_turn
from strategies.layout.parallel import ParallelLayout
from strategies.layout.replicas import share_out
from strategies.layout.schedule import NO_PIPELINE, PipelineSchedule, chunks_of

if TYPE_CHECKING:
    from orchestrator.job import Job


class NoLayoutFits(PlanError):
    """No layout of this many workers fits in their memory. `fits_from`: the fewest with which one would; None: none."""

    def __init__(self, text: str, fits_from: int | None) -> None:
        # All arguments go to BaseException, so that its own pickling rebuilds the error.
        super().__init__(text, fits_from)
        self.text, self.fits_from = text, fits_from

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class LayoutChooser:
    """What a job says about its layout, and what is needed to compare others with it.

    The tensor degree and the shard never change. The pipeline degree is the job's whenever whole pipelines of it use
    every worker; otherwise it is what the planner predicts to be fastest, with the job's kind of schedule.
    """

    tensor: int
    pipeline: int
    shard: str
    schedule: str
    max_workers: int
    step: StepSettings
    virtual_replicas: int = 0
    """That train by themselves, and are kept together."""
    hardware: Hardware = CPU_CORE
    """What ranks and links are assumed to do; only what it says relative to itself matters."""

    @classmethod
    def for_job(cls, job: Job) -> LayoutChooser:
        strategy = job.strategy
        return cls(
            tensor=strategy.tensor,
            pipeline=strategy.pipeline,
            shard=strategy.shard,
            schedule=strategy.schedule,
            max_workers=job.elastic.workers.max,
            step=step_settings(job),
            virtual_replicas=update_rule_of(job).virtual_replicas,
            hardware=hardware_for(job, HardwareOptions())[0],
        )

    @property
    def most_workers(self) -> int:
        """The most workers that can have something to do: a replica for each virtual worker, up to `workers.max`."""
        return min(self.max_workers, self.step.virtual_workers * self.pipeline * self.tensor)

    def choose(
        self, workers: int, costs: ModelCosts | None, memory_bytes: int, current: ParallelLayout | None
    ) -> ParallelLayout | None:
        """The layout for at most `workers` ranks; None when they are fewer than a tensor-parallel group needs.

        `costs` describes the model; without it there is nothing to cut a pipeline by, and one stage has everything.
        `memory_bytes` is what a worker has, 0 when that is not known. Among layouts that are predicted to be equally
        fast the one that moves least from `current` is taken, and a rank is left idle rather than slow the others down.

        Raises NoLayoutFits when none fits in memory, and PlanError when the model cannot be split as the job asks.
        """
        if workers < self.tensor:
            return None
        if self.pipeline == 1 or costs is None:
            data = min(workers // self.tensor, self.step.virtual_workers)
            return self._layout(Degrees(data, self.tensor, PipelineSchedule(NO_PIPELINE, 1), self.shard), ())
        planner = self._planner(costs, memory_bytes)
        self._check_model(planner)
        plan = self._own(planner, workers) or self._best(planner, workers, current)
        if plan is None:
            raise self._nothing_fits(planner, workers)
        return self._layout(plan.degrees, plan.layers)

    def fits(self, layout: ParallelLayout, costs: ModelCosts, memory_bytes: int) -> bool:
        """Whether a pipeline that is cut otherwise than the planner would fits in memory; True where none is known."""
        planner = self._planner(costs, memory_bytes)
        usable = planner.hardware.usable_bytes
        if usable is None:
            return True
        degrees = _degrees_of(layout)
        parts = [range(start, stop) for start, stop in layout.parts]
        stages = stages_of(costs, degrees.schedule, layout.tensor, parts)
        return predict_memory(planner.work, stages, degrees).total <= usable

    def _planner(self, costs: ModelCosts, memory_bytes: int) -> Planner:
        per_node = max(self.hardware.ranks_per_node, self.tensor)
        if costs.heads is None:
            # A module of the user's own that says how it is split need not have heads to count.
            costs = replace(costs, heads=self.tensor, key_value_heads=self.tensor)
        hardware = replace(self.hardware, memory_bytes=memory_bytes or None, ranks_per_node=per_node)
        limits = Limits(
            tensor=(self.tensor,),
            shards=(self.shard,),
            schedules=(self.schedule,),
            chunks=(1, chunks_of(self.schedule)),
        )
        return _planner(Work.of(self.step, costs), hardware, limits)

    def _check_model(self, planner: Planner) -> None:
        refused = planner.refuses_tensor(self.tensor)
        if refused:
            raise PlanError(refused)

    def _own(self, planner: Planner, workers: int) -> Plan | None:
        """The job's own degrees, if they use every worker and fit."""
        data, over = divmod(workers, self.tensor * self.pipeline)
        schedule = PipelineSchedule(self.schedule, self.pipeline, chunks_of(self.schedule))
        if over or not 1 <= data <= self.step.virtual_workers or schedule.parts > planner.work.model.layers:
            return None
        plan = planner.predict(Degrees(data, self.tensor, schedule, self.shard), workers)
        usable = planner.hardware.usable_bytes
        return plan if usable is None or plan.memory.total <= usable else None

    def _best(self, planner: Planner, workers: int, current: ParallelLayout | None) -> Plan | None:
        """The planner's choice; with empty micro-batches in the pipeline only if nothing else fits."""
        before = None if current is None else _degrees_of(current)
        for each in (planner, _with_padding(planner)):
            plans = each.best(workers, keep=1, current=before)
            if plans:
                return plans[0]
        return None

    def _nothing_fits(self, planner: Planner, workers: int) -> NoLayoutFits:
        padded = _with_padding(planner)
        ranks = workers // self.tensor
        found = [
            padded.least_memory(self.tensor, schedule, self.shard, ranks) for schedule in padded.schedules_within(ranks)
        ]
        memory, degrees = min((each for each in found if each), key=lambda each: each[0].total)
        usable = planner.hardware.usable_bytes
        assert usable is not None, "without a limit one stage always fits"
        enough = self._fewest_that_fit(planner, workers)
        hint = (
            f"{enough} workers would be enough"
            if enough
            else f"no number up to workers.max = {self.max_workers} would be enough"
        )
        return NoLayoutFits(
            f"no layout of {workers} workers fits in memory: with tensor {self.tensor}, shard {self.shard} and "
            f"schedule {self.schedule} a worker needs {show_bytes(memory.total)} at the least (data {degrees.data}, "
            f"pipeline {degrees.pipeline}), {show_bytes(usable)} are usable; {hint}",
            enough,
        )

    def _fewest_that_fit(self, planner: Planner, too_few: int) -> int | None:
        # More workers never rule a layout out, so the counts that fit are the last ones.
        counts = range(too_few - too_few % self.tensor, self.max_workers + 1, self.tensor)
        index = bisect_left(counts, True, lo=1, key=lambda count: self._best(planner, count, None) is not None)
        return counts[index] if index < len(counts) else None

    def _layout(self, degrees: Degrees, layers: tuple[int, ...]) -> ParallelLayout:
        # What is sharded while it is computed is added up as it comes: owners fold early when neighbours come together.
        in_turn = self.shard in ("gradients", "parameters")
        dealt = (
            deal_in_turn(self.step.virtual_workers, degrees.data)
            if in_turn
            else share_out(self.step.virtual_workers, degrees.data, self.virtual_replicas)
        )
        parts = blocks_of(layers) if degrees.pipeline > 1 else ()
        return ParallelLayout(
            degrees.data, dealt, self.tensor, degrees.pipeline, self.shard, self.schedule, parts,
            virtual_replicas=self.virtual_replicas,
        )  # fmt: skip


def blocks_of(layers: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The blocks of model parts with these numbers of decoder layers: the embedding is block 0, norm and head the last.

    >>> blocks_of((2, 1))
    ((0, 3), (3, 5))
    """
    stops = [1 + layer for layer in accumulate(layers)]
    return tuple(pairwise([0, *stops[:-1], stops[-1] + 1]))


@lru_cache(maxsize=16)
def _planner(work: Work, hardware: Hardware, limits: Limits) -> Planner:
    # A planner keeps how it has cut the model, which is most of its work.
    return Planner(work, hardware, limits)


def _with_padding(planner: Planner) -> Planner:
    return _planner(planner.work, planner.hardware, replace(planner.limits, padded=True))


def _degrees_of(layout: ParallelLayout) -> Degrees:
    chunks = len(layout.parts) // layout.pipeline if layout.pipeline > 1 else 1
    kind = layout.schedule if layout.pipeline > 1 else NO_PIPELINE
    return Degrees(layout.data, layout.tensor, PipelineSchedule(kind, layout.pipeline, chunks), layout.shard)
