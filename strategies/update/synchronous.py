"""The training step as a transaction: compute and reduce, vote, commit.

Until the vote nothing has changed; after it no communication is needed to finish. A step that fails is simply run
again, by the same or by other ranks, and gives the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist

from strategies.comm.fabric import Fabric
from strategies.comm.groups import PATIENCE, PeerLost
from strategies.gradient.compute import Fetch, LocalGradients
from strategies.gradient.spec import StepSpec
from strategies.gradient.stopwatch import Stopwatch
from strategies.gradient.work import GradientWork, IdleWork, LocalWork, work_for
from strategies.layout.assignment import even
from strategies.layout.parallel import Coordinates, ParallelLayout
from strategies.layout.schedule import parts_of
from strategies.layout.space import ALIGNMENT, Space, merge
from strategies.objective.batch import Batch
from strategies.reduction.norm import WORDS, from_words, norm_of, square_sum, to_words
from strategies.state.shard import StateShard
from strategies.state.training_state import TrainingState
from strategies.trial.trial import Constancy
from strategies.update.timing import HEADER, RankTimes, from_row, to_row
from strategies.update.vote import PAUSE, SAVE, SAVING, Agreement, Deal, Vote, exchange

PHASES = ("refresh", "data", "compute", "reduce", "gather", "vote", "commit")
"""The phases of a step in order: "refresh" is a collective, where weights are gathered from those who train them; the
next two are taken in turns for every virtual worker, and local unless the model is split; the next three are
collectives; the last is local."""


@dataclass(frozen=True)
class StepRecord:
    """What a committed step was; identical on every rank but for `seconds` and `phase_seconds`. `loss` is in the unit
    of the objective, `ranks` what each rank spent on it, `deal` the number of the deal by which virtual workers were
    held (0: that of the generation)."""

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


class StepEngine:
    """Runs steps on one rank, generation after generation.

    `on_phase(phase, step)` is called at the start of every phase (heartbeats, fault injection). For the model see
    `strategies.model.blueprint`.
    """

    def __init__(
        self,
        state: TrainingState,
        spec: StepSpec,
        fetch: Fetch,
        on_phase: Callable[[str, int], None] = lambda phase, step: None,
    ) -> None:
        self.state = state
        self.spec = spec
        self.fetch = fetch
        self.on_phase = on_phase
        self.local: LocalGradients | None = None
        """What is kept of an interrupted step."""
        self.pause_requested = False
        self.save_requested = False
        self.on_deal: Callable[[tuple[int, ...]], None] = lambda held: None
        """Called with the virtual workers that this rank has from the next step on."""
        self.is_saving: Callable[[], bool] = lambda: False
        self.nan_step: int | None = None
        self.prepared_step: int | None = None
        # True after an exception in the middle of an update: the state is then neither the old nor the new one.
        self.applying = False
        self.work: GradientWork = IdleWork()
        self._constancy = Constancy(())
        self.watch = Stopwatch(state.device)
        self._is_stale = True
        self._times = dict.fromkeys(PHASES, 0.0)
        self._before: dict[str, float] = {}
        self._loads: dict[int, tuple[float, int, int]] = {}
        self._offered: Deal = (0, ())
        self._voted: Deal = (0, ())
        self._agreed: Deal = (0, ())
        self._accounted = -1
        self._totals = (-1, 0, 0)

    def bind(self, fabric: Fabric, layout: ParallelLayout, generation: int) -> None:
        """Takes a place in a generation, whose state has been taken: collectives go over `fabric`, the work is dealt by
        `layout`."""
        arrangement = self.state.arrangement
        self.fabric = fabric
        self.layout = layout
        self.generation = generation
        self.place = layout.place(fabric.rank)
        self.shards = arrangement.shards
        self.prepared_step = None
        self._is_stale = True
        self.watch.waited = lambda: fabric.waited_s
        self._before = {}
        self.deal, self._offered, self._agreed = 0, (0, ()), (0, ())
        self._deal_work(layout)
        # A step that was interrupted has not been looked at.
        self._constancy.check()
        self._constancy = Constancy(
            [] if arrangement.part is None else arrangement.part.modules, self.state.blueprint.caches
        )
        self._counted = (
            [] if arrangement.own is None else _counted(self.state.space, arrangement.own, layout, self.place)
        )

    def _deal_work(self, layout: ParallelLayout) -> None:
        """Sets up this rank's work in `layout`, and what it tells in votes."""
        self.layout = layout
        self.work = work_for(
            self.state.arrangement, layout, self.fabric, self.spec, self._fetch, self.watch, self.local
        )  # fmt: skip
        self.local = self.work.local if isinstance(self.work, LocalWork) else self.local
        # By rank, the virtual workers it tells about in the vote, and those that it has.
        self._voiced = [_voiced(layout, rank) for rank in range(layout.world_size)]
        self._held = [_held(layout, rank) for rank in range(layout.world_size)]
        self.on_deal(self._held[self.fabric.rank])

    def _follow_deal(self) -> None:
        """Takes up the deal that all agreed on, if there is a new one. Before a step, where it may fail like a step."""
        number, assignment = self._agreed
        if number > self.deal:
            self._deal_work(replace(self.layout, assignment=assignment))
            self.deal = number

    def offer(self, number: int, assignment: tuple[tuple[int, ...], ...]) -> None:
        """A new deal of the virtual workers to replicas, in force from the step on before which all ranks know that it
        is the newest. Numbers are unique for a deal, and grow. From any thread."""
        if number > self._offered[0]:
            self._offered = (number, assignment)

    def warm_up(self, *, keep: bool) -> None:
        """One pass through the whole model, its result thrown away; with `keep` its memory is kept for layouts in which
        a rank computes with the whole model. See `LocalGradients.warm_up`, also for what it raises.

        A model that tensor parallelism splits is warmed up by its first step: alone, a rank cannot compute it.
        """
        if self.state.space.tensor > 1:
            return
        part = self.state.whole_part()
        local = LocalGradients(part, self.spec, self._fetch, self.watch)
        local.warm_up()
        if keep:
            self.local = local
        else:
            part.close()
            self.state.arrangement.part = None

    def calibrate(self) -> float:
        """Seconds that this device needs for a fixed piece of work, to compare it with others before they have trained:
        a virtual worker where the whole model can be computed with alone, else products of matrices.

        On a CPU it is time of its processor, as the machine may be busy with starting other workers.
        """
        device = self.state.device
        local = self.local
        if local is not None and self.state.arrangement.part is local.part:
            return min(_seconds_of(local.try_out, device) for _ in range(4)) * self.spec.micro_batches
        matrix = torch.ones((512, 512), device=device)

        def multiply() -> None:
            for _ in range(8):
                torch.mm(matrix, matrix)

        multiply()
        return min(_seconds_of(multiply, device) for _ in range(4))

    @property
    def newest_assignment(self) -> tuple[tuple[int, ...], ...]:
        """Of the deal in force, or of a newer one that has been offered."""
        number, assignment = self._offered
        return assignment if number > self.deal else self.layout.assignment

    def discard(self) -> None:
        """Forgets what is kept of an interrupted step."""
        self.work.discard()
        if self.local is not None:
            self.local.discard()

    def run(self, step: int) -> tuple[StepRecord, Agreement]:
        """Prepares, votes and commits `step`; returns its record and what all agreed to do after it.

        A gradient that is not finite is computed once more from the start: what a failing device corrupted comes out
        right, and what the data caused comes out the same and then skips the update on every rank alike.

        Raises PeerLost when a peer is gone or the group was aborted; the state is then as before the step, unless
        `prepared_step` says that only the news of the vote is missing.
        """
        started = time.perf_counter()
        self._times = dict.fromkeys(PHASES, 0.0)
        if step != self._accounted:
            # What was computed of an interrupted step still counts.
            self._accounted, self._loads = step, {}
            self.watch.reset()
        try:
            self._follow_deal()
            for attempt in range(2):
                self.prepare(step)
                if self._totals[0] != step:
                    self._fetch(step, 0)  # A rank without virtual workers.
                vote = self.vote(step)
                if math.isfinite(vote.norm):
                    break
                if attempt == 0:
                    self.prepared_step = None
                    self.work.discard()
        except RuntimeError as error:
            self._explain(error)
        _, targets, padding = self._totals
        lr = self.commit(step, vote.norm)
        record = StepRecord(
            step=step,
            loss=math.fsum(vote.losses),
            grad_norm=vote.norm,
            lr=lr,
            tokens=targets,
            padding=padding,
            hashes=vote.hashes,
            skipped=not math.isfinite(vote.norm),
            generation=self.generation,
            committed_at=time.monotonic(),
            seconds=time.perf_counter() - started,
            phase_seconds=self._times,
            ranks=vote.ranks,
            deal=self.deal,
        )
        self._before = self._times
        if vote.agreement.deal == self._voted[0] > self.deal:
            self._agreed = self._voted
        return record, vote.agreement

    def _fetch(self, step: int, virtual_worker: int) -> Batch:
        """A batch, with a note of how much it is; any one knows what its whole step is."""
        batch = self.fetch(step, virtual_worker)
        self._totals = (step, batch.targets, batch.step_padding)
        self._loads[virtual_worker] = (batch.cost, batch.num_targets, batch.num_padding)
        return batch

    def _explain(self, error: RuntimeError) -> NoReturn:
        """Torch's own collectives, inside a model that is split, say in many words that a peer is gone."""
        if not isinstance(error, PeerLost) and (self.fabric.is_aborted or is_connection_error(error)):
            # What runs the stages of a pipeline begins its own error with an empty line, and names the cause elsewhere.
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            lines = str(cause).strip().splitlines() or [type(cause).__name__]
            raise PeerLost(lines[0][:300]) from error
        raise error

    def prepare(self, step: int) -> None:
        """Computes this rank's share of the step and reduces; the reduced gradient of everything that is trained here
        is then in place. Raises ModelChanged when the model has changed what it keeps."""
        if self._is_stale:
            self.work.refresh(lambda phase: self._enter(phase, step))
            self._is_stale = False
        if self.nan_step == step:
            self.nan_step = None
            self.work.inject_nan()
        self.work.run(step, self._enter, self.fabric.check)
        self._constancy.check()
        self._mirror(step)
        self.state.forget_collected()
        self.prepared_step = step

    def _mirror(self, step: int) -> None:
        """Sends reduced gradients to those that mirror them. Raises PeerLost."""
        if not any(shard.mirrors for shard in self.shards):
            return
        self._enter("gather", step)
        rank, world, mirrors = self.fabric.rank, self.fabric.world, self.state.arrangement.mirrors
        own = self.state.arrangement.own
        works = []
        for shard in self.shards:
            if shard.owner == rank and own is not None:
                works += [world.send(own.gradient, mirror, 0) for mirror in shard.mirrors]
            elif rank in shard.mirrors:
                works.append(world.receive(mirrors[shard.owner].gradient, shard.owner, 0))
        try:
            for work in works:
                work.wait(PATIENCE)
        except RuntimeError as error:
            raise PeerLost(f"state copies: {error}") from error
        world.check()

    def vote(self, step: int) -> Vote:
        """Tells everyone that this rank holds the reduced gradient, and learns that all others do."""
        self._enter("vote", step)
        world, voiced = self.fabric.world, self._voiced
        mine = voiced[self.fabric.rank]
        times = to_row(self._rank_times())
        self._voted = self._offered  # Another may come while the vote is on.
        words = to_words(self._square_sum())
        losses = [float(self.work.losses[index]) for index in mine]
        hashes = [self.work.hashes[index] for index in mine]
        flags = self.pause_requested * PAUSE + self.save_requested * SAVE + self.is_saving() * SAVING
        floats = np.array([*losses, *times], dtype=np.float64)
        whole = np.array([flags, self._voted[0], *words, *hashes], dtype=np.int64)
        row = np.concatenate([whole, floats.view(np.int64)])
        sizes = [
            2 + WORDS + 2 * len(told) + HEADER + len(held) for told, held in zip(voiced, self._held, strict=True)
        ]  # fmt: skip
        everyone = exchange(world, row, sizes, self.state.device)
        sums: list[int | None] = []
        loss_of: dict[int, float] = {}
        hash_of: dict[int, int] = {}
        flags, deals, ranks = 0, set(), []
        for told, part in zip(voiced, np.split(everyone, np.cumsum(sizes)[:-1]), strict=True):
            ints, values = np.split(part, [2 + WORDS + len(told)])
            flag, deal, *rest = ints.tolist()
            flags |= flag
            deals.add(deal)
            sums.append(from_words(rest[:WORDS]))
            hash_of |= dict(zip(told, rest[WORDS:], strict=True))
            numbers = values.view(np.float64).tolist()
            loss_of |= dict(zip(told, numbers, strict=False))
            ranks.append(from_row(numbers[len(told) :]))
        order = range(self.layout.virtual_workers)
        losses = [loss_of[i] for i in order]
        agreement = Agreement.of(flags, deals)
        return Vote(norm_of(sums), losses, tuple(hash_of[i] for i in order), agreement, tuple(ranks))

    def _rank_times(self) -> RankTimes:
        """This rank's, up to now."""
        held, seconds = self._held[self.fabric.rank], self.watch.seconds()
        busy = tuple(seconds.get(index, 0.0) for index in held)
        loads = [self._loads.get(index, (1.0, 0, 0)) for index in held]
        times, before = self._times, self._before
        exchanged = times["refresh"] + times["reduce"] + times["gather"] + before.get("vote", 0.0)
        # What is no pass through the model, in a phase that computes, is waiting for others (or fault injection).
        wait = exchanged + max(0.0, times["compute"] - sum(seconds.values()))
        cost, tokens, padding = (sum(each) for each in zip(*loads, strict=True)) if loads else (0.0, 0, 0)
        return RankTimes(busy, times["data"], wait, before.get("commit", 0.0), float(cost), int(tokens), int(padding))

    def _square_sum(self) -> int | None:
        """Of the reduced gradient that this rank speaks for."""
        own = self.state.arrangement.own
        total = 0
        for start, stop in self._counted if own is not None else ():
            assert own is not None
            part = square_sum(own.gradient[start:stop])
            if part is None:
                return None
            total += part
        return total

    def commit(self, step: int, norm: float) -> float:
        """Applies the held reduced gradient of `step`, whose global norm is `norm`; local, cannot fail for want of a
        peer. Returns the learning rate used."""
        self._enter("commit", step)
        if self.prepared_step != step:
            raise RuntimeError(f"step {step} is not prepared here (prepared: {self.prepared_step})")
        lr = self.spec.base_lr * self.spec.schedule.factor(step)
        if math.isfinite(norm):
            self.applying = True
            if self.spec.clip_norm is not None and norm > self.spec.clip_norm:
                for holding in self.state.arrangement.holdings:
                    holding.gradient.mul_(self.spec.clip_norm / norm)
            self.state.trained(lr)
            self.applying = False
            self._is_stale = True
        self.state.step_committed()
        self.prepared_step = None
        self.work.discard()
        self._leave()
        return lr

    def _enter(self, phase: str, step: int) -> None:
        now = time.perf_counter()
        self._leave(now)
        self._phase, self._entered = phase, now
        self.on_phase(phase, step)

    _phase: str | None = None
    _entered: float = 0.0

    def _leave(self, now: float | None = None) -> None:
        if self._phase is not None and self._phase in self._times:
            self._times[self._phase] += (time.perf_counter() if now is None else now) - self._entered
        self._phase = None


def _seconds_of(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        return time.perf_counter() - started
    started = time.process_time()
    work()
    return time.process_time() - started


def is_connection_error(error: BaseException) -> bool:
    """Whether an error of torch's own, or one that it was made of, is about the connection to another rank."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (PeerLost, dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
            return True
        text = str(seen).lower()
        if any(word in text for word in ("gloo", "connection", "broken pipe", "socket closed", "nccl")):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _voiced(layout: ParallelLayout, rank: int) -> tuple[int, ...]:
    """The virtual workers whose loss and hash a rank tells: its replica's, if it has the end of the model."""
    place = layout.place(rank)
    if place is None or place.tensor:
        return ()
    last = max(len(layout.parts) - 1, 0)
    if layout.pipeline > 1 and last not in parts_of(layout.schedule, layout.pipeline, last + 1, place.stage):
        return ()
    return layout.assignment[place.data]


def _held(layout: ParallelLayout, rank: int) -> tuple[int, ...]:
    """The virtual workers that a rank computes, or a part of the model for."""
    place = layout.place(rank)
    return () if place is None else layout.assignment[place.data]


def _counted(space: Space, own: StateShard, layout: ParallelLayout, place: Coordinates | None) -> list[tuple[int, int]]:
    """What of its gradient a rank speaks for, so that every element of the whole is spoken for once: of what all
    replicas hold its slice; and what all tensor-parallel coordinates have, the first does."""
    if place is None:
        return []
    window = (0, own.strip.size)
    if layout.effective_shard == "none":
        sizes = even(own.strip.size, layout.data, ALIGNMENT)
        start = sum(sizes[: place.data])
        window = (start, start + sizes[place.data])
    if place.tensor == 0:
        return [window]
    counted = []
    for slot in space.slots:
        if slot.dim is not None:
            for _, offset, length in own.strip.locate(slot.offset, slot.stop):
                low, high = max(offset, window[0]), min(offset + length, window[1])
                if low < high:
                    counted.append((low, high))
    return merge(counted)
