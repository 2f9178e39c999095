"""A simulated world around the real controller: workers, a cluster, messages and a clock, all from one seed.

Workers behave as `orchestrator.training.worker` does: they refuse what is old, take part in one generation at a time,
train by the vote, give up when a peer is lost, say what was not heard again. What they hold is checked where it
matters: who is named a holder must have that part of that state. Nothing sleeps; an event queue moves the time on.
"""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from monitoring.event_book import EventBook
from monitoring.events import RunEvent, RunFinished
from orchestrator.checkpoint.names import Save
from orchestrator.control.core.orders import Order
from orchestrator.control.core.protocol import (
    Died,
    DrainNotice,
    FaultFired,
    Finish,
    KillWorker,
    Placed,
    ReleaseWorker,
    RequestWorker,
    Resize,
    Start,
    Stop,
    Tick,
)
from orchestrator.control.core.workers import WorkerId
from orchestrator.control.training.controller import Controller
from orchestrator.control.training.history import History
from orchestrator.control.training.protocol import Action, Event, Rollback, StepCommitted, TakeOver
from orchestrator.control.training.views import ControllerConfig, RunState
from orchestrator.training.messages import (
    CheckpointSaved,
    Finalized,
    Generation,
    GpuReading,
    Heartbeat,
    Joined,
    LeftCause,
    PartSaved,
    Ready,
    Reply,
    SaveBegun,
    SaveDelayed,
    SavePlan,
    Status,
    StepReport,
)
from orchestrator.training.orders import (
    CommitCheckpoint,
    Deal,
    DiscardCheckpoint,
    Finalize,
    Interrupt,
    Pause,
    SaveState,
    StartGeneration,
)
from orchestrator.training.worker_protocol import Holds, WorkerProtocol
from strategies.layout.parallel import ParallelLayout
from strategies.layout.statemap import NOTHING, Span, Spans, subtract, union, whole
from strategies.update.timing import RankTimes
from tests.unit.events_in_tests import event_with
from tests.unit.layouts_in_tests import MODEL

TICK_S = 0.25
HEARTBEAT_S = 0.5
FORM_TIMEOUT_S = 20.0
COLLECTIVES = frozenset({"form", "reduce", "vote"})
ELEMENTS = 960
"""Of the state of each tensor-parallel coordinate."""


def trained_spans(layout: ParallelLayout, copies: int) -> list[Spans]:
    """What each rank of a layout trains: a share of its stage, and those of others as far as copies are wanted."""
    shares, natural = [], 1
    for rank in range(layout.num_placed):
        place = layout.place(rank)
        assert place is not None
        size = ELEMENTS // layout.pipeline
        start, stop = place.stage * size, (place.stage + 1) * size
        if layout.shard == "none" or layout.data == 1:
            natural = layout.data
        else:
            start, stop = start + size * place.data // layout.data, start + size * (place.data + 1) // layout.data
        shares.append(Span(place.tensor, start, stop))
    trained = [union([share]) for share in shares]
    for copy in range(natural, min(copies, layout.num_placed)):
        for rank, share in enumerate(shares):
            mirror = (rank + copy * layout.tensor) % layout.num_placed
            trained[mirror] = union(trained[mirror], [share])
    return trained + [NOTHING] * layout.spares


@dataclass
class Node:
    name: str
    places: int
    draining: bool = False
    gone: bool = False


class Room:
    """A generation as its members live it: who has arrived, computed, prepared."""

    def __init__(self, world: World, generation: Generation) -> None:
        self.world, self.generation = world, generation
        self.together = generation.layout.computes_together
        self.trained = trained_spans(generation.layout, world.copies)
        if generation.collect:
            self.trained = [world.whole, *generation.held[1:]]
        world.check_layout(generation)
        self.computing: defaultdict[int, set[WorkerId]] = defaultdict(set)
        self.newest: defaultdict[int, set[int]] = defaultdict(set)
        self.accounts: defaultdict[int, dict[WorkerId, RankTimes]] = defaultdict(dict)
        self.members = [world.workers[member.worker] for member in generation.members]
        self.arrived: set[WorkerId] = set()
        self.broken = False
        self.computed: defaultdict[int, set[WorkerId]] = defaultdict(set)
        self.prepared: defaultdict[int, set[WorkerId]] = defaultdict(set)
        self.pausing: set[int] = set()
        self.saving: set[int] = set()
        self.busy: set[int] = set()

    def arrive(self, worker: Worker) -> None:
        self.arrived.add(worker.id)
        if self.broken:
            self.world.after(0.02, lambda: worker.lose_peer(self))
        elif len(self.arrived) == len(self.members):
            self.world.after(0.05, self.form)

    def form(self) -> None:
        """All have met: the state goes from those that have it to those that need it."""
        if self.broken or any(worker.hung for worker in self.members):
            return
        generation = self.generation
        for worker in self.members:
            worker.protocol.begins_at(generation.committed)
        if generation.restore is not None:
            first = self.members[0]
            first.held, first.committed, first.prepared = NOTHING, 0, False
            if generation.restore not in self.world.valid_checkpoints:
                first.leave("restore", f"{generation.restore} is damaged")
                return
        else:
            assert not subtract(self.world.whole, union(*generation.held)), f"{generation} lacks a part of its state"
            for worker, held in zip(self.members, generation.held, strict=True):
                worker.must_hold(held, generation)
        self.world.after(self.world.transfer_s, self.in_place)

    def in_place(self) -> None:
        """All have received what they need, and know it of one another."""
        if self.broken or any(worker.hung for worker in self.members):
            return
        for worker, trained in zip(self.members, self.trained, strict=True):
            old = worker.held if worker.committed == self.generation.committed else NOTHING
            worker.held, worker.committed, worker.prepared = union(old, trained), self.generation.committed, False
            self.world.after(self.world.jitter(), lambda worker=worker: worker.join_done(self))

    def compute(self, worker: Worker, step: int) -> None:
        """Ranks that need one another while they compute come to its end together."""
        self.computing[step].add(worker.id)
        if len(self.computing[step]) == len(self.members):
            for member in self.members:
                self.world.after(self.world.jitter(), lambda member=member: member.computed(self))

    def reduce(self, worker: Worker, step: int) -> None:
        self.computed[step].add(worker.id)
        if len(self.computed[step]) == len(self.members):
            layout = self.generation.layout
            for stage in range(layout.pipeline):
                held = [self.members[layout.rank_of(replica, stage)].held_work(self) for replica in range(layout.data)]
                dealt = sorted(index for each in held for index in each)
                assert dealt == list(range(layout.virtual_workers)), f"step {step} is computed by {held}"
            for member in self.members:
                self.world.after(self.world.jitter(), lambda member=member: member.gathered(self, step))

    def vote(self, worker: Worker, step: int) -> None:
        self.prepared[step].add(worker.id)
        self.newest[step].add(worker.offered[0])
        worker.voted_deal = worker.offered
        self.accounts[step][worker.id] = RankTimes(
            (worker.busy_s / max(1, len(worker.held_work(self))),) * len(worker.held_work(self)),
            0.0, 0.0, 0.0, float(len(worker.held_work(self))), 10, 0,
        )  # fmt: skip
        if worker.protocol.pause_requested:
            self.pausing.add(step)
        if worker.protocol.save_requested:
            self.saving.add(step)
        if worker.writing:
            self.busy.add(step)
        if len(self.prepared[step]) == len(self.members):
            for member in self.members:
                self.world.after(self.world.jitter(), lambda member=member: member.voted(self, step))

    def breaks(self) -> None:
        """Somebody is out: those in a collective see it soon, the others when they come to one."""
        if self.broken:
            return
        self.broken = True
        for worker in self.members:
            if worker.room is not self or not worker.in_collective:
                continue
            if worker.phase == "vote" and len(self.prepared[worker.committed]) == len(self.members):
                continue  # what the dead had to say may or may not have arrived: `voted` draws
            self.world.after(self.world.jitter(), lambda worker=worker: worker.lose_peer(self))


class Worker:
    """One process. See `orchestrator.training.worker.Worker`."""

    def __init__(self, world: World, worker: WorkerId, node: Node) -> None:
        self.world, self.id, self.node = world, worker, node
        self.alive, self.hung, self.doomed, self.warm = True, False, False, False
        self.held, self.committed, self.prepared = world.whole, 0, False
        self.protocol = WorkerProtocol(worker)
        self.room: Room | None = None
        self.phase = "idle"
        self.outbox: list[Any] = []
        self.sending = False
        self.queued: list[Generation] = []
        self.started: defaultdict[int, int] = defaultdict(int)
        self.writing = False
        self.last_part: PartSaved | None = None
        self.will_raise = self.will_deadlock = self.mute = False
        self.slowness = 1.0
        self.gpu: GpuReading | None = None
        self.busy_s = 0.0
        self.deal: tuple[int, tuple[tuple[int, ...], ...]] = (0, ())
        self.offered = self.voted_deal = self.deal

    @property
    def running(self) -> bool:
        return self.alive and not self.hung

    @property
    def holds(self) -> Holds:
        return Holds(self.committed, self.held, self.prepared)

    def held_work(self, room: Room) -> tuple[int, ...]:
        """Its virtual workers by the deal in force."""
        layout = room.generation.layout
        place = layout.place(room.generation.rank_of(self.id) or 0)
        return () if place is None else (self.deal[1] or layout.assignment)[place.data]

    @property
    def in_collective(self) -> bool:
        """Whether it hears of a lost peer, or that it is to leave, where it is."""
        waits = self.phase == "compute" and self.room is not None and self.room.together and not self.will_deadlock
        return self.phase in COLLECTIVES or waits

    def must_hold(self, held: Spans, generation: Generation) -> None:
        """It is said to bring this along. Any worker can make the state of step 0 again."""
        if held == self.world.whole and generation.committed == 0 and (self.committed or self.held != held):
            self.held, self.committed, self.prepared = held, 0, False
        if held:
            assert self.committed == generation.committed, f"{self.id} is at {self.committed}, {generation}"
            assert not subtract(held, self.held), f"{self.id} has {self.held}, {generation}"

    # -------------------------------------------------------------------------------- commands

    def take(self, command: Order, term: int) -> None:
        """What the controller of `term` says."""
        if not self.running:
            return
        known, generation = self.protocol.term, self.protocol.generation
        if isinstance(command, StartGeneration) and term >= known:
            newest = -1 if generation is None else generation.number
            assert command.generation.term == term
            assert command.generation.number > newest, f"{self.id} was in {newest} and is told to start {command}"
        if not self.protocol.takes(command, term):
            self.world.refused += term < known
            return
        match command:
            case StartGeneration(generation=new):
                self.started[new.number] += 1
                self.queued.append(new)
                self.next_command()
            case Interrupt():
                room = self.room
                if room is not None and self.protocol.is_interrupted and self.in_collective:
                    self.world.after(0.01, lambda: self.lose_peer(room))
            case Deal(number=number, assignment=assignment):
                if number > self.offered[0]:
                    self.offered = (number, assignment)
            case SaveState(workers, save):
                assert self.held == self.world.whole
                self.write(SavePlan(save, workers), workers.index(self.id))
            case CommitCheckpoint():
                self.world.after(self.world.random.uniform(0.05, 0.5), lambda: self.world.complete(self, command))
            case DiscardCheckpoint(save=save):
                self.world.after(0.05, lambda: self.world.written.pop(save, None))
            case Finalize():
                self.world.after(self.world.random.uniform(0.05, 0.5), self.finalize)

    def status(self, term: int) -> Status | None:
        return self.protocol.status(term, self.ready(), self.holds, self.last_part, self.offered[1])

    def ready(self) -> Ready:
        return Ready(
            self.id, self.node.name, 1000 + self.id.slot, "host", 1, "initial", ELEMENTS, costs=MODEL,
            unit_seconds=self.world.calibrate(self),
        )  # fmt: skip

    def finalize(self) -> None:
        if not self.running or self.mute:
            return
        assert self.held == self.world.whole
        self.send(Finalized(self.id, f"sha256:{self.world.digest_of(self)}"))

    # -------------------------------------------------------------------------------- a generation

    def next_command(self) -> None:
        if self.room is not None or not self.queued:
            return
        generation = self.queued.pop(0)
        self.protocol.enters(generation)
        self.deal = self.offered = self.voted_deal = (0, ())
        self.room = room = self.world.room(generation)
        self.phase = "form"
        rank = generation.rank_of(self.id)
        assert rank is not None, f"{self.id} is told to start a generation without it"
        if rank in generation.roll_forward and self.committed == generation.committed - 1:
            assert generation.norm == self.committed, f"{generation} has the norm of another step"
            assert self.prepared, f"{self.id} is told to roll forward and is not prepared"
            self.committed, self.prepared = self.committed + 1, False
        if self.protocol.is_interrupted:
            self.world.after(0.01, lambda: self.lose_peer(room))
        self.world.after(FORM_TIMEOUT_S, lambda: None if self.protocol.is_joined else self.lose_peer(room))
        room.arrive(self)

    def join_done(self, room: Room) -> None:
        if self.room is not room or not self.running or room.broken:
            return
        rank = room.generation.rank_of(self.id)
        assert rank is not None
        self.held, self.prepared = room.trained[rank], False
        self.protocol.is_joined = True
        self.committed = room.generation.committed
        self.send(Joined(self.id, room.generation.number, 100))
        if room.generation.collect:
            self.leave("complete")
            return
        self.next_step(room)

    def next_step(self, room: Room) -> None:
        if self.committed >= self.world.config.total_steps:
            self.leave("complete")
            return
        self.phase, self.begun_at = "compute", self.world.now
        if self.will_deadlock:
            self.world.note_failure(self)
        else:
            done = self.computed
            if room.together:
                step = self.committed
                self.world.after(self.compute_s(room), lambda: room.compute(self, step))
            else:
                self.world.after(self.compute_s(room), lambda: done(room))

    def compute_s(self, room: Room) -> float:
        """As long as its work takes, at its speed; a share of the model takes a share of the time."""
        layout, noise = room.generation.layout, self.world.noise
        share = len(self.held_work(room)) * layout.data / layout.virtual_workers
        stage = 1.0
        place = layout.place(room.generation.rank_of(self.id) or 0)
        if layout.parts and place is not None:
            flops = [block.flops_per_token for block in MODEL.blocks]
            parts = layout.blocks_of(place.stage) or ()
            stage = layout.pipeline * sum(sum(flops[start:stop]) for start, stop in parts) / sum(flops)
        swing = self.world.random.uniform(1 - noise, 1 + noise)
        self.busy_s = self.world.step_s * share * stage * self.slowness * swing
        return self.busy_s

    def computed(self, room: Room) -> None:
        if self.room is not room or not self.running or self.will_deadlock:
            return
        if self.will_raise or self.committed in self.world.cursed_steps:
            self.will_raise = False
            self.world.note_failure(self)
            self.leave("exception", "RuntimeError: simulated")
        elif room.broken or self.protocol.is_interrupted:
            self.leave("peer", "a peer is gone")
        else:
            self.phase = "reduce"
            room.reduce(self, self.committed)

    def gathered(self, room: Room, step: int) -> None:
        if self.room is room and self.running and self.phase == "reduce":
            self.prepared, self.phase = True, "vote"
            if room.broken:
                self.world.after(self.world.jitter(), lambda: self.lose_peer(room))
            room.vote(self, step)

    def voted(self, room: Room, step: int) -> None:
        if self.room is not room or not self.running or self.committed != step:
            return
        if room.broken and self.world.random.random() < 0.5:
            self.leave("peer", "lost in the vote")
            return
        self.committed, self.prepared = self.committed + 1, False
        world = self.world
        number, first = room.generation.number, room.members[0] is self
        ranks = tuple(room.accounts[step][member.id] for member in room.members) if first else ()
        took = world.now - self.begun_at
        self.protocol.reports.append(
            StepReport(
                step, number, 1.0, float(step), 0.1, 10, f"samples-{step}", False, world.now, took,
                ranks=ranks, deal=self.deal[0],
            )
        )  # fmt: skip
        if room.newest[step] == {self.voted_deal[0]} and self.voted_deal[0] > self.deal[0]:
            self.deal = self.voted_deal
        self.save_if_due(room, step)
        if step in room.pausing:
            self.leave("pause")
        else:
            self.next_step(room)

    def save_if_due(self, room: Room, step: int) -> None:
        world, every = self.world, self.world.checkpoint_every
        last = self.committed == world.config.total_steps
        is_due = last or step in room.saving or bool(every and self.committed % every == 0)
        saves, tells = self.protocol.saves(is_due=is_due, is_busy=step in room.busy, is_last=last)
        first = room.members[0] is self
        if tells and first:
            self.send(SaveDelayed(self.id, self.committed))
        members = room.generation.members[: room.generation.layout.num_placed]
        writers = tuple(member.worker for member in members)
        if saves and self.id in writers:
            plan = SavePlan(Save(self.committed, room.generation.term, room.generation.number), writers)
            if first:
                self.send(SaveBegun(self.id, plan, 0.01))
            self.write(plan, writers.index(self.id))

    def write(self, plan: SavePlan, rank: int) -> None:
        """Its part of a checkpoint, behind training."""
        self.writing = True
        self.world.after(self.world.random.uniform(0.05, 2.0), lambda: self.wrote(plan, rank))

    def wrote(self, plan: SavePlan, rank: int) -> None:
        if not self.running:
            return
        self.writing = False
        error = "disk full" if self.world.random.random() < 0.03 else ""
        if not error:
            self.world.written[plan.save].add((rank, f"part {rank}"))
        self.last_part = PartSaved(self.id, plan, rank, f"part {rank}", error=error)
        self.send(self.last_part)

    def lose_peer(self, room: Room | None) -> None:
        if room is not None and self.room is room and self.running and self.in_collective:
            self.leave("peer", "connection reset by peer")

    def leave(self, cause: LeftCause, detail: str = "") -> None:
        room = self.room
        assert room is not None
        self.room, self.phase = None, "idle"
        self.send(self.protocol.leaves(cause, self.holds, self.world.now, detail))
        if cause not in ("pause", "complete") or self.world.random.random() < self.world.rude:
            room.breaks()
        self.next_command()

    # -------------------------------------------------------------------------------- reporting

    def send(self, message: Any) -> None:
        self.outbox.append(message)
        if not self.sending:
            self.sending = True
            self.world.after(self.world.delay(), self.deliver)

    def deliver(self) -> None:
        if not self.running:
            return
        recorded = self.world.receive(self.outbox[0])
        if recorded is None:
            self.world.after(0.2, self.deliver)
            return
        self.outbox.pop(0)
        self.protocol.heeds(Reply(recorded, self.protocol.term, known=recorded))
        self.sending = bool(self.outbox)
        if self.sending:
            self.world.after(self.world.delay(), self.deliver)

    def beat(self) -> None:
        if not self.alive:
            return
        if self.running and not self.outbox:
            generation = self.protocol.generation
            self.send(
                Heartbeat(
                    self.id, -1 if generation is None else generation.number, self.phase, self.committed,
                    self.committed, self.protocol.unknown(), gpu=self.gpu,
                )
            )  # fmt: skip
        self.world.after(HEARTBEAT_S, self.beat)


@dataclass
class Outcome:
    """How a history ended."""

    status: str
    reason: str
    digest: str | None
    at: float


@dataclass
class World:
    """The cluster, the clock, and one controller at a time."""

    seed: int
    config: ControllerConfig
    nodes: list[Node]
    checkpoint_every: int = 0
    copies: int = 2
    step_s: float = 0.5
    noise: float = 0.2
    """Step times are uniform within this share of their mean."""
    calibrate: Callable[[Worker], float] = lambda worker: 0.0
    transfer_s: float = 0.1
    start_s: tuple[float, float] = (0.5, 2.0)
    slow_news: float = 0.0
    rude: float = 0.0
    start_failures: float = 0.0
    cruel_end: float = 0.0
    quiet_from: float = 0.0
    now: float = 0.0
    outcome: Outcome | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    steps: list[StepReport] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    """What events.jsonl would hold: the records, and what steps came to."""
    workers: dict[WorkerId, Worker] = field(default_factory=dict)
    generations: dict[int, Generation] = field(default_factory=dict)
    checkpoints: dict[int, str] = field(default_factory=dict)
    valid_checkpoints: set[str] = field(default_factory=set)
    written: defaultdict[Save, set[tuple[int, str]]] = field(default_factory=lambda: defaultdict(set))
    cursed_steps: set[int] = field(default_factory=set)
    rollbacks: list[int] = field(default_factory=list)
    failures: list[tuple[WorkerId, float, int]] = field(default_factory=list)
    dealt_with: set[WorkerId] = field(default_factory=set)
    num_placed: int = 0
    num_disturbances: int = 0
    num_controllers: int = 0
    refused: int = 0
    trace: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._rooms: dict[tuple[int, int], Room] = {}
        self._pending: list[RequestWorker] = []
        self._watched: set[WorkerId] = set()
        self._channel_free: defaultdict[WorkerId, float] = defaultdict(float)
        self.controller: Controller | None = None
        self._deaf = False
        self._term = 0
        self._sends_left: int | None = None
        self._die_deciding = False
        self._asleep_until = 0.0
        self._num_faults = 0

    # -------------------------------------------------------------------------------- time

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._queue, (self.now + seconds, self._sequence, call))

    def run(self, until: float) -> None:
        """Moves on until the run is over or the time is `until`."""
        while self._queue and self.outcome is None and self._queue[0][0] <= until:
            self.now, _, call = heapq.heappop(self._queue)
            call()

    def jitter(self) -> float:
        return self.random.uniform(0.001, 0.03)

    def delay(self) -> float:
        if self.random.random() < self.slow_news:
            return self.random.uniform(0.1, 0.8)
        return 0.005

    # -------------------------------------------------------------------------------- the controller

    def begin(self) -> None:
        self.new_controller()
        self.after(TICK_S, self._tick)

    def _tick(self) -> None:
        self.handle(Tick())
        self.after(TICK_S, self._tick)

    def new_controller(self) -> None:
        """Starts a controller, the first or a successor, the way the Ray adapter does."""
        self._term += 1
        self.num_controllers += 1
        self.book = EventBook(self.events, map(asdict, self.steps))
        self.events += self.book.catch_up(self.now)
        self.events += self.book.record(event_with("controller", epoch=self._term, session="simulated"), self.now)
        if self._term == 1:
            started = event_with(
                "run_started", run="simulated", steps=self.config.total_steps, min_workers=self.config.min_workers
            )
            self.events += self.book.record(started, self.now)
        history = History.read(
            self.records,
            [{"seconds": r.seconds, "committed_at": r.committed_at, "grad_norm": r.grad_norm} for r in self.steps],
        )
        config = ControllerConfig(**{**self.config.__dict__, "term": self._term})
        self.controller = Controller(config, history, dict(self.checkpoints))
        self._deaf, self._sends_left, self._asleep_until = False, None, 0.0
        self._watched = set()
        if self._term == 1:
            self.handle(Start())
            return
        self._pending.clear()
        statuses, starting = [], []
        for worker in [w for w in self.workers.values() if w.alive]:
            status = worker.status(self._term) if worker.running and worker.warm else None
            if status is not None:
                statuses.append(status)
            elif worker.id not in history.warm:
                starting.append(Placed(worker.id, worker.node.name))
            else:
                self.end(worker, "killed by the restarted controller", quiet=True)
                continue
            self._watched.add(worker.id)
        self.handle(TakeOver(tuple(statuses), tuple(starting)))

    def lose_controller(self) -> None:
        """It dies: what it was told last and had not dealt with is lost, what it was about to say may be too."""
        if self.controller is None or self._deaf:
            return
        self._deaf = True
        self.after(self.random.choice([0.0, 0.02, 0.1]), self._controller_gone)

    def _controller_gone(self) -> None:
        self.controller = None
        self.after(self.random.uniform(0.2, 3.0), self.new_controller)

    def receive(self, message: Any) -> int | None:
        """A worker's message; the number of steps on record, or None when nobody answers."""
        if self.controller is None:
            return None
        if not self._deaf:
            self.handle(message)
        return len(self.steps)

    def handle(self, event: Event) -> None:
        controller = self.controller
        if controller is None or self._deaf or self.outcome is not None:
            return
        if self.now < self._asleep_until:
            self.after(
                self._asleep_until - self.now, lambda: self.handle(event) if self.controller is controller else None
            )
            return
        if self.trace is not None and not isinstance(event, Tick | Heartbeat):
            self.trace(f"{self.now:8.3f} {event}")
        actions = controller.handle(event, self.now)
        if self._die_deciding and any(isinstance(a, StartGeneration | Interrupt | Pause | Finalize) for a in actions):
            self._sends_left = self.random.choice([0, 1, 2])
        for action in actions:
            if self.trace is not None and not isinstance(action, StepCommitted):
                self.trace(f"         -> {action}")
            self.carry_out(action, controller)
        if self._sends_left is not None:
            self._die_deciding, self._deaf = False, True
            self._controller_gone()

    def die_deciding(self) -> None:
        """The controller dies with half of its next orders given; what it put on record stays."""
        self._die_deciding = True

    def sleep_controller(self, seconds: float) -> None:
        """The controller is not scheduled for a while; what is said to it meanwhile it hears when it wakes."""
        self._asleep_until = max(self._asleep_until, self.now + seconds)

    def _may_send(self) -> bool:
        if self._sends_left is None:
            return True
        self._sends_left -= 1
        return self._sends_left >= 0

    def carry_out(self, action: Action, controller: Controller) -> None:
        assert self.outcome is None, f"{action} after the end of the run"
        match action:
            case RunEvent():
                self.records.append(action.record({"time": self.now}))
                self.events += self.book.record(action, self.now)
            case StepCommitted(report):
                assert report.step == len(self.steps), f"step {report.step} put on record after {len(self.steps)} steps"
                self.steps.append(report)
                self.events += self.book.step(asdict(report), self.now)
            case Rollback(committed):
                self._check_rollback(committed, controller)
                self.rollbacks.append(len(self.steps) - committed)
                self.events += self.book.roll_back(committed, map(asdict, self.steps), self.now)
                del self.steps[committed:]
            case RequestWorker(worker):
                assert worker not in self.workers, f"{worker} is asked for twice"
                if not self._may_send():
                    return
                self._watched.add(worker)
                self._pending.append(action)
                self.after(self.jitter(), self.place)
            case ReleaseWorker(worker) | KillWorker(worker):
                if isinstance(action, ReleaseWorker):
                    self._check_release(worker)
                if worker in self.workers:
                    self.workers[worker].doomed = True
                if not self._may_send():
                    return
                self.dealt_with.add(worker)
                if any(request.worker == worker for request in self._pending):
                    self._pending = [request for request in self._pending if request.worker != worker]
                elif worker in self.workers:
                    process = self.workers[worker]
                    slow = isinstance(action, ReleaseWorker) and process.hung
                    self.after(5.0 if slow else 0.05, lambda: self.end(process, "left", news_s=0.1))
            case StartGeneration(generation):
                known = self.generations.setdefault(generation.number, generation)
                assert known is generation, f"generation {generation.number} is made twice"
                if generation.collect and self.random.random() < self.cruel_end:
                    self._disturb_the_end(tuple(member.worker for member in generation.members))
                for recipient in action.recipients:
                    self._send(recipient, action)
            case Order():
                if isinstance(action, Finalize) and self.random.random() < self.cruel_end:
                    self._disturb_the_end(action.workers)
                for recipient in action.recipients:
                    self._send(recipient, action.sent())
            case Finish(status, reason, digest):
                self.outcome = Outcome(status, reason, digest, self.now)
                self.events += self.book.record(RunFinished(status=status, reason=reason), self.now)
                if status == "finished":
                    failed = any(record["kind"] == "checkpoint_failed" for record in self.records)
                    assert failed or self.config.total_steps in controller.checkpoints, "the end was not saved"

    def _send(self, worker: WorkerId, action: Order) -> None:
        """Orders reach each worker in order, but not all workers at the same time, and also after their sender died."""
        if not self._may_send():
            return
        term = self._term
        at = max(self._channel_free[worker], self.now + self.delay())
        self._channel_free[worker] = at
        target = self.workers[worker]
        self.after(at - self.now, lambda: target.take(action, term))

    @property
    def whole(self) -> Spans:
        return whole(ELEMENTS, self.config.tensor)

    def check_layout(self, generation: Generation) -> None:
        """Units are whole and share a node, and what is idle stays idle."""
        layout, tensor = generation.layout, self.config.tensor
        assert layout.world_size == len(generation.members) == len(generation.held)
        if generation.collect:
            return
        assert layout.tensor == tensor
        for rank in range(0, layout.num_placed, tensor):
            unit = generation.members[rank : rank + tensor]
            slots = [member.worker.slot for member in unit]
            assert slots == list(range(slots[0], slots[0] + tensor)), f"{slots} are no unit"
            assert slots[0] % tensor == 0, f"{slots} are no unit"
            assert len({member.node for member in unit}) == 1, f"{unit} do not share a node"

    def newest_state(self, workers: Iterable[Worker]) -> int:
        """The most steps that these have all parts of the state of. What one has committed will be on record."""
        living = [w for w in workers if w.running and w.warm and not w.doomed]
        recorded = max([len(self.steps), *(w.committed for w in living if w.protocol.reports)])
        for committed in sorted({w.committed for w in living} | {recorded}, reverse=True):
            held = [
                w.held
                for w in living
                if w.committed == committed or (committed == recorded and w.prepared and w.committed == committed - 1)
            ]
            if 0 < committed <= recorded and held and not subtract(self.whole, union(*held)):
                return committed
        return 0

    def _check_rollback(self, committed: int, controller: Controller) -> None:
        newest = self.newest_state(self.workers.values())
        assert newest <= committed, f"back to {committed}, but all parts of {newest} are held (I2)"
        for step, path in controller.checkpoints.items():
            if step <= len(self.steps) and path in self.valid_checkpoints:
                assert step <= committed, f"back to {committed}, but {path} is valid (I2)"

    def _check_release(self, worker: WorkerId) -> None:
        leaving = self.workers.get(worker)
        if leaving is not None and not leaving.doomed:
            rest = [other for other in self.workers.values() if other is not leaving]
            with_it, without = self.newest_state(self.workers.values()), self.newest_state(rest)
            assert with_it == without, f"{worker} is let go with what nobody else has of step {with_it} (I2)"

    # -------------------------------------------------------------------------------- the cluster

    def place(self) -> None:
        """Gives waiting workers whatever room there is. A unit is placed as one, and keeps its place while any of its
        workers lives."""
        tensor = self.config.tensor
        for request in list(self._pending):
            worker = request.worker
            unit = worker.slot // tensor
            node = self._unit_nodes().get(unit)
            if node is None:
                free = [node for node in self.nodes if self._has_room(node)]
                elsewhere = [node for node in free if node.name not in request.avoid]
                node = next(iter(elsewhere if elsewhere or request.must_avoid else free), None)
            elif sum(1 for w in self.workers.values() if w.alive and w.id.slot // tensor == unit) >= tensor:
                continue
            if node is not None and not node.gone:
                self._pending.remove(request)
                self._start(worker, node)

    def _unit_nodes(self) -> dict[int, Node]:
        return {w.id.slot // self.config.tensor: w.node for w in self.workers.values() if w.alive}

    def _has_room(self, node: Node) -> bool:
        tensor = self.config.tensor
        if node.draining or node.gone:
            return False
        if tensor == 1:
            taken = sum(1 for worker in self.workers.values() if worker.alive and worker.node is node)
        else:
            taken = tensor * sum(1 for placed in self._unit_nodes().values() if placed is node)
        return taken + tensor <= node.places

    def _start(self, worker_id: WorkerId, node: Node) -> None:
        worker = self.workers[worker_id] = Worker(self, worker_id, node)
        self.num_placed += 1
        self.after(self.jitter(), lambda: self.handle(Placed(worker_id, node.name)))
        if self.now < self.quiet_from and self.random.random() < self.start_failures:
            self.after(self.random.uniform(0.1, 1.0), lambda: self.end(worker, "could not be built"))
        else:
            self.after(self.random.uniform(*self.start_s), lambda: self._warm(worker))

    def _warm(self, worker: Worker) -> None:
        if worker.alive:
            worker.warm = True
            worker.send(worker.ready())
            self.after(self.random.uniform(0, HEARTBEAT_S), worker.beat)

    def end(
        self, worker: Worker, detail: str, *, node_lost: bool = False, quiet: bool = False, news_s: float | None = None
    ) -> None:
        """A process is gone; its controller hears of it after a while (unless `quiet`)."""
        if not worker.alive:
            return
        worker.alive = False
        room, worker.room = worker.room, None
        if room is not None:
            self.note_failure(worker, room)
            room.breaks()
        if news_s is None:
            news_s = self.random.uniform(0.01, 0.3) if self.random.random() > self.slow_news else 4.0
        if not quiet:
            self.after(news_s, lambda: self._hear_of_death(Died(worker.id, detail, node_lost)))
        self.after(0.05, self.place)

    def _hear_of_death(self, event: Died) -> None:
        if event.worker in self._watched:
            self.handle(event)

    def complete(self, worker: Worker, order: CommitCheckpoint) -> None:
        """All parts of a checkpoint are there, and so it becomes one."""
        if not worker.running:
            return
        path = f"step-{order.save.committed:08d}"
        if path not in self.checkpoints.values():
            whole = self.written[order.save] == set(order.parts)
            # A successor hears of parts again that its predecessor had discarded.
            assert whole or self.num_controllers > 1, f"{order} of {self.written[order.save]}"
            if not whole or self.random.random() < 0.03:
                worker.send(CheckpointSaved(worker.id, order.save, path, error="a part is missing"))
                return
        self.checkpoints[order.save.committed] = path
        self.valid_checkpoints.add(path)
        worker.send(CheckpointSaved(worker.id, order.save, path))

    def room(self, generation: Generation) -> Room:
        key = (generation.term, generation.number)
        if key not in self._rooms:
            self._rooms[key] = Room(self, generation)
        return self._rooms[key]

    def digest_of(self, worker: Worker) -> str:
        return str(worker.committed)

    # -------------------------------------------------------------------------------- faults

    def note_failure(self, worker: Worker, room: Room | None = None) -> None:
        """A worker failed inside its generation: an incident is due."""
        inside = room or worker.room
        if inside is not None and not worker.doomed:
            self.failures.append((worker.id, self.now, inside.generation.number))

    def members(self) -> list[Worker]:
        """Living workers inside a generation, by their own account."""
        return [worker for worker in self.workers.values() if worker.running and worker.room is not None]

    def kill(self, worker: Worker, *, node_lost: bool = False) -> None:
        self.end(worker, "SIGKILL", node_lost=node_lost)

    def hang(self, worker: Worker) -> None:
        if worker.running:
            self.note_failure(worker)
            worker.hung = True

    def lose_node(self, node: Node) -> None:
        node.gone = True
        for worker in list(self.workers.values()):
            if worker.alive and worker.node is node:
                self.end(worker, "the node is gone", node_lost=True)

    def drain(self, node: Node, seconds: float) -> None:
        node.draining = True
        workers = tuple(w.id for w in self.workers.values() if w.alive and w.node is node)
        self.handle(DrainNotice(workers, "spot", self.now + seconds))
        self.after(seconds, lambda: self.lose_node(node))

    def restore_capacity(self, places: int) -> None:
        """Makes room for a number of workers."""
        tensor = self.config.tensor
        have = sum(node.places // tensor * tensor for node in self.nodes if not node.gone and not node.draining)
        if have < places:
            self.nodes.append(Node(f"late-{len(self.nodes)}", places - have + tensor - 1))
        self.place()

    def announce_fault(self, worker: Worker) -> None:
        """An injected fault is on record before it happens."""
        self._num_faults += 1
        self.handle(FaultFired(worker.id, self._num_faults, self.now))

    def _disturb_the_end(self, workers: tuple[WorkerId, ...]) -> None:
        self.cruel_end /= 2
        self.num_disturbances += 1
        kind = self.random.choice(["all die", "one dies", "one hangs", "one is mute"])
        for worker in workers if kind == "all die" else workers[:1]:
            process = self.workers[worker]
            match kind:
                case "all die" | "one dies":
                    self.after(self.jitter(), lambda process=process: self.kill(process))
                case "one hangs":
                    self.hang(process)
                case "one is mute":
                    process.mute = True

    def resize(self, workers: int) -> None:
        self.handle(Resize(workers))

    def stop(self) -> None:
        self.handle(Stop("stop requested"))

    @property
    def training(self) -> bool:
        return self.controller is not None and self.controller.state is RunState.RUNNING
