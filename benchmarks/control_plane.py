"""What the controller's decisions cost with 64 to 10,000 workers: the state machine of production, without Ray.

Workers are simulated as far as the controller hears of them: 8 on a node, with the messages that
`orchestrator.training.worker` sends, answered in order. Only the time inside `Controller.handle` counts, in
processor seconds, as it waits for nothing; the clock of the run is made up.

changes  a membership change is three things: the first news of it until members are told (Interrupt or Pause), what
         they say as they leave, and the last of that until StartGeneration. The sum of all three is what a run waits
         for the controller (goals: 50 ms with 1,024 workers, 500 ms with 10,000)
starts   of a run: asking for workers, until all are placed and warm and the first generation starts, until all have
         joined; and a restarted controller that reads the record and takes over the workers
stream   every worker's heartbeat once a second, four ticks a second, a step a second that rank 0 reports with what
         every rank spent on it: events per second of the controller's time, how much of each second of the run it is
         busy, and the longest that one event took (goal 10,000 events a second)
memory   what the controller itself keeps, once all have joined

    python benchmarks/control_plane.py [--workers 64,1024,4096,10000] [--layouts replicated,optimizer-tp8]
                                       [--rounds 5] [--seconds 8] [--only changes,starts,stream,memory]
                                       [--profile] [--json]

Layouts: `replicated`; `optimizer-tp8` (tensor 8, optimizer state sharded, two copies in memory); `parameters-tp8` (the
same with parameters sharded as FSDP2 does, so hundreds of ranges at every worker); `pipeline-8` (eight stages, which
have replicas). State is that of a Llama of 7 billion parameters.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

from monitoring.events import RunEvent
from orchestrator.control.core.config import ScalingRules
from orchestrator.control.core.protocol import (
    Died,
    DrainNotice,
    KillWorker,
    Placed,
    ReleaseWorker,
    RequestWorker,
    Resize,
    Start,
    Tick,
)
from orchestrator.control.core.workers import WorkerId
from orchestrator.control.training.controller import Controller
from orchestrator.control.training.history import History
from orchestrator.control.training.protocol import Action, Event, TakeOver
from orchestrator.control.training.views import ControllerConfig, RunState
from orchestrator.models.costs import Block, ModelCosts
from orchestrator.planning.choose import LayoutChooser
from orchestrator.planning.work import StepSettings
from orchestrator.training.messages import Generation, Heartbeat, Joined, Left, LeftCause, Ready, Status, StepReport
from orchestrator.training.orders import Interrupt, Pause, StartGeneration
from strategies.layout.parallel import ParallelLayout
from strategies.layout.statemap import NOTHING, Span, Spans, union, whole
from strategies.update.timing import RankTimes

LAYOUTS = ("replicated", "optimizer-tp8", "parameters-tp8", "pipeline-8")
CHANGES = ("death", "node lost", "growth by a node", "drain of a node", "shrink by an eighth", "growth by an eighth")
PER_NODE = 8
TICK_S = 0.25
HIDDEN, INNER, LAYERS, VOCABULARY = 4096, 11008, 32, 32000
SHAPES = (
    [(VOCABULARY, HIDDEN)]
    + LAYERS * ([(HIDDEN, HIDDEN)] * 4 + [(INNER, HIDDEN)] * 2 + [(HIDDEN, INNER)] + [(HIDDEN,)] * 2)
    + [(HIDDEN,), (VOCABULARY, HIDDEN)]
)
"""Of the parameters of a Llama of 7 billion, in model order."""


def elements(tensor: int) -> int:
    """Of the state of a tensor-parallel coordinate: matrices are split, vectors are not."""
    return sum(shape[0] * shape[1] // tensor if len(shape) == 2 else shape[0] for shape in SHAPES)


@cache
def model_costs() -> ModelCosts:
    table, layer = VOCABULARY * HIDDEN, 4 * HIDDEN**2 + 3 * HIDDEN * INNER + 2 * HIDDEN

    def block(name: str, parameters: int) -> Block:
        return Block(name, parameters, 2 * HIDDEN, 2 * parameters, 4 * HIDDEN, 34 * HIDDEN, 0)

    layers = (block(f"layer {index}", layer) for index in range(LAYERS))
    return ModelCosts(
        blocks=(block("embedding", table), *layers, block("head", table)), tied=0, hidden_size=HIDDEN,
        vocab_size=VOCABULARY, heads=32, key_value_heads=32, value_bytes=2,
    )  # fmt: skip


def chooser_of(name: str, workers: int) -> LayoutChooser:
    tensor = 8 if name.endswith("tp8") else 1
    pipeline = 8 if name == "pipeline-8" else 1
    shard = name.removesuffix("-tp8") if tensor == 8 else "none"
    return LayoutChooser(
        tensor, pipeline, shard, "1f1b", workers, StepSettings(workers // tensor, micro_batches=16, tokens=4096)
    )


def held_by_rank(layout: ParallelLayout) -> list[Spans]:
    """What each rank has of the state, beside its own share that of the replica before it: two copies of all."""
    size, data = elements(layout.tensor), layout.data
    if layout.pipeline > 1:
        bounds = [size * stage // layout.pipeline for stage in range(layout.pipeline + 1)]
        stages = [union([Span(0, bounds[stage], bounds[stage + 1])]) for stage in range(layout.pipeline)]
        found = [stages[rank % layout.pipeline] for rank in range(layout.num_placed)]
    elif layout.shard == "none" or data == 1:
        found = [whole(size, layout.tensor)] * layout.num_placed
    else:
        ranges = _rows if layout.shard == "parameters" else _even
        own = [ranges(layout.tensor, data, replica) for replica in range(data)]
        both = [union(own[replica], own[replica - 1]) for replica in range(data)]
        found = [
            union(Span(coordinate, start, stop) for _, start, stop in both[replica])
            for replica in range(data)
            for coordinate in range(layout.tensor)
        ]
    return [*found, *[NOTHING] * layout.spares]


def _even(tensor: int, data: int, replica: int) -> Spans:
    size = elements(tensor)
    return union([Span(0, size * replica // data, size * (replica + 1) // data)])


def _rows(tensor: int, data: int, replica: int) -> Spans:
    """Of every parameter the rows of its chunk, as FSDP2 shards; see `strategies.layout.placement.row_ranges`."""
    spans, offset = [], 0
    for shape in SHAPES:
        width = shape[1] // tensor if len(shape) == 2 else 1
        chunk = -(-shape[0] // data)
        first, last = min(shape[0], chunk * replica), min(shape[0], chunk * (replica + 1))
        if first < last:
            spans.append(Span(0, offset + first * width, offset + last * width))
        offset += shape[0] * width
    return union(spans)


class Fleet:
    """A controller, its made-up clock, and workers that say what real ones would. `spent_s` is the time inside the
    controller since it was last set to 0, by a clock that tests may replace by a count of operations."""

    def __init__(self, layout: str, workers: int, clock: Callable[[], float] = time.thread_time) -> None:
        self.clock = clock
        chooser = chooser_of(layout, workers)
        self.config = ControllerConfig(
            total_steps=1_000_000, chooser=chooser, min_workers=1, max_workers=workers,
            scaling=ScalingRules(settle_s=0.0),
        )  # fmt: skip
        self.costs = model_costs() if chooser.pipeline > 1 else None
        self.controller = Controller(self.config)
        self.now = 1_000_000.0
        self.spent_s = self.longest_s = 0.0
        self.requested: list[WorkerId] = []
        self.records: list[RunEvent] = []
        self.told: list[Action] = []
        self.held: dict[WorkerId, Spans] = {}
        self.random = random.Random(0)

    # ------------------------------------------------------------------------------------ one event

    def tell(self, event: Event, after_s: float = 0.0) -> list[Action]:
        self.now += after_s
        started = self.clock()
        actions = self.controller.handle(event, self.now)
        took = self.clock() - started
        self.spent_s += took
        self.longest_s = max(self.longest_s, took)
        for action in actions:
            match action:
                case RequestWorker(worker):
                    self.requested.append(worker)
                case RunEvent():
                    self.records.append(action)
                case StartGeneration(generation):
                    layout = generation.layout
                    spans = held_by_rank(layout)
                    self.held = {m.worker: held for m, held in zip(generation.members, spans, strict=True)}
                case ReleaseWorker(worker) | KillWorker(worker):
                    if worker in self.requested:
                        self.requested.remove(worker)
        self.told += actions
        return actions

    @contextmanager
    def timed(self) -> Iterator[list[float]]:
        """Seconds inside the controller, in a list of one when the block is through."""
        before, found = self.spent_s, [0.0]
        self.told.clear()
        yield found
        found[0] = self.spent_s - before

    def heard(self, kind: type[Any]) -> Any:
        """The one action of this kind since `timed` began."""
        found = [action for action in self.told if isinstance(action, kind)]
        if len(found) != 1:
            raise SystemExit(f"{len(found)} {kind.__name__} were given, and not one")
        return found[0]

    @property
    def generation(self) -> Generation:
        assert self.controller.generation is not None
        return self.controller.generation

    @property
    def members(self) -> list[WorkerId]:
        return [member.worker for member in self.generation.members]

    def on_node_of(self, worker: WorkerId) -> list[WorkerId]:
        """The members that share its node."""
        return [m.worker for m in self.generation.members if node_of(m.worker) == node_of(worker)]

    # ------------------------------------------------------------------------------------ what workers say

    def ready_message(self, worker: WorkerId) -> Ready:
        return Ready(
            worker, node_of(worker), 1000 + worker.slot, f"10.0.{worker.slot >> 8}.{worker.slot & 255}", 7000,
            "initial", elements(self.config.tensor), zone=f"zone-{worker.slot // 1024}", memory_bytes=80 << 30,
            costs=self.costs, unit_seconds=0.01,
        )  # fmt: skip

    def come(self) -> None:
        """All workers that were asked for are placed and warm."""
        coming, self.requested = self.requested, []
        for worker in coming:
            self.tell(Placed(worker, node_of(worker)))
        for worker in coming:
            self.tell(self.ready_message(worker), 1e-5)

    def join(self) -> None:
        number = self.generation.number
        for worker in self.members:
            self.tell(Joined(worker, number, 1000, 1000), 1e-5)
        if self.controller.state not in (RunState.RUNNING, RunState.SETTLING):
            raise SystemExit(f"all have joined, and the run is {self.controller.state.value}")

    def leave(self, workers: Iterable[WorkerId], cause: LeftCause) -> None:
        number, committed = self.generation.number, self.controller.progress.committed
        for worker in workers:
            self.tell(Left(worker, number, cause, committed, self.held[worker], at=self.now), 1e-5)

    def step(self) -> StepReport:
        """The step that is due, as rank 0 reports it."""
        generation = self.generation
        layout, step = generation.layout, self.controller.progress.committed
        ranks = []
        for rank in range(layout.world_size):
            place = layout.place(rank)
            held = 0 if place is None else len(layout.assignment[place.data])
            busy = tuple(self.random.uniform(0.88, 0.92) for _ in range(held))
            ranks.append(RankTimes(busy, 0.01, 0.05, 0.01, float(held), 65536 * held, 0))
        return StepReport(
            step, generation.number, 2.5, 1.0, 1e-4, 4_000_000, "sha256:" + 64 * "0", False, self.now, 1.0,
            ranks=tuple(ranks),
        )  # fmt: skip

    def train(self, seconds: int) -> int:
        """`seconds` of the run go by, with a step in each; the number of events."""
        count = 0
        members = self.members
        for _ in range(seconds):
            number, committed = self.generation.number, self.controller.progress.committed
            report = self.step()
            beats = [
                Heartbeat(worker, number, "compute", committed + 1, committed + 1, (report,) if rank == 0 else (),
                          3 << 30, committed * 100 + rank % 7, 60 << 30)
                for rank, worker in enumerate(members)
            ]  # fmt: skip
            self.random.shuffle(beats)
            quarter = -(-len(beats) // 4)
            for first in range(0, len(beats), quarter):
                for beat in beats[first : first + quarter]:
                    self.tell(beat)
                self.tell(Tick(), TICK_S)
            count += len(beats) + 4
            if self.controller.progress.committed != committed + 1:
                raise SystemExit("the step was not committed")
        return count


def node_of(worker: WorkerId) -> str:
    return f"node-{worker.slot // PER_NODE:05d}"


# ------------------------------------------------------------------------------------ membership changes


def started(layout: str, workers: int, clock: Callable[[], float] = time.thread_time) -> tuple[Fleet, dict[str, float]]:
    """A run that trains with all its workers, and what its start took."""
    fleet = Fleet(layout, workers, clock)
    with fleet.timed() as asked:
        fleet.tell(Start())
    with fleet.timed() as warm:
        fleet.come()
        fleet.heard(StartGeneration)
    with fleet.timed() as joined:
        fleet.join()
    if len(fleet.members) != workers:
        raise SystemExit(f"{len(fleet.members)} of {workers} workers train")
    fleet.train(3)
    return fleet, {"start: asked": asked[0], "start: warm": warm[0], "start: joined": joined[0]}


def changed(
    fleet: Fleet, begin: Callable[[], object], told: type[Interrupt | Pause], cause: LeftCause, workers: int
) -> list[float]:
    """Seconds of the three parts of a membership change that `begin` brings about. About `workers` train after it: the
    planner may find that a few more would only slow them down."""
    with fleet.timed() as news:
        begin()
    # Who stands by in the generation goes on saying so; only those told are in it.
    inside = [worker for worker in fleet.heard(told).workers if fleet.controller.workers[worker].alive]
    with fleet.timed() as leaving:
        fleet.leave(inside[:-1], cause)
    with fleet.timed() as last:
        fleet.leave(inside[-1:], cause)
        fleet.heard(StartGeneration)
    fleet.join()
    # Who came along to hand over its state has done so, and those that train go on without it.
    while fleet.controller.state is RunState.SETTLING:
        order = [action for action in fleet.told if isinstance(action, Pause)][-1]
        fleet.leave(order.workers, "pause")
        fleet.join()
    trains = fleet.generation.layout.num_placed
    if not 0.9 * workers <= trains <= workers or fleet.generation.restore is not None:
        raise SystemExit(f"{trains} workers train, and not {workers}")
    fleet.train(2)
    return [news[0], leaving[0], last[0]]


def lose(fleet: Fleet, workers: Sequence[WorkerId], *, node: bool) -> None:
    for worker in workers:
        fleet.tell(Died(worker, "SIGKILL", node), 1e-5)


def changes(
    layout: str, workers: int, rounds: int, clock: Callable[[], float] = time.thread_time
) -> dict[str, list[list[float]]]:
    """The parts of every kind of change, round by round."""
    fleet, _ = started(layout, workers, clock)
    group = fleet.config.tensor * fleet.generation.layout.pipeline
    found: dict[str, list[list[float]]] = {kind: [] for kind in CHANGES}

    def grow(kind: str | None) -> None:
        took = changed(fleet, fleet.come, Pause, "pause", workers)
        if kind is not None:
            found[kind].append(took)

    for number in range(rounds):
        some = fleet.members[fleet.random.randrange(workers)]
        begin = partial(lose, fleet, [some], node=False)
        found["death"].append(changed(fleet, begin, Interrupt, "peer", workers - group))
        grow(None)
        node = fleet.on_node_of(fleet.members[fleet.random.randrange(workers)])
        begin = partial(lose, fleet, node, node=True)
        found["node lost"].append(changed(fleet, begin, Interrupt, "peer", workers - max(group, PER_NODE)))
        grow("growth by a node")
        node = fleet.on_node_of(fleet.members[fleet.random.randrange(workers)])
        notice = DrainNotice(tuple(node), "spot", fleet.now + 120.0)
        begin = partial(fleet.tell, notice)
        found["drain of a node"].append(changed(fleet, begin, Pause, "pause", workers - max(group, PER_NODE)))
        grow(None)
        fewer = workers - workers // 8
        begin = partial(fleet.tell, Resize(fewer))
        found["shrink by an eighth"].append(changed(fleet, begin, Pause, "pause", fewer))
        fleet.tell(Resize(workers))
        grow("growth by an eighth")
        print(f"  {layout}, {workers:,} workers: round {number + 1} of {rounds}", file=sys.stderr)
    return found


def starts(layout: str, workers: int, rounds: int) -> dict[str, list[float]]:
    """What a start and a takeover take, each part in seconds."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        fleet, took = started(layout, workers)
        events = [event_of(record) for record in fleet.records]
        steps = [{"seconds": 1.0, "grad_norm": 1.0, "committed_at": fleet.now}] * fleet.controller.progress.committed
        generation, committed = fleet.generation, fleet.controller.progress.committed
        statuses = [
            Status(fleet.ready_message(worker), generation, None, committed, fleet.held[worker], False, True, 1)
            for worker in fleet.members
        ]
        begun = time.thread_time()
        history = History.read(events, steps)
        took["history read"] = time.thread_time() - begun
        successor = Fleet(layout, workers)
        successor.controller = Controller(replace(fleet.config, term=1), history)
        successor.now = fleet.now + 3.0
        successor.tell(TakeOver(tuple(statuses)))
        took["takeover"] = successor.spent_s
        if successor.controller.state is not RunState.RUNNING or successor.requested:
            raise SystemExit(f"after the takeover the run is {successor.controller.state.value}")
        for part, seconds in took.items():
            found.setdefault(part, []).append(seconds)
    return found


def event_of(event: RunEvent) -> dict[str, Any]:
    """As it comes back from events.jsonl."""
    back: dict[str, Any] = json.loads(json.dumps(event.record({})))
    return back


def stream(layout: str, workers: int, seconds: int) -> dict[str, float]:
    """Events per second of the controller's time, and what one second of the run takes it."""
    fleet, _ = started(layout, workers)
    fleet.train(2)
    fleet.spent_s = fleet.longest_s = 0.0
    count = fleet.train(seconds)
    if fleet.controller.state is not RunState.RUNNING:
        raise SystemExit(f"the run is {fleet.controller.state.value}")
    return {"events_per_s": count / fleet.spent_s, "busy": fleet.spent_s / seconds, "longest_s": fleet.longest_s}


def memory_bytes(layout: str, workers: int) -> int:
    """What the controller keeps for itself: what is free when it is gone."""
    tracemalloc.start()
    fleet, _ = started(layout, workers)
    fleet.told.clear()
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    fleet.controller = None  # type: ignore[assignment]
    gc.collect()
    freed = before - tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return freed


# ------------------------------------------------------------------------------------ what is printed


def show(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 10 else f"{milliseconds:.2f}"


def table(rows: Iterable[Sequence[str]]) -> None:
    lines = [list(row) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        cells = [cell.ljust(width) if not column else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(line, widths, strict=True))]  # fmt: skip
        print("  " + "  ".join(cells).rstrip())


def spread(values: Sequence[float]) -> list[str]:
    return [show(1e3 * each) for each in (min(values), statistics.median(values), max(values))]


def measure(layout: str, workers: int, options: argparse.Namespace) -> dict[str, Any]:
    wanted = options.only.split(",")
    found: dict[str, Any] = {"layout": layout, "workers": workers}
    print(f"{layout}, {workers:,} workers")
    if "changes" in wanted:
        found["changes"] = changes(layout, workers, options.rounds)
        rows = [["ms", "min", "median", "max", "news", "leaving", "last of it"]]
        for kind, took in found["changes"].items():
            parts = [show(1e3 * statistics.median(part)) for part in zip(*took, strict=True)]
            rows.append([kind, *spread([sum(parts) for parts in took]), *parts])
        table(rows)
    if "starts" in wanted:
        found["starts"] = starts(layout, workers, min(3, options.rounds))
        rows = [["ms", "min", "median", "max"], *([part, *spread(took)] for part, took in found["starts"].items())]
        table(rows)
    if "stream" in wanted:
        found["stream"] = stream(layout, workers, options.seconds)
        took = found["stream"]
        print(f"  {took['events_per_s']:,.0f} events/s; busy for {took['busy']:.1%} of the time, one event took "
              f"{show(1e3 * took['longest_s'])} ms at most")  # fmt: skip
    if "memory" in wanted:
        found["memory_bytes"] = memory_bytes(layout, workers)
        print(f"  {found['memory_bytes'] / 1e6:,.1f} MB, {found['memory_bytes'] / workers / 1e3:.1f} kB a worker")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="64,1024,4096,10000")
    parser.add_argument("--layouts", default="replicated,optimizer-tp8", help=f"of {', '.join(LAYOUTS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--only", default="changes,starts,stream,memory")
    parser.add_argument("--profile", action="store_true", help="where the time goes, instead of how much it is")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.layouts.split(",")) - set(LAYOUTS):
        parser.error(f"unknown layout {', '.join(sorted(unknown))}; known are {', '.join(LAYOUTS)}")
    counts = [int(each) for each in options.workers.split(",")]
    if any(count < 64 or count % 8 for count in counts):
        parser.error("--workers must be multiples of 8, 64 or more")
    profile = cProfile.Profile()
    if options.profile:
        profile.enable()
    found = [measure(layout, count, options) for count in counts for layout in options.layouts.split(",")]
    if options.profile:
        profile.disable()
        pstats.Stats(profile).sort_stats("cumulative").print_stats(60)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
