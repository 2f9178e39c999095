"""A worker: one long-lived process that is a rank of generation after generation.

Three threads. The *training* thread (whoever calls `train`; best a process's main thread) alone touches model, state
and collectives; it takes commands from a queue and runs one generation at a time. The *reporting* thread tells the
controller what happened, in order and until it is heard, and sends heartbeats in between. Commands arrive on any other
thread and only leave a note, except that an interruption shuts the collectives down at once.

How messages travel is not its business: `report` delivers one and returns the reply, or raises.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monitoring.logs import LogContext
from orchestrator.checkpoint.catalog import Catalog
from orchestrator.checkpoint.manifest import CheckpointError, UnusableCheckpoint
from orchestrator.checkpoint.names import Save
from orchestrator.control.core.orders import Leave, Order
from orchestrator.control.core.protocol import FaultFired
from orchestrator.control.core.workers import WorkerId
from orchestrator.data import Dataset, step_hash
from orchestrator.job import Job
from orchestrator.job.parts import update_rule_of
from orchestrator.lateness import Lateness
from orchestrator.models.loading import loaded_of
from orchestrator.training import build
from orchestrator.training.faults import FaultInjector
from orchestrator.training.messages import (
    Finalized,
    Generation,
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
from orchestrator.training.protocol import Holds, WorkerProtocol
from orchestrator.training.restoring import StorageFailed, open_checkpoint, read_checkpoint
from orchestrator.training.saving import Saver
from strategies.comm.fabric import Fabric
from strategies.comm.groups import PeerLost, serve_store
from strategies.comm.rendezvous_proof import StoreAddress
from strategies.gradient.work import import_for
from strategies.layout.placement import Domain, trained_spans
from strategies.layout.statemap import Spans, share_out, subtract
from strategies.state.chunk_loader import ChunkLoader
from strategies.state.reshard import Resharded, StateCorrupt
from strategies.state.training_state import state_digest
from strategies.trial.trial import ModelChanged
from strategies.update.engine import StepEngine, StepRecord
from strategies.update.timing import rounded
from strategies.update.vote import Agreement, exchange
from strategies.update.warm_up import calibrate, warm_up

log = logging.getLogger(__name__)

TELL_MEMORY_S = 10.0
"""How often a rank that has nothing else to say tells how much memory it uses."""
FORM_TIMEOUT_S = 20.0
"""A group forms in milliseconds; a rank that waits this long for a peer gives the generation up."""


class Worker:
    """See the module. `report` may block and may raise; `on_orphaned` is called once when nobody has answered for
    `elastic.lease_s` seconds, `on_shutdown` when the controller says that the run is over, and `on_broken` when this
    process can be of no use any more. `host` is where peers reach it; only those are let in who have the `secret` of
    the run."""

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
        catalog: Catalog,
        report: Callable[[Any], Reply | None],
        on_orphaned: Callable[[], None],
        on_shutdown: Callable[[], None],
        on_broken: Callable[[], None],
        secret: bytes,
        zone: str = "",
        log_context: LogContext | None = None,
    ) -> None:
        self.worker = worker
        self._about = log_context if log_context is not None else LogContext()
        self.job = job
        self.run = run
        self.host = host
        self._report = report
        self._on_orphaned = on_orphaned
        self._on_shutdown = on_shutdown
        self._on_broken = on_broken
        self._secret = secret
        self._commands: queue.Queue[tuple[Callable[..., None], tuple[Any, ...]] | None] = queue.Queue()
        self._outbox: deque[tuple[Any, threading.Event]] = deque()
        self._wake = threading.Condition()
        self.protocol = WorkerProtocol(worker)
        self._lock = threading.Lock()
        """For the protocol, and which groups belong to its generation."""
        self._fabric: Fabric | None = None
        self._shares: list[Spans] | None = None
        self._held_up_s = 0.0
        """For how long the last step boundary was held up, to save or to see that there is nothing to save."""
        self._over = False
        self.committed = 0
        self._spoken = 0
        self._moves = 0
        self._phase, self._phase_step = "idle", 0

        self._lateness = Lateness()
        self._lateness.watch()
        device = build.choose_device(job)
        build.make_deterministic(job, device)
        import_for(tensor=job.strategy.tensor, pipeline=job.strategy.pipeline, shard=job.strategy.shard)
        self._rendezvous, (_, port, _) = serve_store(host, secret, self._without_rendezvous)
        self._faults = FaultInjector(job, worker.slot, self._announce_fault, self._spoil_gradient)
        self.state = build.build_state(job, dataset.vocab_size, device)
        delay = self._faults.delay if self._faults.may_be_slow else None
        self._fetch = build.make_fetch(job, dataset, delay)
        self._catalog = catalog
        self._saver = Saver(worker, job, catalog, self.state, dataset.sampler.position, self._send, self._unrecorded)
        self.engine = StepEngine(self.state, build.step_spec(job), self._fetch, self._on_phase, update_rule_of(job))
        self.engine.is_saving = lambda: self._saver.is_busy
        self.engine.on_deal = self._fetch.expect
        warm_up(self.engine, keep=job.strategy.keeps_model_whole)
        if self._faults.may_be_slow:
            self.engine.watch.drag = self._faults.drag
        self.ready = Ready(
            worker, node, pid, host, port, self.state.initial_digest(),
            elements=self.state.space.size, zone=zone, memory_bytes=build.memory_bytes(device),
            costs=build.model_costs(job), unit_seconds=calibrate(self.engine),
            flops_per_token=build.flops_per_token(job, self.state.blueprint.model), peak_flops=peak_flops(job, device),
            loaded=loaded_of(self.state.blueprint.model, self.state.blueprint.unused),
            lateness_s=round(self._lateness.recent_s(), 3),
        )  # fmt: skip
        self._lateness.close()  # From here on the reporting thread sees for itself.

    def start(self) -> None:
        """Reports for duty, from a thread of its own."""
        log.info("ready on node %s, process %d", self.ready.node[:8], self.ready.pid)
        self._send(self.ready)
        threading.Thread(target=self._report_loop, name="reporting", daemon=True).start()

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
                fabric = self._fabric
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
            return self.protocol.status(term, self.ready, self._holds(), self._saver.last_part, self._assignment())

    def shutdown(self) -> None:
        """Ends `train` and the reports; groups are dropped so that no neighbour waits."""
        self._over = True
        self._fetch.close()
        fabric = self._fabric
        if fabric is not None:
            fabric.abort()
        self._commands.put(None)
        with self._wake:
            self._wake.notify_all()

    def _assignment(self) -> tuple[tuple[int, ...], ...]:
        """The newest deal that it knows of; none before it has been dealt any work."""
        return self.engine.newest_assignment if self.protocol.is_joined else ()

    def _holds(self) -> Holds:
        return Holds(self.committed, self.state.held, prepared=self.engine.prepared_step == self.committed)

    # ------------------------------------------------------------------------------------ the training thread

    def train(self) -> None:
        """Takes part in generation after generation until `shutdown`."""
        build.make_deterministic(self.job, self.state.device)
        while (command := self._commands.get()) is not None:
            function, arguments = command
            function(*arguments)

    def _run_generation(self, generation: Generation) -> None:
        rank = generation.rank_of(self.worker)
        if rank is None:
            return
        fabric = Fabric(rank=rank, layout=generation.layout, device=self.state.device)
        with self._lock:
            self.protocol.enters(generation)
            self._fabric = fabric
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
        except PeerLost as error:
            detail = str(error)
        except UnusableCheckpoint as error:
            cause, detail = "unusable", str(error)
        except StorageFailed as error:
            cause, detail = "storage", str(error)
        except CheckpointError as error:
            # What a fork begins with is another run's: there is none before it to fall back to.
            origin = self._catalog.origin
            is_ours = origin is None or generation.restore != origin[1].locate(generation.committed)
            cause, detail = "restore" if is_ours else "unusable", str(error)
            self._saver.set_aside(generation.committed, detail)
        except ModelChanged as error:
            cause, detail = "job", str(error)
        except Exception as error:
            log.exception("worker %s failed in generation %d", self.worker, generation.number)
            cause, detail = "exception", f"{type(error).__name__}: {error}"
            if self.engine.applying:
                self._invalidate()
        fabric.drop()
        self._phase = "idle"
        with self._lock:
            self._fabric = None
            left = self.protocol.leaves(cause, self._holds(), time.monotonic(), detail)
        self._send(left)
        told = log.info if cause in ("pause", "complete") else log.warning
        told(
            "left generation %d after %d steps: %s%s", left.generation, left.committed, cause, detail and f", {detail}"
        )
        self._about.rank = None

    def _take_part(self, generation: Generation, rank: int, fabric: Fabric) -> LeftCause:
        if rank in generation.roll_forward and self.committed == generation.committed - 1:
            assert generation.norm is not None
            self.engine.commit(self.committed, generation.norm)
            self.committed += 1
        first = generation.members[0]
        fabric.form(
            store_address=StoreAddress(first.host, first.store_port, self._secret),
            prefix=f"{self.run}/{generation.term}/{generation.number}",
            host=self.host,
            timeout_s=FORM_TIMEOUT_S,
        )
        self.protocol.begins_at(generation.committed)
        if generation.collect:
            return self._collect(generation, fabric)
        moved = self._bring_state(generation, rank, fabric)
        self.engine.bind(fabric, generation.layout, generation.number)
        self._shares, self._held_up_s = None, 0.0
        self.protocol.is_joined = True
        self._send(Joined(self.worker, generation.number, moved.received_bytes, moved.buffer_bytes))
        log.info(
            "joined generation %d of %d ranks (%s) with the state of %d steps, %.1f MB of it received",
            generation.number, len(generation.members), generation.cause, self.committed, moved.received_bytes / 1e6,
        )  # fmt: skip
        while self.committed < self.job.train.steps:
            record, agreement = self.engine.run(self.committed)
            self.committed += 1
            self._note(record, rank)
            started = time.perf_counter()
            self._save_if_due(generation, rank, agreement)
            self._held_up_s = time.perf_counter() - started
            if agreement.pause:
                return "pause"
        return "complete"

    def _bring_state(self, generation: Generation, rank: int, fabric: Fabric) -> Resharded:
        """After this, every member has its part of the state of `generation.committed` steps."""
        held = list(generation.held)
        read: Callable[[ChunkLoader], None] | None = None
        if generation.restore is not None:
            # Reading a checkpoint takes as long as it takes; the controller is told, and does not call it stuck.
            self._phase = "restore"
            saved = open_checkpoint(self._catalog, generation.committed, self.state)
            read = lambda intake: read_checkpoint(saved, intake, self._moved)  # noqa: E731
            self._invalidate()
            log.info("restoring the checkpoint of %d steps from %s", generation.committed, generation.restore)
            updates = saved.manifest.updates
        else:
            if held[rank] and (self.committed != generation.committed or subtract(held[rank], self.state.held)):
                self._start_over(generation)
            updates = self._agree_on_updates(fabric, held)
            if not held[rank]:
                self._invalidate()
        domains = [Domain(member.zone, member.node) for member in generation.members]
        try:
            moved = self.state.adopt_layout(
                generation.layout, fabric, held, domains, self.job.elastic.state_copies, updates,
                barrier=lambda: self._agree(fabric, 0), read=read, read_by_node=not self._catalog.storage.is_remote,
            )  # fmt: skip
        except StateCorrupt as error:
            raise PeerLost(str(error)) from error
        self.committed, self.engine.applying = generation.committed, False
        return moved

    def _collect(self, generation: Generation, fabric: Fabric) -> LeftCause:
        """Brings the whole state to rank 0."""
        self._phase = "collect"
        self.state.updates = self._agree_on_updates(fabric, generation.held)
        try:
            moved = self.state.collect(generation.held, fabric)
            self._agree(fabric, 0)
        except StateCorrupt as error:
            raise PeerLost(str(error)) from error
        self.committed = generation.committed
        self.protocol.is_joined = True
        self._send(Joined(self.worker, generation.number, moved.received_bytes, moved.buffer_bytes))
        return "complete"

    def _moved(self) -> None:
        self._moves += 1

    def _invalidate(self) -> None:
        """From here until another state is in place, nothing of this one counts: a worker that is interrupted now is
        back at step 0, which it can make again by itself."""
        self.committed, self.engine.prepared_step = 0, None
        self.state.invalidate()
        self.engine.discard()

    def _start_over(self, generation: Generation) -> None:
        """Makes the state of step 0 again, which is the only one that a worker can be taken to have and has not."""
        if generation.committed:
            raise RuntimeError(f"this worker has the state of step {self.committed}, not of {generation.committed}")
        self._invalidate()
        self.state.start_over()

    def _agree_on_updates(self, fabric: Fabric, held: Sequence[Spans]) -> int:
        """The optimizer's own step count travels with the state. Nobody is past this before every rank is here."""
        values = self._agree(fabric, self.state.updates if held[fabric.rank] else -1)
        known = {value for value in values if value >= 0}
        if len(known) != 1:
            raise RuntimeError(f"the holders of the state disagree about its number of updates: {sorted(known)}")
        return known.pop()

    def _agree(self, fabric: Fabric, value: int) -> list[int]:
        """Everyone's value, by rank; nobody is past this before every rank is here."""
        sizes = [1] * fabric.world.world_size
        return [int(each) for each in exchange(fabric.world, np.array([value]), sizes, self.state.device)]

    def _note(self, record: StepRecord, rank: int) -> None:
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
                | {"save": round(self._held_up_s, 5)},
                ranks=tuple(map(rounded, record.ranks)) if rank == 0 else (),
                deal=record.deal,
            )
        )

    def _on_phase(self, phase: str, step: int) -> None:
        self._phase, self._phase_step = phase, step
        self._about.step = step
        self._faults.on_phase(phase, step)

    def _announce_fault(self, index: int) -> None:
        log.warning("injected fault %d fires: %s", index, self.job.faults[index].model_dump(exclude_none=True))
        fired = FaultFired(self.worker, index, time.monotonic())
        heard = self._send(fired)
        heard.wait(timeout=2.0)

    def _spoil_gradient(self, step: int) -> None:
        self.engine.nan_step = step

    def _without_rendezvous(self, reason: str) -> None:
        """Without its store this worker would fail every generation that it is the first of; better it is replaced."""
        log.critical("worker %s ends, as its rendezvous store did: %s", self.worker, reason)
        self._on_broken()

    # ------------------------------------------------------------------------------------ checkpoints and the end

    def _save_if_due(self, generation: Generation, rank: int, agreement: Agreement) -> None:
        """Saves at this step boundary if it is time to, which all ranks find alike."""
        every, is_last = self.job.checkpoint.every_steps, self.committed == self.job.train.steps
        is_due = is_last or agreement.save or (every is not None and self.committed % every == 0)
        saves, tells = self.protocol.saves(is_due=is_due, is_busy=agreement.saving, is_last=is_last)
        self.engine.save_requested = self.protocol.save_requested
        if tells and rank == 0:
            self._send(SaveDelayed(self.worker, self.committed))
        if not saves:
            return
        layout = generation.layout
        if self._shares is None:  # Once in a generation: training waits for this.
            self._shares = share_out(trained_spans(layout, self.state.arrangement.shards))
        writers = [member.worker for member in generation.members]
        save = Save(self.committed, generation.term, generation.number)
        self._saver.save(save, self._shares, writers, rank, layout.describe())

    def _save_share(self, writers: tuple[WorkerId, ...], save: Save) -> None:
        self._saver.wait()
        shares = share_out([self.state.held] * len(writers))
        self._saver.save(save, shares, writers, writers.index(self.worker), {})

    def _finalize(self) -> None:
        try:
            self._send(Finalized(self.worker, state_digest(self.state)))
        except Exception as error:
            log.exception("worker %s could not finish", self.worker)
            self._send(Finalized(self.worker, "", error=f"{type(error).__name__}: {error}"))

    # ------------------------------------------------------------------------------------ the reporting thread

    def _send(self, message: Any) -> threading.Event:
        """Queues a message; the event is set once the controller has it."""
        heard = threading.Event()
        with self._wake:
            self._outbox.append((message, heard))
            self._wake.notify_all()
        return heard

    def _report_loop(self) -> None:
        interval = self.job.elastic.heartbeat_interval_s
        answered = time.monotonic()
        next_heartbeat, term = 0.0, -1
        while not self._over:
            with self._wake:
                if not self._outbox:
                    self._wake.wait(timeout=max(0.0, next_heartbeat - time.monotonic()))
                    if next_heartbeat:
                        self._lateness.note(time.monotonic() - next_heartbeat)
                entry = self._outbox[0] if self._outbox else None
            if entry is None and self._is_spoken_for(answered):
                next_heartbeat = time.monotonic() + interval
                continue
            message = entry[0] if entry is not None else self._heartbeat()
            asked = time.monotonic()
            try:
                reply = self._report(message)
            except Exception as error:
                # The controller may be restarting; whatever was not heard is said again.
                log.debug("report failed: %s", error)
                reply = None
            now = time.monotonic()
            if reply is not None:
                answered = now
                # One that begins answers late however quiet the machine is, and a fault when it is on record.
                if reply.term == term and not isinstance(message, FaultFired):
                    self._lateness.note(now - asked, now)
                term = reply.term
                self._heed(reply)
                if entry is not None:
                    self._outbox.popleft()
                    entry[1].set()
            else:
                time.sleep(min(0.1, interval))
            if entry is None:
                next_heartbeat = now + interval
            if now - answered > self.job.elastic.lease_s:
                self._over = True
                self._on_orphaned()

    def _is_spoken_for(self, answered: float) -> bool:
        """Whether a heartbeat would say nothing that rank 0's does not: a step was committed since the last one, and no
        step is committed without every member. The controller's answers are needed now and then all the same."""
        protocol = self.protocol
        moved, self._spoken = self.committed > self._spoken, self.committed
        return (
            moved
            and protocol.generation is not None
            and protocol.left is None
            and not protocol.is_first
            and time.monotonic() - answered < min(self.job.elastic.lease_s / 4, TELL_MEMORY_S)
        )

    def _unrecorded(self) -> tuple[StepReport, ...]:
        return tuple(self.protocol.reports)

    def _heartbeat(self) -> Heartbeat:
        generation = self.protocol.generation
        return Heartbeat(
            self.worker,
            -1 if generation is None else generation.number,
            self._phase,
            self._phase_step,
            self.committed,
            reports=self.protocol.unknown(),
            host_bytes=_resident_bytes(),
            device_bytes=build.allocated_bytes(self.state.device),
            lateness_s=round(self._lateness.recent_s(), 3),
            moves=self._moves + (0 if (fabric := self._fabric) is None else fabric.moves),
        )

    def _heed(self, reply: Reply) -> None:
        if self.protocol.heeds(reply):
            self._over = True
            self._on_shutdown()


def _resident_bytes() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096
    return 0
