"""The training step as a transaction: compute and reduce, vote, commit.

Until the vote nothing has changed; after it no communication is needed to finish. A step that fails is simply run
again, by the same or by other ranks, and gives the same bits. What is computed and what becomes of it is the update
rule's (`strategies.update.rule`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from strategies.comm.fabric import Fabric
from strategies.comm.group_errors import raise_of_step
from strategies.comm.traffic import KINDS
from strategies.gradient.compute import Fetch, LocalGradients
from strategies.gradient.context import WorkContext
from strategies.gradient.spec import StepSpec
from strategies.gradient.stopwatch import Stopwatch
from strategies.gradient.work import GradientWork, IdleWork
from strategies.layout.parallel import ParallelLayout
from strategies.model.values import Values
from strategies.objective.batch import Batch
from strategies.state.initial import fill
from strategies.state.training_state import TrainingState
from strategies.trial.trial import Constancy
from strategies.update.counting import counted, square_sum_of
from strategies.update.deals import Assignment, Deals
from strategies.update.evaluation import Evaluation, Measured
from strategies.update.evaluation import Place as EvaluationPlace
from strategies.update.phases import PhaseTimes
from strategies.update.round import Round
from strategies.update.rule import SYNCHRONOUS, UpdateRule
from strategies.update.setting import Setting
from strategies.update.timing import RankTimes
from strategies.update.vote import PAUSE, SAVE, SAVING, Agreement, Ballot, Polls, Vote


@dataclass(frozen=True)
class StepRecord:
    """What a committed step was; identical on every rank but for `seconds` and `phase_seconds`. `loss` is in the unit
    of the objective, `ranks` what each rank spent on it, `deal` the number of the deal by which virtual workers were
    held (0: that of the generation).

    More than 15 attributes: it is all that is told of a step."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    """Targets that count."""
    hashes: tuple[int, ...]
    skipped: bool
    generation: int
    committed_at: float
    seconds: float
    phase_seconds: dict[str, float] = field(default_factory=dict)
    padding: int = 0
    """Positions that were computed without a target that counts."""
    ranks: tuple[RankTimes, ...] = ()
    deal: int = 0
    wire_bytes: dict[str, int] = field(default_factory=dict)
    """That all ranks have sent, by kind (`strategies.comm.traffic`)."""
    round_steps: int = 1
    """Steps of the round that it ends; 0 where it does not."""


class _Loads:
    """Gives out batches of `source`, and notes how much they are: `of_step` has the targets and the padding of the
    steps of a round."""

    def __init__(self, source: Fetch) -> None:
        self.of_step: dict[int, tuple[int, int]] = {}
        self.source = source
        self._of_step = -1
        self._by_virtual_worker: dict[int, tuple[float, int, int]] = {}

    def begin(self, step: int) -> bool:
        """A round begins with this step. Whether it is another than the last, of which what was computed counts."""
        if step == self._of_step:
            return False
        self._of_step, self._by_virtual_worker, self.of_step = step, {}, {}
        return True

    def fetch(self, step: int, virtual_worker: int) -> Batch:
        """A batch; any one knows what its whole step is."""
        batch = self.source(step, virtual_worker)
        self.of_step[step] = batch.targets, batch.step_padding
        self._by_virtual_worker[virtual_worker] = (batch.cost, batch.num_targets, batch.num_padding)
        return batch

    def of(self, virtual_workers: tuple[int, ...]) -> tuple[float, int, int]:
        """The cost, targets and padding of these together."""
        loads = [self._by_virtual_worker.get(index, (1.0, 0, 0)) for index in virtual_workers]
        cost, tokens, padding = (sum(each) for each in zip(*loads, strict=True)) if loads else (0.0, 0, 0)
        return float(cost), int(tokens), int(padding)


class Prepared(NamedTuple):
    """A round that is prepared: its first step, and the one after its last."""

    first: int
    end: int


class StepEngine:
    """Runs steps on one rank, generation after generation.

    `on_phase(phase, step)` is called at the start of every phase (heartbeats, fault injection). For the model see
    `strategies.model.blueprint`.

    More than 15 attributes, in more than 300 lines: what it is made of, what others want of the next vote, and where
    its round stands.
    """

    def __init__(
        self,
        state: TrainingState,
        spec: StepSpec,
        fetch: Fetch,
        on_phase: Callable[[str, int], None] = lambda phase, step: None,
        rule: UpdateRule = SYNCHRONOUS,
    ) -> None:
        self.state = state
        self.spec = spec
        self.rule = rule
        self.loads = _Loads(fetch)
        self.phases = PhaseTimes(on_phase)
        self.watch = Stopwatch(state.device)
        self.local: LocalGradients | None = None
        """What is kept of an interrupted step."""
        self.pause_requested = False
        self.save_requested = False
        self.is_saving: Callable[[], bool] = lambda: False
        self.on_deal: Callable[[tuple[int, ...]], None] = lambda held: None
        """Called with the virtual workers that this rank has from the next step on."""
        self.nan_step: int | None = None
        self.prepared: Prepared | None = None
        """The round whose reduced gradient is here, and was not committed."""
        self.kept: dict[str, Any] = {}
        """What the update rule keeps of an interrupted round."""
        # True after an exception in the middle of an update: the state is then neither the old nor the new one.
        self.applying = False
        self.work: GradientWork = IdleWork()
        self.deals = Deals()
        self._constancy = Constancy(())
        self._is_stale = True
        self._sent_before = (0,) * len(KINDS)

    def bind(self, fabric: Fabric, layout: ParallelLayout, generation: int) -> None:
        """Takes a place in a generation, whose state has been taken: collectives go over `fabric`, the work is dealt by
        `layout`."""
        arrangement = self.state.arrangement
        self.fabric = fabric
        self.generation = generation
        self.place = layout.place(fabric.rank)
        self.prepared = None
        self._is_stale = True
        self.watch.waited = lambda: fabric.waited_s
        self.phases.before = {}
        self.deals = Deals()
        self._deal_work(layout)
        # A step that was interrupted has not been looked at.
        self._constancy.check()
        part, caches = arrangement.part, self.state.blueprint.caches
        self._constancy = Constancy([], caches) if part is None else Constancy(part.modules, caches | part.swapped)
        self._counted = counted(self.state.space, arrangement.own, layout, self.place)

    def _deal_work(self, layout: ParallelLayout) -> None:
        """Sets up this rank's work in `layout`, and what it tells in votes."""
        self.layout = layout
        self.work = self.rule.work(
            Setting(
                self.state, layout, self.fabric, self.spec, self.loads.fetch, self.watch, self.local, self.kept,
                lambda held: self.on_deal(held), self._is_nan,
            )
        )  # fmt: skip
        self.local = self.work.local or self.local
        self._polls: dict[tuple[int, bool], Polls] = {}
        self.on_deal(self.polls(1).held[self.fabric.rank])

    def polls(self, steps: int, *, apart: bool = False) -> Polls:
        """Votes of this layout; see `Polls`."""
        if (steps, apart) not in self._polls:
            self._polls[steps, apart] = Polls(self.layout, steps, apart=apart)
        return self._polls[steps, apart]

    def _is_nan(self, step: int) -> bool:
        """Whether the gradient of this step is to be not finite; once."""
        if self.nan_step != step:
            return False
        self.nan_step = None
        return True

    def offer(self, number: int, assignment: Assignment) -> None:
        """A new deal of the virtual workers to replicas, in force from the step on before which all ranks know that it
        is the newest. From any thread."""
        self.deals.offer(number, assignment)

    @property
    def newest_assignment(self) -> Assignment:
        """Of the deal in force, or of a newer one that has been offered."""
        return self.deals.newest(self.layout.assignment)

    def discard(self) -> None:
        """Forgets what is kept of an interrupted step."""
        self.work.discard()
        self.kept.clear()
        for shard in self.state.arrangement.virtual.values():
            shard.discard()
        if self.local is not None:
            self.local.discard()

    # ------------------------------------------------------------------------------------ a step

    def run(self, step: int) -> tuple[list[StepRecord], Agreement]:
        """Prepares, votes and commits the round that begins with `step`; returns the records of its steps and what all
        agreed to do after it.

        A gradient that is not finite is computed once more from the start: what a failing device corrupted comes out
        right, and what the data caused comes out the same and then skips the update on every rank alike.

        Raises PeerLost when a peer is gone or the group was aborted; the state is then as before the step, unless
        `prepared` says that only the news of the vote is missing.
        """
        started = time.perf_counter()
        self.phases.begin()
        self._sent_before = self.fabric.traffic.told()
        if self.loads.begin(step):
            self.watch.reset()
        try:
            vote = self._agree(step)
        except RuntimeError as error:
            raise_of_step(error, is_aborted=self.fabric.is_aborted)
        self.commit(step, vote.norm)
        records = self._records(step, vote, time.perf_counter() - started)
        self.phases.before = self.phases.seconds
        self.deals.agreed(vote.agreement.deal)
        return records, vote.agreement

    def _records(self, first: int, vote: Vote, seconds: float) -> list[StepRecord]:
        """Of the steps of a round that was committed now, each of which took its share of the time. What ranks spent on
        all of it is told with the last."""
        steps, committed_at = len(vote.losses), time.monotonic()
        records = []
        for number in range(steps):
            is_last, step, norm = number == steps - 1, first + number, vote.norm
            if vote.norms[number] and math.isfinite(vote.norm):
                # Of replicas that train by themselves; those whose gradient was not finite have skipped the step.
                finite = [each for each in vote.norms[number] if math.isfinite(each)]
                norm = math.sqrt(math.fsum(each * each for each in finite) / max(1, len(finite)))
            targets, padding = self.loads.of_step[step]
            record = StepRecord(
                step=step,
                loss=math.fsum(vote.losses[number]),
                grad_norm=norm,
                lr=self.spec.base_lr * self.spec.schedule.factor(step),
                tokens=targets,
                padding=padding,
                hashes=vote.hashes[number],
                skipped=not math.isfinite(vote.norm),
                generation=self.generation,
                committed_at=committed_at - seconds * (steps - 1 - number) / steps,
                seconds=seconds / steps,
                phase_seconds={phase: each / steps for phase, each in self.phases.seconds.items()},
                ranks=vote.ranks if is_last else (),
                deal=self.deals.number,
                wire_bytes={kind: n for kind, n in zip(KINDS, vote.sent, strict=True) if n} if is_last else {},
                round_steps=steps if is_last else 0,
            )
            records.append(record)
        return records

    def evaluate(self, step: int, evaluation: Evaluation) -> Measured:
        """What is measured of the weights after `step` steps, of all that is evaluated on; the same on every rank.
        Changes nothing. Raises PeerLost."""
        context = None
        if self.place is not None and self.state.arrangement.part is not None:
            context = WorkContext(
                self.layout, self.place, self.fabric, self.spec, self.loads.source, Stopwatch(self.state.device)
            )
        place = EvaluationPlace(self.layout, self.fabric, context, self._enter, self.fabric.look)
        try:
            self._refresh(step)
            found = evaluation.run(step, self.state, place)
        except RuntimeError as error:
            raise_of_step(error, is_aborted=self.fabric.is_aborted)
        self.phases.leave()
        return found

    @contextmanager
    def other_weights(self, values: Values) -> Iterator[None]:
        """Before the first step: what is computed with in the block is these, and afterwards what it was, also where
        the block is left because a peer is lost."""
        shards = self.state.arrangement.state_shards
        fill(shards, self.state.blueprint, values)
        self._is_stale = True
        try:
            yield
        finally:
            fill(shards, self.state.blueprint)
            self._is_stale = True

    def _refresh(self, step: int) -> None:
        """Brings the weights that are computed with up to date, if they are not."""
        if self._is_stale:
            self.work.refresh(lambda phase: self._enter(phase, step))
            self._is_stale = False

    def _agree(self, step: int) -> Vote:
        """Prepares the step and votes on it; once more if it is not finite."""
        # A deal is taken up before a step, where that may fail like a step.
        if (assignment := self.deals.take_up()) is not None:
            self._deal_work(replace(self.layout, assignment=assignment))
        for is_last in (False, True):
            self.prepare(step)
            for each in range(step, self._end_of(step)):
                if each not in self.loads.of_step:
                    self.loads.fetch(each, 0)  # A rank without virtual workers.
            vote = self.vote(step)
            if math.isfinite(vote.norm) or is_last:
                break
            self.prepared = None
            self.work.discard()
        return vote

    def _end_of(self, first: int) -> int:
        """The step after the last of the round that begins with `first`."""
        return self.rule.end_of(first, self.spec.total_steps)

    def _round(self, step: int) -> Round:
        return Round(
            step, self.state, self.spec, self.fabric, self.work, self._enter, self._constancy.check, self._is_nan
        )  # fmt: skip

    def _enter(self, phase: str, step: int) -> None:
        self.fabric.traffic.enter(phase)
        self.phases.enter(phase, step)

    def prepare(self, step: int) -> None:
        """Computes this rank's share of the step and reduces; the reduced gradient of everything that is trained here
        is then in place. Raises ModelChanged when the model has changed what it keeps."""
        self._refresh(step)
        self.rule.prepare(self._round(step))
        self.state.forget_collected()
        self.prepared = Prepared(step, self._end_of(step))

    def vote(self, step: int) -> Vote:
        """Tells everyone that this rank holds the reduced gradient, and learns that all others do."""
        end = self._end_of(step)
        for each in range(step, end):
            self._enter("vote", each)
        computed = [self.work.of_step(each) for each in range(step, end)]
        polls = self.polls(end - step, apart=self.rule.is_apart(step))
        rank = self.fabric.rank
        mine, led = polls.told[rank], polls.led[rank]
        losses = [each.losses[index] for each in computed for index in mine]
        ballot = Ballot(
            flags=self.pause_requested * PAUSE + self.save_requested * SAVE + self.is_saving() * SAVING,
            deal=self.deals.vote(),
            square_sum=square_sum_of(self.state.arrangement.own, self._counted),
            losses=torch.stack(losses).tolist() if losses else [],
            hashes=[each.hashes[index] for each in computed for index in mine],
            norms=[each.norms[number] for each in computed for number in led],
            times=self.rank_times(),
            sent=[now - before for now, before in zip(self.fabric.traffic.told(), self._sent_before, strict=True)],
        )
        return polls.hold(self.fabric.control, ballot)

    def rank_times(self) -> RankTimes:
        """This rank's, up to now."""
        held, seconds = self.polls(1).held[self.fabric.rank], self.watch.seconds()
        busy = tuple(seconds.get(index, 0.0) for index in held)
        times, before = self.phases.seconds, self.phases.before
        exchanged = times["refresh"] + times["reduce"] + times["gather"] + before.get("vote", 0.0)
        # What is no pass through the model, in a phase that computes, is waiting for others (or fault injection).
        wait = exchanged + max(0.0, times["compute"] - sum(seconds.values()))
        return RankTimes(busy, times["data"], wait, before.get("commit", 0.0), *self.loads.of(held))

    def commit(self, step: int, norm: float) -> None:
        """Applies the held reduced gradient of the round that begins with `step`, whose global norm is `norm`; local,
        cannot fail for want of a peer."""
        if self.prepared is None or self.prepared.first != step:
            raise RuntimeError(f"step {step} is not prepared here (prepared: {self.prepared})")
        for each in range(step, self.prepared.end):
            self._enter("commit", each)
        this = self._round(step)
        if math.isfinite(norm):
            self.applying = True
            self.state.reads.before_change()
            self.rule.commit(this, norm)
            for shard in self.state.arrangement.virtual.values():
                shard.commit()
            self.state.updates += self.rule.updates_of(step, self.spec.total_steps)
            self.applying = False
            self._is_stale = True
        else:
            for shard in self.state.arrangement.virtual.values():
                shard.discard()
        self.state.step_committed()
        self.prepared = None
        self.work.discard()
        self.phases.leave()

    def prepared_after(self, committed: int) -> int:
        """Of how many steps the round is that is prepared here after `committed` steps; 0: there is none."""
        if self.prepared is None or self.prepared.first != committed:
            return 0
        return self.prepared.end - committed
