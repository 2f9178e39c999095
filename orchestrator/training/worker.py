"""A worker: one long-lived process that is a rank of generation after generation.

Three threads. The *training* thread (the one that calls `train`; best a process's main thread) alone touches model,
state and collectives; it takes commands from a queue and runs one generation at a time. The *reporting* thread
(`orchestrator.training.reporting`) tells the controller what happened. Commands arrive on any other thread and only
leave a note, except that an interruption shuts the collectives down at once.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from monitoring.logs import LogContext
from orchestrator.checkpoint.catalog import Catalog
from orchestrator.checkpoint.manifest import CheckpointError, UnusableCheckpoint
from orchestrator.checkpoint.names import Save
from orchestrator.control.core.orders import Leave, Order
from orchestrator.control.core.protocol import FaultFired
from orchestrator.control.core.workers import WorkerId
from orchestrator.data import Dataset, step_hash
from orchestrator.data.held_out import HeldOut
from orchestrator.job import Job
from orchestrator.job.parts import update_rule_of
from orchestrator.lateness import Lateness
from orchestrator.models.loading import loaded_of
from orchestrator.training import build
from orchestrator.training.deterministic import make_deterministic
from orchestrator.training.evaluator import Evaluator
from orchestrator.training.fault_injector import FaultInjector
from orchestrator.training.fingerprint import fingerprint
from orchestrator.training.gpu_watch import GpuWatch, gpu_of
from orchestrator.training.leaving import cause_of, release_memory
from orchestrator.training.messages import (
    Finalized,
    Generation,
    GpuAction,
    GpuTrouble,
    Heartbeat,
    Joined,
    LeftCause,
    Ready,
    Reply,
    SaveDelayed,
    Status,
    StepReport,
)
from orchestrator.training.orders import (
    CommitCheckpoint,
    Deal,
    DiscardCheckpoint,
    Finalize,
    Interrupt,
    SaveState,
    StartGeneration,
)
from orchestrator.training.peak import peak_flops
from orchestrator.training.reporting import Reporter, Rhythm, resident_bytes
from orchestrator.training.saving import Saver
from orchestrator.training.state_keeper import StateKeeper
from orchestrator.training.teaching import Ask, Teaching
from orchestrator.training.worker_protocol import WorkerProtocol
from strategies.comm.fabric import Fabric
from strategies.comm.groups import serve_store
from strategies.comm.rendezvous_proof import StoreAddress
from strategies.gradient.work import import_for
from strategies.layout.statemap import Spans, share_out
from strategies.state.initial import initial_digest
from strategies.state.training_state import state_digest
from strategies.update.engine import StepEngine, StepRecord
from strategies.update.timing import rounded
from strategies.update.vote import Agreement
from strategies.update.warm_up import calibrate, warm_up

log = logging.getLogger(__name__)

TELL_MEMORY_S = 10.0
"""How often a rank that has nothing else to say tells how much memory it uses."""
FORM_TIMEOUT_S = 20.0
"""A group forms in milliseconds; a rank that waits this long for a peer gives the generation up."""
GONE_LIMIT_S = 30.0
"""What is left of a group that was dropped is gone in milliseconds, or when one that forms gives up."""


class Worker:
    """See the module. `report` may block and may raise; `on_orphaned` is called once when nobody has answered for
    `elastic.lease_s` seconds, `on_shutdown` when the controller says that the run is over, and `on_broken` when this
    process can be of no use any more. `host` is where peers reach it; only those are let in who have the `secret` of
    the run. `ask` asks teachers in other processes. More than 15 attributes, in more than 300 lines: here, and only
    here, the parts of a worker meet."""

    def __init__(
        self,
        worker: WorkerId,
        job: Job,
        *,
        run: str,
        node: str,
        pid: int,
        host: str,
        dataset: Dataset,
        held_out: HeldOut | None,
        catalog: Catalog,
        report: Callable[[Any], Reply | None],
        on_orphaned: Callable[[], None],
        on_shutdown: Callable[[], None],
        on_broken: Callable[[], None],
        secret: bytes,
        zone: str = "",
        log_context: LogContext | None = None,
        ask: Ask | None = None,
    ) -> None:
        self.worker = worker
        self._about = log_context if log_context is not None else LogContext()
        self.job = job
        self.run = run
        self.host = host
        self._on_shutdown, self._on_broken = on_shutdown, on_broken
        self._secret = secret
        self._catalog = catalog
        self._commands: queue.Queue[tuple[Callable[..., None], tuple[Any, ...]] | None] = queue.Queue()
        self.protocol = WorkerProtocol(worker)
        self._lock = threading.Lock()
        """For the protocol, and which groups belong to its generation."""
        self.fabric: Fabric | None = None
        self._shares: list[Spans] | None = None
        self._held_up_s = 0.0
        """For how long the last step boundary was held up, to save or to see that there is nothing to save."""
        self._saved_at = -1
        """The step of the last state of this generation that was saved."""
        self._spoken, self._phase, self._phase_step = 0, "idle", 0

        self._lateness = Lateness()
        self._lateness.watch()
        self._reporter = Reporter(
            report, Rhythm(job.elastic.heartbeat_interval_s, job.elastic.lease_s), self._lateness,
            heartbeat=self._heartbeat, is_spoken_for=self._is_spoken_for, heed=self._heed, on_orphaned=on_orphaned,
        )  # fmt: skip
        device = build.choose_device(job)
        build.wait_for_memory(job, device)
        make_deterministic(job, device)
        build.prepare_groups(job, device, host)
        import_for(tensor=job.strategy.tensor, pipeline=job.strategy.pipeline, shard=job.strategy.shard)
        self._gpu_trouble: GpuTrouble | None = None
        self.gpu = GpuWatch(gpu_of(device), self._tell_of_gpu)
        self.gpu.start()
        self._rendezvous, (_, port, _) = serve_store(host, secret, self._without_rendezvous)
        self._faults = FaultInjector(job, worker.slot, self._announce_fault, self)
        self._build(dataset, held_out, device, ask)
        self.ready = self._introduction(node, pid, port, zone)
        self._lateness.close()  # From here on the reporting thread sees for itself.

    def _build(self, dataset: Dataset, held_out: HeldOut | None, device: torch.device, ask: Ask | None) -> None:
        """Model, state, and what works with them; then a first pass."""
        job = self.job
        build.spare_imports(job)
        self.state = build.build_state(job, dataset.vocab_size, device)
        delay = self._faults.delay if self._faults.may_be_slow else None
        self._training_thread = -1
        self._looks = 0
        """Counts what it did while it waited for a teacher, or for what is read ahead."""
        self._teaching = Teaching.of(job, device, ask, self._look)
        if self._teaching is not None:
            # Others may come later than the worker; its own is read now, when there is time.
            self._teaching.is_trying = ask is not None
        self._fetch = build.make_fetch(job, dataset, delay, self._teaching)
        self._fetch.look = self._look
        self._saver = Saver(
            self.worker, job, self._catalog, self.state, dataset.sampler.position, self._reporter.send, self._unrecorded
        )
        self.engine = StepEngine(self.state, build.step_spec(job), self._fetch, self._on_phase, update_rule_of(job))
        self._keeper = StateKeeper(self.state, self.engine, self._catalog, job.elastic.state_copies)
        self._evaluator = Evaluator(job, dataset, held_out, self.engine, self._catalog)
        self.engine.is_saving = lambda: self._saver.is_busy
        self.engine.on_deal = self._fetch.expect
        self._probe = warm_up(self.engine, keep=job.strategy.keeps_model_whole)
        if self._faults.may_be_slow:
            self.engine.watch.drag = self._faults.drag

    def _look(self) -> None:
        """It waits for another thread or process: that is no hang, and it leaves when it is told to. Raises
        PeerLost."""
        self._looks += 1
        if threading.get_ident() == self._training_thread and (fabric := self.fabric) is not None:
            fabric.check()

    def _introduction(self, node: str, pid: int, port: int, zone: str) -> Ready:
        """What a controller is told of it first: what it is, and how fast."""
        job, state = self.job, self.state
        return Ready(
            self.worker, node, pid, self.host, port, initial_digest(state.blueprint),
            elements=state.space.size, zone=zone, memory_bytes=build.memory_bytes(state.device, job),
            costs=build.model_costs(job), unit_seconds=calibrate(self.engine),
            flops_per_token=build.flops_per_token(job, state.blueprint.model), peak_flops=peak_flops(job, state.device),
            loaded=loaded_of(state.blueprint.model, state.blueprint.unused),
            lateness_s=round(self._lateness.recent_s(), 3), probe=self._probe, device=fingerprint(state.device),
            virtual=state.virtual.number,
        )  # fmt: skip

    def start(self) -> None:
        """Reports for duty, from a thread of its own."""
        if self._teaching is not None:
            self._teaching.is_trying = False
        log.info("ready on node %s, process %d", self.ready.node[:8], self.ready.pid)
        self._reporter.send(self.ready)
        self._reporter.start()

    # ------------------------------------------------------------------------------------ orders, any thread

    def take(self, order: Order, term: int) -> None:
        """Carries out an order of the controller of `term`, or has the training thread do it; see `WorkerProtocol`."""
        fabric = None
        with self._lock:
            if not self.protocol.takes(order, term):
                return
            self.engine.pause_requested = self.protocol.pause_requested
            self.engine.save_requested = self.protocol.save_requested
            if self.protocol.is_interrupted:
                fabric = self.fabric
        match order:
            case StartGeneration(generation=generation):
                self._commands.put((self._run_generation, (generation,)))
            case Interrupt():
                # Wherever the training thread is in it; if it has not got there yet, it will see for itself.
                if fabric is not None:
                    fabric.abort()
            case Deal(number=number, assignment=assignment):
                self.engine.offer(number, assignment)
            case SaveState(workers=writers, save=save):
                self._commands.put((self._save_share, (writers, save)))
            case CommitCheckpoint(save=save, parts=parts, layout=layout):
                self._saver.commit(save, dict(parts), layout)
            case DiscardCheckpoint(save=save):
                self._saver.discard(save)
            case Finalize():
                self._commands.put((self._finalize, ()))
            case Leave():
                self.shutdown()

    def status(self, term: int) -> Status | None:
        """This worker's whole situation for the controller of `term`, which it obeys from now on."""
        with self._lock:
            return self.protocol.status(
                term, self.ready, self._keeper.holds(), self._saver.last_part, self._assignment()
            )

    def shutdown(self) -> None:
        """Ends `train` and the reports; groups are dropped so that no neighbour waits."""
        self._fetch.close()
        fabric = self.fabric
        if fabric is not None:
            fabric.abort()
        self._commands.put(None)
        self._reporter.end()

    def _assignment(self) -> tuple[tuple[int, ...], ...]:
        """The newest deal that it knows of; none before it has been dealt any work."""
        return self.engine.newest_assignment if self.protocol.is_joined else ()

    @property
    def committed(self) -> int:
        """The number of steps that its state holds."""
        return self._keeper.committed

    # ------------------------------------------------------------------------------------ the training thread

    def train(self) -> None:
        """Takes part in generation after generation until `shutdown`."""
        self._training_thread = threading.get_ident()
        make_deterministic(self.job, self.state.device)
        while (command := self._commands.get()) is not None:
            function, arguments = command
            function(*arguments)

    def _run_generation(self, generation: Generation) -> None:
        rank = generation.rank_of(self.worker)
        if rank is None:
            return
        fabric = Fabric(
            rank=rank, layout=generation.layout, device=self.state.device, transport=self.job.strategy.transport,
            nodes=[] if self.engine.spec.native_reduction else [member.node for member in generation.members],
        )  # fmt: skip
        with self._lock:
            self.protocol.enters(generation)
            self.fabric = fabric
            self.engine.pause_requested = self.protocol.pause_requested
            self.engine.save_requested = self.protocol.save_requested
            if self.protocol.is_interrupted:
                fabric.abort()
        self._phase, self._phase_step = "form", generation.committed
        self._about.generation, self._about.rank, self._about.step = generation.number, rank, generation.committed
        self._faults.rank = rank
        self._faults.already_fired(generation.fired_faults)
        cause: LeftCause = "peer"
        detail = ""
        try:
            cause = self._take_part(generation, rank, fabric)
        except Exception as error:
            was_aborted = fabric.is_aborted
            fabric.abort()
            cause, detail = cause_of(error, generation, self._catalog, self.state.device)
            if cause == "exception" and was_aborted:
                cause = "peer"  # What was aborted left rubbish to compute with.
            self._survive(error, cause, generation)
        fabric.drop()
        self._phase = "idle"
        with self._lock:
            self.fabric = None
            left = self.protocol.leaves(cause, self._keeper.holds(), time.monotonic(), detail)
        heard = self._reporter.send(left)
        told = log.info if cause in ("pause", "complete") else log.warning
        told(
            "left generation %d after %d steps: %s%s", left.generation, left.committed, cause, detail and f", {detail}"
        )
        self._about.rank = None
        if cause == "memory":
            release_memory(self.state.device)
        if cause == "device" or not fabric.is_gone(GONE_LIMIT_S):
            # What is left of it here would be in the way of everything else.
            log.critical("worker %s ends, as its device or its groups are not to be used any more", self.worker)
            heard.wait(timeout=2.0)
            self._on_broken()

    def _survive(self, error: Exception, cause: LeftCause, generation: Generation) -> None:
        """Sees to it that what is here, and in storage, is fit for what comes next."""
        if isinstance(error, CheckpointError) and not isinstance(error, UnusableCheckpoint):
            self._saver.set_aside(generation.committed, str(error))
        if cause == "device":
            self._keeper.lose()
        elif self.engine.applying:
            self._keeper.invalidate()  # Whatever it was that ended the update half-way.
        if cause in ("exception", "device", "memory"):
            log.exception("worker %s failed in generation %d", self.worker, generation.number)

    def _take_part(self, generation: Generation, rank: int, fabric: Fabric) -> LeftCause:
        self._keeper.roll_forward(generation, rank)
        first = generation.members[0]
        fabric.form(
            store_address=StoreAddress(first.host, first.store_port, self._secret),
            prefix=f"{self.run}/{generation.term}/{generation.number}",
            host=self.host,
            timeout_s=FORM_TIMEOUT_S,
        )
        self.protocol.begins_at(generation.committed)
        if generation.collect:
            self._phase = "collect"
            moved = self._keeper.collect(generation, fabric)
            self.protocol.is_joined = True
            self._reporter.send(Joined(self.worker, generation.number, moved.received_bytes, moved.buffer_bytes))
            return "complete"
        moved = self._keeper.bring(generation, rank, fabric, on_restore=lambda: self._enter("restore"))
        self.engine.bind(fabric, generation.layout, generation.number)
        self._shares, self._held_up_s, self._saved_at = None, 0.0, -1
        self.protocol.is_joined = True
        self._reporter.send(Joined(self.worker, generation.number, moved.received_bytes, moved.buffer_bytes))
        log.info(
            "joined generation %d of %d ranks (%s) with the state of %d steps, %.1f MB of it received",
            generation.number, len(generation.members), generation.cause, self.committed, moved.received_bytes / 1e6,
        )  # fmt: skip
        self._evaluator.prepare(fabric, self.committed)
        while True:
            self._evaluate_if_due(generation, rank)
            if self.protocol.judged.stops or self.committed >= self.job.train.steps:
                return "complete"
            began_at = self.committed
            records, agreement = self.engine.run(began_at)
            self._keeper.committed += len(records)
            for record in records:
                self._note(record, rank)
            started = time.perf_counter()
            self._save_if_due(generation, rank, agreement, began_at)
            self._held_up_s = time.perf_counter() - started
            if agreement.pause:
                return "pause"

    def _evaluate_if_due(self, generation: Generation, rank: int) -> None:
        """Evaluates the weights that there are, unless that was done. All ranks find alike what it comes to. Raises
        PeerLost."""
        rules, protocol = self._evaluator.rules, self.protocol
        report = self._evaluator.evaluate(self.committed, generation.number, protocol.judged)
        if report is None or rules is None:
            return
        judged = protocol.evaluated(report, rules)
        self._saver.best_step = judged.best_step if rules.keeps_best else -1
        if rules.keeps_best and judged.is_best:
            self._save_best(generation, rank)

    def _save_best(self, generation: Generation, rank: int) -> None:
        """Saves these weights, unless they have just been saved, as all ranks know."""
        if self.committed in (self._saved_at, 0):
            return
        # Any earlier one has to be written first; the ranks of a generation wait for it together.
        self._saver.wait()
        self._save_now(generation, rank)

    def _note(self, record: StepRecord, rank: int) -> None:
        evaluated_s = self._evaluator.take_seconds()
        self.protocol.reports.append(
            StepReport(
                step=record.step,
                generation=record.generation,
                loss=record.loss,
                grad_norm=record.grad_norm,
                lr=record.lr,
                tokens=record.tokens,
                padding=record.padding,
                samples=step_hash(record.hashes),
                skipped=record.skipped,
                committed_at=record.committed_at,
                seconds=record.seconds,
                phase_seconds={phase: round(s, 5) for phase, s in record.phase_seconds.items()}
                | {"save": round(self._held_up_s, 5)}
                | ({"evaluate": round(evaluated_s, 5)} if evaluated_s else {}),
                ranks=tuple(map(rounded, record.ranks)) if rank == 0 else (),
                deal=record.deal,
                wire_bytes=record.wire_bytes,
                round_steps=record.round_steps,
            )
        )

    def _enter(self, phase: str) -> None:
        self._phase = phase

    def _on_phase(self, phase: str, step: int) -> None:
        self._phase, self._phase_step = phase, step
        self._about.step = step
        self._faults.on_phase(phase, step)

    def _announce_fault(self, index: int) -> None:
        log.warning("injected fault %d fires: %s", index, self.job.faults[index].model_dump(exclude_none=True))
        fired = FaultFired(self.worker, index, time.monotonic())
        heard = self._reporter.send(fired)
        heard.wait(timeout=2.0)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.state.device

    def make_gradient_nan(self, step: int) -> None:
        """The gradient of this step is not finite (fault injection)."""
        self.engine.nan_step = step

    def _without_rendezvous(self, reason: str) -> None:
        """Without its store this worker would fail every generation that it is the first of; better it is replaced."""
        log.critical("worker %s ends, as its rendezvous store did: %s", self.worker, reason)
        self._on_broken()

    # ------------------------------------------------------------------------------------ checkpoints and the end

    def _save_if_due(self, generation: Generation, rank: int, agreement: Agreement, began_at: int) -> None:
        """Saves at the end of a round that began after `began_at` steps, if it is time to: all ranks find it alike."""
        every, is_last = self.job.checkpoint.every_steps, self.committed == self.job.train.steps
        is_due = is_last or agreement.save or (every is not None and self.committed // every > began_at // every)
        saves, tells = self.protocol.saves(is_due=is_due, is_busy=agreement.saving, is_last=is_last)
        self.engine.save_requested = self.protocol.save_requested
        if tells and rank == 0:
            self._reporter.send(SaveDelayed(self.worker, self.committed))
        if saves:
            self._save_now(generation, rank)

    def _save_now(self, generation: Generation, rank: int) -> None:
        """Saves this rank's share of the state, with all others."""
        layout = generation.layout
        self._saved_at = self.committed
        if self._shares is None:  # Once in a generation: training waits for this.
            self._shares = share_out(self.state.arrangement.held(layout))
        writers = [member.worker for member in generation.members]
        save = Save(self.committed, generation.term, generation.number)
        self._saver.save(save, self._shares, writers, rank, layout.describe())

    def _save_share(self, writers: tuple[WorkerId, ...], save: Save) -> None:
        self._saver.wait()
        shares = share_out([self.state.held] * len(writers))
        self._saver.save(save, shares, writers, writers.index(self.worker), {})

    def _finalize(self) -> None:
        try:
            self._reporter.send(Finalized(self.worker, state_digest(self.state)))
        except Exception as error:
            log.exception("worker %s could not finish", self.worker)
            self._reporter.send(Finalized(self.worker, "", error=f"{type(error).__name__}: {error}"))

    # ------------------------------------------------------------------------------------ the reporting thread

    def _is_spoken_for(self, unanswered_s: float) -> bool:
        """Whether a heartbeat would say nothing that rank 0's does not: a step was committed since the last one, and no
        step is committed without every member. The controller's answers are needed now and then all the same."""
        protocol = self.protocol
        moved, self._spoken = self.committed > self._spoken, self.committed
        return (
            moved
            and protocol.generation is not None
            and protocol.left is None
            and not protocol.is_first
            and unanswered_s < min(self.job.elastic.lease_s / 4, TELL_MEMORY_S)
        )

    def _unrecorded(self) -> tuple[StepReport, ...]:
        return tuple(self.protocol.reports)

    def _tell_of_gpu(self, action: GpuAction, detail: str) -> None:
        log.log(logging.INFO if action == "none" else logging.CRITICAL, "the GPU: %s", detail)
        trouble = GpuTrouble(self.worker, action, detail)
        if action != "none":
            self._gpu_trouble = trouble
        self._reporter.send(trouble)

    def _heartbeat(self) -> Heartbeat:
        generation = self.protocol.generation
        return Heartbeat(
            self.worker,
            -1 if generation is None else generation.number,
            self._phase,
            self._phase_step,
            self.committed,
            reports=self.protocol.unknown(),
            host_bytes=resident_bytes(),
            device_bytes=build.allocated_bytes(self.state.device),
            lateness_s=round(self._lateness.recent_s(), 3),
            gpu=self.gpu.reading,
            trouble=self._gpu_trouble,
            moves=self._keeper.moves
            + (0 if (fabric := self.fabric) is None else fabric.moves)
            + self._evaluator.moves
            + self._looks,
            evaluations=self.protocol.untold(),
        )

    def _heed(self, reply: Reply) -> bool:
        if not self.protocol.heeds(reply):
            return False
        self._on_shutdown()
        return True
