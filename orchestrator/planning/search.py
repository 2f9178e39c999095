"""The search: every layout that a number of ranks allows, fastest first, and why the others are out."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.planning.hardware import Hardware
from orchestrator.planning.memory import Memory, predict_memory
from orchestrator.planning.moved import moved_bytes
from orchestrator.planning.stages import cut_model
from orchestrator.planning.step_time import StepTime, compute_and_bubble, predict_step
from orchestrator.planning.work import Degrees, Stages, Work, most_held, most_pieces
from strategies.layout.assignment import deal
from strategies.layout.parallel import SHARDS
from strategies.layout.schedule import NO_PIPELINE, SCHEDULES, PipelineSchedule, schedules

Refuse = Callable[[int, PipelineSchedule, str], str | None]
"""(tensor degree, schedule, shard) -> why a job cannot have it, or None (`orchestrator.planning.possible`)."""


def anything(tensor: int, schedule: PipelineSchedule, shard: str) -> str | None:
    """For a job whose layouts have been checked."""
    return None


SAME_TIME = 1.01
"""Given a layout to come from, those within 1 % of the fastest count as equally fast: the model is no better."""


@dataclass(frozen=True)
class Limits:
    """What the planner may choose from. `pipeline` None: any degree.

    `chunks` are how many model parts a rank may have, `padded` whether a replica may go through empty micro-batches
    when it has fewer than its schedule needs.
    """

    tensor: tuple[int, ...] = (1,)
    pipeline: tuple[int, ...] | None = None
    shards: tuple[str, ...] = SHARDS
    schedules: tuple[str, ...] = SCHEDULES
    chunks: tuple[int, ...] = (1, 2)
    padded: bool = False


@dataclass(frozen=True)
class Plan:
    """A layout that can be trained with, and what it is predicted to cost. `moved_bytes` is 0 from no layout."""

    degrees: Degrees
    layers: tuple[int, ...]
    """Decoder layers of each model part; the first has the embedding too, the last the norm and head."""
    time: StepTime
    memory: Memory
    idle: int
    moved_bytes: float = 0.0
    recompute: str = ""
    """What layers compute again, where that was open ("": as the job says)."""

    def assignment(self, virtual_workers: int) -> tuple[tuple[int, ...], ...]:
        """The virtual workers of each data-parallel replica."""
        return deal(virtual_workers, [1.0] * self.degrees.data)


@dataclass(frozen=True)
class Range:
    """Data degrees from `first` to `last` whose slowest replica has equally much to do, and how fast it can be."""

    bound_s: float
    tensor: int
    schedule: PipelineSchedule
    first: int
    last: int


@dataclass
class Planner:
    """Ranks layouts for one job on one kind of machine; keeps what it has cut, so it can be asked again and again."""

    work: Work
    hardware: Hardware
    limits: Limits = field(default_factory=Limits)
    refuse: Refuse = anything
    recompute: str = ""
    _stages: dict[tuple[int, PipelineSchedule], Stages] = field(default_factory=dict)

    def best(self, workers: int, keep: int | None = 5, current: Degrees | None = None) -> list[Plan]:
        """The `keep` best layouts of at most `workers` ranks (None: all), best first; empty when none fits.

        Fastest first, then fewer ranks, then the order of `Limits`. With a `current` layout, those within 1 % of the
        fastest come first, fewest bytes moved ahead.

        Among data degrees that leave the slowest replica the same virtual workers only the smallest that fits in
        memory is looked at: more replicas would wait longer for one another and finish no earlier.
        """
        found: list[Plan] = []
        hopeless: dict[tuple[int, PipelineSchedule, str], bool] = {}
        cutoff = float("inf")
        for candidates in sorted(self.ranges(workers), key=lambda each: (each.bound_s, each.tensor, each.first)):
            if candidates.bound_s > cutoff:
                break
            shards = self._shards(candidates.first)
            for shard in self.shards_of(candidates.tensor, candidates.schedule, shards):
                if self._hopeless(candidates, shard, workers, hopeless) or self._time(candidates, shard).total > cutoff:
                    continue
                plan = self._smallest_that_fits(candidates, shard, workers)
                if plan is None or plan.time.total > cutoff:
                    continue
                insort(found, plan, key=self._order)
                if keep is not None and len(found) >= keep:
                    slack = SAME_TIME if current else 1.0
                    cutoff = max(found[keep - 1].time.total, found[0].time.total * slack)
                    del found[bisect_right(found, cutoff, key=lambda plan: plan.time.total) :]
        if current is not None:
            found = self._fewest_moved_first(found, current)
        return found[:keep]

    def ranges(self, workers: int) -> Iterator[Range]:
        """All candidates but for their shards, with a lower bound of their step time each."""
        for tensor in self.limits.tensor:
            if self.refuses_tensor(tensor):
                continue
            for schedule in self.schedules_within(workers // tensor):
                if not self.shards_of(tensor, schedule, self.limits.shards):
                    continue
                stages = self.stages(tensor, schedule)
                for first, last in self.data_ranges(workers // (tensor * schedule.stages), schedule):
                    degrees = Degrees(first, tensor, schedule, self.limits.shards[0])
                    bound_s = sum(compute_and_bubble(self.work, self.hardware, stages, degrees))
                    yield Range(bound_s, tensor, schedule, first, last)

    def schedules_within(self, ranks: int) -> Iterator[PipelineSchedule]:
        """The schedules that are allowed, have a layer for every model part and fit on `ranks` pipeline ranks."""
        layers = self.work.model.layers
        for pipeline in self.limits.pipeline or range(1, layers + 1):
            if pipeline > min(ranks, layers):
                continue
            for schedule in schedules(pipeline):
                known = schedule.kind in (*self.limits.schedules, NO_PIPELINE)
                if known and schedule.chunks in self.limits.chunks and schedule.parts <= layers:
                    yield schedule

    def data_ranges(self, most: int, schedule: PipelineSchedule) -> Iterator[tuple[int, int]]:
        """Data degrees up to `most` that this schedule can work with, by what the slowest replica has to do."""
        shares, micro = self.work.virtual_workers, self.work.micro_batches
        first = 1
        while first <= min(most, shares):
            held = most_held(shares, first)
            last = shares if held == 1 else (shares - 1) // (held - 1)
            if self.limits.padded:
                yield first, min(last, most)
            elif not schedule.refuses(held * micro):
                # When replicas differ, the smaller ones have one virtual worker less.
                if held == 1 or not schedule.refuses((held - 1) * micro):
                    yield first, min(last, most)
                elif first * held == shares:
                    yield first, first
            first = last + 1

    def shards_of(self, tensor: int, schedule: PipelineSchedule, shards: Sequence[str]) -> list[str]:
        """Those of these shards with which the job can have such a pipeline."""
        return [shard for shard in shards if self.refuse(tensor, schedule, shard) is None]

    def _shards(self, data: int) -> tuple[str, ...]:
        """With one replica there is nothing to shard over, so all shards are the same layout."""
        return self.limits.shards if data > 1 else self.limits.shards[:1]

    def _hopeless(
        self, candidates: Range, shard: str, workers: int, known: dict[tuple[int, PipelineSchedule, str], bool]
    ) -> bool:
        """Whether this pipeline and shard fit in memory with no data degree at all; looked at once for each."""
        key = (candidates.tensor, candidates.schedule, shard)
        usable = self.hardware.usable_bytes
        if usable is not None and key not in known:
            least = self.least_memory(*key, workers // candidates.tensor)
            known[key] = least is None or least[0].total > usable
        return known.get(key, False)

    def least_memory(
        self, tensor: int, schedule: PipelineSchedule, shard: str, ranks: int
    ) -> tuple[Memory, Degrees] | None:  # fmt: skip
        """The least memory this pipeline needs on `ranks` / tensor ranks, and where; None where no rule allows it.

        More replicas share the same state and have fewer partial sums, so it is at the most replicas; or at one, which
        exchanges nothing; or at the most that are even, which exchange one partial sum each.
        """
        ranges = list(self.data_ranges(ranks // schedule.stages, schedule))
        if not ranges:
            return None
        even = [first for first, _ in ranges if most_pieces(self.work.virtual_workers, first) == 1]
        tried = [Degrees(data, tensor, schedule, shard) for data in sorted({ranges[0][0], ranges[-1][1], *even[-1:]})]
        stages = self.stages(tensor, schedule)
        return min(((predict_memory(self.work, stages, each), each) for each in tried), key=lambda each: each[0].total)

    def _smallest_that_fits(self, candidates: Range, shard: str, workers: int) -> Plan | None:
        low, high = candidates.first, candidates.last
        usable = self.hardware.usable_bytes
        if usable is not None and self._memory(candidates, shard, low).total > usable:
            if self._memory(candidates, shard, high).total > usable:
                return None
            # Memory never grows with the data degree: more replicas share the same state.
            while high - low > 1:
                middle = (low + high) // 2
                if self._memory(candidates, shard, middle).total > usable:
                    low = middle
                else:
                    high = middle
            low = high
        degrees = Degrees(low, candidates.tensor, candidates.schedule, shard)
        return self.predict(degrees, workers)

    def _time(self, candidates: Range, shard: str) -> StepTime:
        """With the fewest replicas of the range; more are never faster."""
        degrees = Degrees(candidates.first, candidates.tensor, candidates.schedule, shard)
        return predict_step(self.work, self.hardware, self.stages(candidates.tensor, candidates.schedule), degrees)

    def _memory(self, candidates: Range, shard: str, data: int) -> Memory:
        degrees = Degrees(data, candidates.tensor, candidates.schedule, shard)
        return predict_memory(self.work, self.stages(candidates.tensor, candidates.schedule), degrees)

    def predict(self, degrees: Degrees, workers: int) -> Plan:
        """The costs of one layout on `workers` workers, whether or not it fits in memory."""
        stages = self.stages(degrees.tensor, degrees.schedule)
        return Plan(
            degrees=degrees,
            layers=stages.layers,
            time=predict_step(self.work, self.hardware, stages, degrees),
            memory=predict_memory(self.work, stages, degrees),
            idle=workers - degrees.ranks,
            recompute=self.recompute,
        )

    def stages(self, tensor: int, schedule: PipelineSchedule) -> Stages:
        """The model cut for this schedule; kept."""
        key = (tensor, schedule)
        if key not in self._stages:
            self._stages[key] = cut_model(self.work.model, schedule, tensor)
        return self._stages[key]

    def refuses_tensor(self, tensor: int) -> str | None:
        """Why the model cannot be split over this many tensor-parallel ranks, or None."""
        model, per_node = self.work.model, self.hardware.ranks_per_node
        if tensor == 1:
            return None
        if model.heads is None:
            return f"tensor {tensor} needs a network that names its attention heads (config.num_attention_heads)"
        for count, what in ((model.heads, "attention heads"), (model.key_value_heads, "key-value heads")):
            if count and count % tensor:
                fits = [degree for degree in range(1, count + 1) if model.heads % degree == count % degree == 0]
                return f"tensor {tensor} does not divide the model's {count} {what}; what would: {_listed(fits)}"
        if tensor > per_node:
            return f"tensor {tensor} does not fit on a node of {per_node} ranks; a tensor-parallel group shares a node"
        return None

    def _fewest_moved_first(self, found: list[Plan], current: Degrees) -> list[Plan]:
        if not found:
            return found
        limit = found[0].time.total * SAME_TIME
        equal = [plan for plan in found if plan.time.total <= limit][:64]
        moved = [replace(plan, moved_bytes=moved_bytes(self.work, current, plan.degrees)) for plan in equal]
        return sorted(moved, key=lambda plan: (plan.moved_bytes, self._order(plan))) + found[len(equal) :]

    def _order(self, plan: Plan) -> tuple[float, ...]:
        degrees = plan.degrees
        kinds = (NO_PIPELINE, *SCHEDULES)
        return (
            plan.time.total,
            degrees.ranks,
            plan.memory.total,
            SHARDS.index(degrees.shard),
            kinds.index(degrees.schedule.kind),
            degrees.tensor,
            degrees.pipeline,
        )


def best_of(planners: Sequence[Planner], workers: int, keep: int | None = 5) -> list[Plan]:
    """The best layouts of several planners, which differ in what layers compute again: of equal ones the one that
    computes least again."""
    found = [(plan, number) for number, planner in enumerate(planners) for plan in planner.best(workers, keep)]
    found.sort(key=lambda each: (each[0].time.total, each[1], each[0].degrees.ranks, each[0].memory.total))
    return [plan for plan, _ in found][:keep]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
