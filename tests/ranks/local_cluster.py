"""A cluster without Ray: real workers in forked processes, and the real controller in this one.

`LocalCluster` turns the controller's actions into pipe messages, signals and forks, and turns messages and deaths
into its events. Only Ray is missing: whatever a test sees here is what the state machine, the workers and the
collectives do.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monitoring.events import RunEvent
from orchestrator.control.core.orders import Leave, Order
from orchestrator.control.core.protocol import (
    Died,
    DrainNotice,
    FaultFired,
    Finish,
    KillWorker,
    Placed,
    ReleaseWorker,
    RequestWorker,
    Start,
    Tick,
)
from orchestrator.control.core.workers import WorkerId, WorkerState
from orchestrator.control.training.controller import Controller
from orchestrator.control.training.protocol import Action, Event, Rollback, StepCommitted
from orchestrator.control.training.views import ControllerConfig, RunState
from orchestrator.data.of_job import dataset_of, held_out_of, open_stores, prepare_held_out, prepare_stores
from orchestrator.job import Job
from orchestrator.planning.choose import LayoutChooser
from orchestrator.runtime.run_log import recovery_entry
from orchestrator.training.messages import Generation, Joined, Ready, Reply, StepReport
from orchestrator.training.orders import StartGeneration
from tests.ranks.local_ranks import HOST, SECRET, context, prepare_child

if TYPE_CHECKING:
    from strategies.trial.trial import Trial

TICK_S = 0.05
NODE = "local"

JOB = """
name: tiny
model: {model}
data: {{source: {source}, tokenizer: bytes, sequence_length: 32, cache: {cache}}}
train:
  steps: 8
  global_batch: 8
  optimizer: {{lr: 3.0e-3}}
  schedule: {{warmup_steps: 2}}
  seed: 5
elastic:
  workers: {{min: 1, max: 3}}
  virtual_workers: 8
  heartbeat_interval_s: 0.1
  heartbeat_timeout_s: 1.0
  scaling: {{settle_s: 0}}
  progress_timeout_s: 5.0
  lease_s: 20.0
monitoring: {{peak_tflops: 0.1}}
"""


OWN = "{factory: tests.small_models:own, args: {dropout: 0.1, vocabulary: 258, layers: 2}}"
"""A model of a factory, with dropout: a step of it takes a third of the time of a Llama's."""
LLAMA = (
    "{hf: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 2, max_position_embeddings: 64, vocab_size: 320, attention_dropout: 0.1}}"
)


def tiny_job(directory: Path, model: str = OWN) -> str:
    """The text of a job that trains a tiny model on a text file made in `directory`."""
    text = directory / "data.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}, and so on. " for n in range(400)))
    return JOB.format(model=model, source=text, cache=directory / "cache")


Hook = Callable[[Any], None]
"""Called in every worker's process with its `Worker` before it starts; a module-level function or a partial of one."""


@dataclass(frozen=True)
class Go:
    """A step that was held may begin."""

    step: int


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker's process is told."""

    worker: WorkerId
    job: Job
    directory: Path
    stores: tuple[tuple[Path, str, tuple[()]], ...]
    held_out: tuple[tuple[Path, str, tuple[()]], ...]
    hooks: tuple[Hook, ...]
    held_steps: tuple[int, ...]
    first: Callable[[], None] | None


@dataclass
class Outcome:
    """What a run was. `steps` are the committed ones, `moved` the bytes of state that each worker received
    for a generation, `exits` the codes of those that were there at the end."""

    status: str
    reason: str
    digest: str | None
    steps: list[StepReport]
    recoveries: list[dict[str, Any]]
    generations: list[Generation]
    pids: dict[WorkerId, int]
    records: list[tuple[str, dict[str, Any]]]
    rollbacks: list[int]
    moved: dict[tuple[int, WorkerId], int]
    exits: dict[WorkerId, int | None] = field(default_factory=dict)

    @property
    def losses(self) -> list[float]:
        return [report.loss for report in self.steps]

    @property
    def samples(self) -> list[str]:
        return [report.samples for report in self.steps]

    @property
    def grad_norms(self) -> list[float]:
        return [report.grad_norm for report in self.steps]

    @property
    def steps_lost(self) -> int:
        return sum(recovery["steps_lost"] for recovery in self.recoveries)

    @property
    def sizes(self) -> list[int]:
        return [len(generation.members) for generation in self.generations]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The fields of every record of a kind."""
        return [fields for found, fields in self.records if found == kind]

    def members(self, index: int) -> dict[WorkerId, int]:
        """The pids of the members of the generation at `index`."""
        return {member.worker: member.pid for member in self.generations[index].members}


class _Process:
    """A worker's process as the parent sees it."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.worker = spec.worker
        self.reports, child_reports = context().Pipe()
        self.commands, child_commands = context().Pipe()
        self.process = context().Process(target=_worker_main, args=(spec, child_reports, child_commands), daemon=True)
        self.process.start()
        child_reports.close()
        child_commands.close()
        self.is_gone = False

    def tell(self, order: Order | Go, term: int) -> None:
        with contextlib.suppress(OSError):
            self.commands.send((order, term))

    def kill(self) -> None:
        if self.process.exitcode is None and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGKILL)


def settled(step: int, cluster: LocalCluster) -> bool:
    """Whether the checkpoint of a step was made or failed, so that the next one need not wait for it. Also when it was
    put off, as the one before it was still being written, and will not be made before the next step."""
    ended = {
        fields["committed"] for kind, fields in cluster.records if kind in ("checkpoint_saved", "checkpoint_failed")
    }
    put_off = {fields["committed"] for kind, fields in cluster.records if kind == "checkpoint_delayed"}
    return step in ended or any(late <= step and not ended & {*range(late, step)} for late in put_off)


def on_record(steps: int, saved: int, cluster: LocalCluster) -> bool:
    """Whether `steps` are on record, and the checkpoint of `saved` steps is complete."""
    return cluster.committed == steps and saved in cluster.controller.checkpoints


ONE_BY_ONE = {3: partial(settled, 2), 5: partial(settled, 4), 7: partial(settled, 6)}
"""Every second step is saved, however slow this machine is."""


class LocalCluster:
    """One run of a job. `holds` keeps every rank at the start of a step until a condition on this cluster is true;
    each pair of `script` is an action taken once, as soon as its condition is true. Workers are ready one by one, or
    with `all_ready_at_once` when no other is on its way, so that a run grows in one step. `first` is called in
    a worker's process before anything else."""

    def __init__(
        self,
        job_text: str,
        directory: Path,
        *,
        faults: Sequence[str] = (),
        overrides: Sequence[str] = (),
        hooks: Sequence[Hook] = (),
        holds: Mapping[int, Callable[[LocalCluster], bool]] | None = None,
        script: Iterable[tuple[Callable[[LocalCluster], bool], Callable[[LocalCluster], None]]] = (),
        all_ready_at_once: bool = False,
        first: Callable[[], None] | None = None,
    ) -> None:
        self.job = Job.loads(job_text, overrides=overrides, faults=faults)
        self.directory = directory
        self.hooks = tuple(hooks)
        self.holds = dict(holds or {})
        self.script = list(script)
        self.all_ready_at_once = all_ready_at_once
        self.first = first
        self.warm: list[Ready] = []
        job = self.job
        stores = prepare_stores(job, verify=False)
        self.stores = tuple((store.directory, store.digest, ()) for store in stores)
        self.held_out = tuple((store.directory, store.digest, ()) for store in prepare_held_out(job, verify=False))
        self.dataset = dataset_of(job, stores)
        self.controller = Controller(ControllerConfig.for_job(job, LayoutChooser.for_job(job)))
        self.processes: dict[WorkerId, _Process] = {}
        self.steps: dict[int, StepReport] = {}
        self.records: list[tuple[str, dict[str, Any]]] = []
        self.generations: list[Generation] = []
        self.rollbacks: list[int] = []
        self.moved: dict[tuple[int, WorkerId], int] = {}
        self.pids: dict[WorkerId, int] = {}
        self.finish: Finish | None = None

    # ------------------------------------------------------------------------------------ for conditions and scripts

    @property
    def committed(self) -> int:
        return self.controller.progress.committed

    def records_of(self, kind: str) -> list[dict[str, Any]]:
        """What was put on record of this kind so far."""
        return [fields for each, fields in self.records if each == kind]

    def idle(self) -> list[WorkerId]:
        """The workers that are warm and in no generation."""
        return [worker for worker, view in self.controller.workers.items() if view.state is WorkerState.IDLE]

    def is_whole(self, workers: int) -> bool:
        """Whether that number of workers trains, or a membership is about to change at the next step boundary: a rank
        that is held would keep it from doing so."""
        state, generation = self.controller.state, self.controller.generation
        whole = generation is not None and generation.layout.num_placed == workers
        return state is RunState.SETTLING or (state is RunState.RUNNING and whole)

    def kill(self, slot: int) -> None:
        """SIGKILL to the newest process of a worker."""
        newest = max(worker for worker in self.processes if worker.slot == slot)
        self.processes[newest].kill()

    # ------------------------------------------------------------------------------------ the loop

    def run(self, timeout_s: float = 240.0) -> Outcome:
        """The whole run; no process is left behind. Raises AssertionError when it takes longer than `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self.feed(Start())
            next_tick = time.monotonic()
            while self.finish is None:
                assert time.monotonic() < deadline, f"not over after {timeout_s} s: {self.describe()}"
                self._listen(max(0.0, next_tick - time.monotonic()))
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + TICK_S
                    self.feed(Tick())
                self._follow_script()
            exits = self._end()
        finally:
            for process in self.processes.values():
                process.kill()
                process.process.join()
        return Outcome(
            self.finish.status,
            self.finish.reason,
            self.finish.digest,
            [self.steps[step] for step in sorted(self.steps)],
            [recovery_entry(fields) for kind, fields in self.records if kind == "recovery"],
            self.generations,
            self.pids,
            self.records,
            self.rollbacks,
            self.moved,
            exits,
        )

    def describe(self) -> str:
        views = {str(w): (v.state.name, v.phase, v.committed) for w, v in self.controller.workers.items()}
        return f"{self.controller.state}, {views}, committed {self.committed}, last records {self.records[-8:]}"

    def feed(self, event: Event) -> None:
        """Gives the controller an event and carries out what it answers."""
        actions = self.controller.handle(event, time.monotonic())
        if isinstance(event, Joined):
            self.moved[event.generation, event.worker] = event.bytes_moved
        for action in actions:
            self._carry_out(action)

    def _listen(self, timeout_s: float) -> None:
        living = [process for process in self.processes.values() if not process.is_gone]
        by_pipe = {process.reports: process for process in living}
        by_sentinel = {process.process.sentinel: process for process in living}
        heard = wait([*by_pipe, *by_sentinel], timeout=timeout_s)
        for source in heard:
            if isinstance(source, Connection):
                self._take_report(by_pipe[source])
        for source in heard:
            if isinstance(source, int):
                process = by_sentinel[source]
                while self._take_report(process):
                    pass
                process.is_gone = True
                process.process.join()
                self.feed(Died(process.worker, f"exit code {process.process.exitcode}"))

    def _take_report(self, process: _Process) -> bool:
        try:
            if not process.reports.poll():
                return False
            message = process.reports.recv()
        except (EOFError, OSError):
            return False
        if self.all_ready_at_once and isinstance(message, Ready):
            self.warm.append(message)
        else:
            self.feed(message)
        if isinstance(message, FaultFired):
            self._carry_out_fault(message)
        with contextlib.suppress(OSError):
            process.reports.send(Reply(recorded=self.committed, term=self.controller.config.term))
        return True

    def _carry_out_fault(self, fired: FaultFired) -> None:
        fault = self.job.faults[fired.index]
        if fault.kind == "drain" and fired.worker is not None:
            self.feed(DrainNotice((fired.worker,), "injected", time.monotonic() + (fault.seconds or 30.0)))

    def _follow_script(self) -> None:
        on_their_way = {w for w, v in self.controller.workers.items() if v.state is WorkerState.STARTING}
        if on_their_way <= {ready.worker for ready in self.warm}:
            for ready in self.warm:
                self.feed(ready)
            self.warm = []
        for step in [step for step, condition in self.holds.items() if condition(self)]:
            del self.holds[step]
            for process in self.processes.values():
                process.tell(Go(step), self.controller.config.term)
        for entry in [entry for entry in self.script if entry[0](self)]:
            self.script.remove(entry)
            entry[1](self)

    def _carry_out(self, action: Action) -> None:
        term = self.controller.config.term
        match action:
            case RequestWorker():
                spec = WorkerSpec(
                    action.worker,
                    self.job,
                    self.directory,
                    self.stores,
                    self.held_out,
                    self.hooks,
                    tuple(self.holds),
                    self.first,
                )
                process = self.processes[action.worker] = _Process(spec)
                assert process.process.pid is not None
                self.pids[action.worker] = process.process.pid
                self.feed(Placed(action.worker, NODE))
            case ReleaseWorker():
                self.processes[action.worker].tell(Leave(action.worker), term)
            case KillWorker():
                self.processes[action.worker].kill()
            case Order():
                if isinstance(action, StartGeneration):
                    self.generations.append(action.generation)
                    (self.directory / "has-begun").touch()
                for worker in action.recipients:
                    self.processes[worker].tell(action.sent(), term)
            case Rollback():
                self.rollbacks.append(action.committed)
                self.steps = {step: report for step, report in self.steps.items() if step < action.committed}
            case StepCommitted():
                assert action.report.step not in self.steps, f"step {action.report.step} went on record twice"
                self.steps[action.report.step] = action.report
            case RunEvent():
                self.records.append((action.kind, action.fields()))
            case Finish():
                self.finish = action

    def _end(self) -> dict[WorkerId, int | None]:
        """Lets every worker end in good order; exit codes, None for those that had to be killed."""
        living = [process for process in self.processes.values() if not process.is_gone]
        for process in living:
            process.tell(Leave(process.worker), self.controller.config.term)
        exits: dict[WorkerId, int | None] = {}
        for process in living:
            process.process.join(5.0)
            exits[process.worker] = process.process.exitcode
        return exits


# ---------------------------------------------------------------------------------------- in the worker's process


def _worker_main(spec: WorkerSpec, reports: Connection, commands: Connection) -> None:
    prepare_child()
    if spec.first is not None:
        spec.first()
    from orchestrator.checkpoint.catalog import Catalog
    from orchestrator.storage import open_storage
    from orchestrator.training.worker import Worker

    _try_models_once(spec.job)
    lock = threading.Lock()

    def report(message: Any) -> Reply | None:
        with lock:
            reports.send(message)
            reply: Reply = reports.recv()
            return reply

    worker = Worker(
        spec.worker,
        spec.job,
        run="test",
        node=NODE,
        pid=os.getpid(),
        host=HOST,
        dataset=dataset_of(spec.job, open_stores(spec.job, spec.stores)),
        held_out=held_out_of(spec.job, open_stores(spec.job, spec.held_out, is_held_out=True)),
        catalog=Catalog(open_storage(str(spec.directory / "checkpoints")), "test"),
        report=report,
        on_orphaned=lambda: os._exit(3),
        on_shutdown=lambda: os._exit(0),
        on_broken=lambda: os._exit(6),
        secret=SECRET,
    )
    held = set(spec.held_steps)
    _hold(worker, held)
    for hook in spec.hooks:
        hook(worker)
    worker.start()
    threading.Thread(target=worker.train, daemon=True).start()
    with contextlib.suppress(EOFError):
        while True:
            order, term = commands.recv()
            if isinstance(order, Go):
                # After whatever it was told before, so that a checkpoint's end is the end of it in this process too.
                worker._saver.wait()
                held.discard(order.step)
                continue
            worker.take(order, term)
            if isinstance(order, Leave):
                break
    os._exit(0)


def _try_models_once(job: Job) -> None:
    """A trial takes as long as the steps of a test, and finds the same for every worker and run of a job: what the
    first found is kept beside its tokens. (What a trial finds has tests of its own.)"""
    from orchestrator.training import build

    known = Path(job.data.cache) / f"trial-{job.digest().removeprefix('sha256:')}"
    try_model = build.try_model

    def once(*arguments: Any, **options: Any) -> Trial:
        with contextlib.suppress(FileNotFoundError):
            found: Trial = pickle.loads(known.read_bytes())
            return found
        found = try_model(*arguments, **options)
        draft = known.with_name(f"{known.name}.{os.getpid()}")
        draft.write_bytes(pickle.dumps(found))
        os.replace(draft, known)
        return found

    build.try_model = once


def _hold(worker: Any, held: Collection[int]) -> None:
    fetch = worker.engine.loads.source

    def fetch_when_told(step: int, virtual_worker: int) -> Any:
        while step in held and worker.protocol.is_joined:
            worker.engine.fabric.check()
            time.sleep(0.005)
        return fetch(step, virtual_worker)

    worker.engine.loads.source = fetch_when_told


# ---------------------------------------------------------------------------------------- hooks


def die() -> None:
    """The end of this process, at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop_for_good() -> None:
    """This process falls silent but lives."""
    os.kill(os.getpid(), signal.SIGSTOP)


def miss_the_news(step: int, slot: int, worker: Any) -> None:
    """Worker `slot` takes part in the vote of `step`, so that all others commit, but does not learn its result."""
    from strategies.comm.groups import PeerLost

    vote = worker.engine.vote
    missed: list[int] = []

    def deaf(at: int) -> Any:
        result = vote(at)
        if at == step and not missed:
            missed.append(at)
            raise PeerLost("injected: the news of the vote did not arrive")
        return result

    if worker.worker.slot == slot:
        worker.engine.vote = deaf


def vote_by_pairs(step: int, victim: int, lucky: int, worker: Any) -> None:
    """In the vote of `step` the rank `victim` dies after its vote has reached the rank `lucky` and nobody else."""
    import torch

    from strategies.comm.groups import PATIENCE, PeerLost

    bind = worker.engine.bind

    def bind_and_replace(fabric: Any, layout: Any, generation: int) -> None:
        bind(fabric, layout, generation)
        groups = fabric.control
        usual = groups.all_to_all

        def all_to_all(
            output: torch.Tensor, input: torch.Tensor, output_sizes: list[int], input_sizes: list[int]
        ) -> None:
            if generation > 0 or worker._phase != "vote" or worker._phase_step != step:
                usual(output, input, output_sizes, input_sizes)
                return
            sent, received, rank = input.split(input_sizes), output.split(output_sizes), groups.rank
            others = [peer for peer in range(groups.world_size) if peer != rank]
            if rank == victim:
                groups.send(sent[lucky], lucky, 7).wait(PATIENCE)
                time.sleep(0.05)
                die()
            sends = [groups.send(sent[peer], peer, 7) for peer in others if peer != victim]
            receives = [groups.receive(received[peer], peer, 7) for peer in others]
            received[rank].copy_(sent[rank])
            try:
                for work in (*sends, *receives):
                    work.wait(PATIENCE)
            except RuntimeError as error:
                raise PeerLost(str(error)) from error

        groups.all_to_all = all_to_all

    worker.engine.bind = bind_and_replace


def at_phase(phase: str, step: int, slot: int, action: Callable[[], None], worker: Any) -> None:
    """Runs `action` when worker `slot`, in its first incarnation, enters `phase` of `step`."""
    on_phase = worker.engine.phases.on_phase

    def watched(at_phase: str, at_step: int) -> None:
        on_phase(at_phase, at_step)
        if (at_phase, at_step, worker.worker) == (phase, step, WorkerId(slot, 0)):
            action()

    worker.engine.phases.on_phase = watched


def linger_and_die(seconds: float) -> None:
    """Reacts to nothing for a while (heartbeats go on), then dies."""
    time.sleep(seconds)
    die()


def when_forming(generation: int, rank: int, action: Callable[[], None], worker: Any) -> None:
    """Runs `action` when the rank is about to join the process group of `generation`."""
    core: Any = importlib.import_module("orchestrator.training.worker")
    usual: Any = core.Fabric

    class Watched(usual):  # type: ignore[misc]
        def form(self, **arguments: Any) -> None:
            if worker.protocol.generation.number == generation and self.rank == rank:
                action()
            super().form(**arguments)

    core.Fabric = Watched


def when_connecting(generation: int, rank: int, action: Callable[[], None], worker: Any) -> None:
    """Runs `action` when the rank has told the others of `generation` where to find it, and has connected to nobody."""
    gloo: Any = importlib.import_module("strategies.comm.gloo")
    connect = gloo.Gloo._connect

    def watched(self: Any, make: Any) -> Any:
        at = worker.protocol.generation
        if at.number == generation and at.rank_of(worker.worker) == rank:
            action()
        return connect(self, make)

    gloo.Gloo._connect = watched


def when_moving_state(generation: int, rank: int, worker: Any) -> None:
    """The rank dies in the middle of the state transfer of `generation`: after the first of its transfers."""
    state: Any = importlib.import_module("strategies.state.training_state")
    usual = state.execute

    def part_of(plan: Any, sources: Any, targets: Any, kinds: Any, groups: Any) -> Any:
        if worker.protocol.generation.number == generation and groups.rank == rank:
            usual(plan[:1], sources, targets, kinds, groups)
            die()
        return usual(plan, sources, targets, kinds, groups)

    state.execute = part_of


def at_barrier(generation: int, rank: int, action: Callable[[], None], worker: Any, *, passed: bool = False) -> None:
    """Runs `action` when the rank has its state of `generation` and is about to wait for the others to have theirs, or
    when that is `passed`: others may then have passed it too, or not."""
    adopt_layout = worker.state.adopt_layout

    def watched(*arguments: Any, barrier: Callable[[], object], **reading: Any) -> Any:
        def wait_and_act() -> None:
            here = worker.protocol.generation.number == generation and arguments[1].rank == rank
            if here and not passed:
                action()
            barrier()
            if here:
                action()

        return adopt_layout(*arguments, barrier=wait_and_act, **reading)

    worker.state.adopt_layout = watched
