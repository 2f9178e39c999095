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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from orchestrator.checkpoint import store as checkpoints
from orchestrator.data import TokenStore, step_hash
from orchestrator.job import Job
from orchestrator.messages import (
    CheckpointSaved,
    FaultFired,
    Finalized,
    Generation,
    Heartbeat,
    Joined,
    Left,
    LeftCause,
    Ready,
    Reply,
    Status,
    StepReport,
    WorkerId,
)
from orchestrator.worker import build
from orchestrator.worker.faults import FaultInjector
from strategies.flat import FlatState, state_digest
from strategies.groups import Groups, PeerLost, serve_store
from strategies.layout import ParallelLayout
from strategies.state import StateCorrupt, chunks_of, execute, plan_transfers
from strategies.step import StepEngine, StepRecord

log = logging.getLogger(__name__)

FORM_TIMEOUT_S = 20.0
"""A group forms in milliseconds; a rank that waits this long for a peer gives the generation up."""


class Worker:
    """See the module. `report` may block and may raise; `on_orphaned` is called once when nobody has answered for
    `elastic.lease_s` seconds, and `on_shutdown` when the controller says that the run is over."""

    def __init__(
        self,
        worker: WorkerId,
        job: Job,
        *,
        run: str,
        node: str,
        pid: int,
        host: str,
        store: TokenStore,
        checkpoint_dir: Path,
        report: Callable[[Any], Reply | None],
        on_orphaned: Callable[[], None],
        on_shutdown: Callable[[], None],
    ) -> None:
        self.worker = worker
        self.job = job
        self.run = run
        self.host = host
        self._report = report
        self._on_orphaned = on_orphaned
        self._on_shutdown = on_shutdown
        self._checkpoint_dir = checkpoint_dir
        self._commands: queue.Queue[tuple[Callable[..., None], tuple[Any, ...]] | None] = queue.Queue()
        self._outbox: deque[tuple[Any, threading.Event]] = deque()
        self._wake = threading.Condition()
        self._reports: deque[StepReport] = deque(maxlen=10_000)
        self._lock = threading.Lock()
        self._groups: Groups | None = None
        self._generation: Generation | None = None
        self._left: Left | None = None
        self._is_joined = False
        self._is_torn = False
        self._vocab_size = store.vocab_size
        self._interrupted = -1
        self._pause_wanted = -1
        self._epoch = -1
        self._accepted = -1
        self._over = False
        self.committed = 0
        self._spoken = 0
        self._moves = 0
        self._phase, self._phase_step = "idle", 0
        self._saver: threading.Thread | None = None

        device = build.choose_device(job)
        build.make_deterministic(job, device)
        self._rendezvous, port = serve_store(host)
        self._faults = FaultInjector(job, worker.slot, self._announce_fault, self._poison)
        model = build.build_model(job, store.vocab_size)
        model.to(device)
        self.state = FlatState(model, build.optimizer_spec(job), device)
        sampler = build.make_sampler(job, store.num_samples(job.data.sequence_length))
        self.engine = StepEngine(
            model, self.state, build.step_spec(job), build.make_fetch(job, store, sampler), self._on_phase
        )
        self.engine.local.warm_up()
        initial = xxhash.xxh3_64_hexdigest(self.state.weights.cpu().numpy().data)
        self.ready = Ready(worker, node, pid, host, port, initial)

    def start(self) -> None:
        """Reports for duty, from a thread of its own."""
        self._send(self.ready)
        threading.Thread(target=self._report_loop, name="reporting", daemon=True).start()

    # ------------------------------------------------------------------------------------ commands, any thread

    def join(self, generation: Generation) -> None:
        """Takes a place in `generation`, unless a newer one or a newer controller is known already."""
        with self._lock:
            if generation.epoch < self._epoch or generation.number <= self._accepted:
                return
            self._epoch, self._accepted = generation.epoch, generation.number
        self._commands.put((self._run_generation, (generation,)))

    def interrupt(self, generation: int, epoch: int) -> None:
        """Breaks out of `generation` now, wherever the training thread is in it (or before it gets there)."""
        with self._lock:
            if not self._obey(epoch):
                return
            self._interrupted = max(self._interrupted, generation)
            current = self._generation
            groups = self._groups if current is not None and current.number <= generation else None
        if groups is not None:
            groups.abort()

    def pause(self, generation: int, epoch: int) -> None:
        """Asks, in the next vote of `generation`, that all ranks leave at that step boundary."""
        with self._lock:
            if not self._obey(epoch):
                return
            self._pause_wanted = max(self._pause_wanted, generation)
            if self._generation is not None and self._generation.number == generation:
                self.engine.pause_requested = True

    def finalize(self, save: bool, epoch: int) -> None:
        """Digests the state, and saves it when `save`."""
        with self._lock:
            if not self._obey(epoch):
                return
        self._commands.put((self._finalize, (save,)))

    def status(self, epoch: int) -> Status | None:
        """This worker's whole situation for the controller of `epoch`, which it obeys from now on."""
        with self._lock:
            if not self._obey(epoch):
                return None
            return Status(
                ready=self.ready,
                generation=self._generation,
                left=self._left,
                committed=self.committed,
                prepared=self.engine.prepared_step == self.committed,
                joined=self._is_joined,
                epoch=self._epoch,
                reports=tuple(self._reports),
            )

    def shutdown(self) -> None:
        """Ends `train` and the reports; groups are dropped so that no neighbour waits."""
        self._over = True
        groups = self._groups
        if groups is not None:
            groups.abort()
        self._commands.put(None)
        with self._wake:
            self._wake.notify_all()

    def _obey(self, epoch: int) -> bool:
        if epoch < self._epoch:
            return False
        self._epoch = epoch
        return True

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
        groups = Groups(rank=rank, world_size=len(generation.members), device=self.state.device)
        with self._lock:
            self._generation, self._groups, self._left, self._is_joined = generation, groups, None, False
            self.engine.pause_requested = self._pause_wanted >= generation.number
            if self._interrupted >= generation.number:
                groups.abort()
        self._phase, self._phase_step = "form", generation.committed
        self._faults.rank = rank
        self._faults.already_fired(generation.fired_faults)
        cause: LeftCause = "peer"
        detail = ""
        try:
            cause = self._take_part(generation, rank, groups)
        except PeerLost as error:
            detail = str(error)
        except checkpoints.CheckpointError as error:
            cause, detail = "restore", str(error)
        except Exception as error:
            log.exception("worker %s failed in generation %d", self.worker, generation.number)
            cause, detail = "exception", f"{type(error).__name__}: {error}"
            if self.engine.applying:
                self._tear()
        groups.drop()
        self._phase = "idle"
        with self._lock:
            self._groups = None
            left = self._left = Left(
                self.worker,
                generation.number,
                cause,
                self.committed,
                prepared=self.engine.prepared_step == self.committed,
                detail=detail,
                reports=tuple(self._reports),
                at=time.time(),
            )
        self._send(left)

    def _take_part(self, generation: Generation, rank: int, groups: Groups) -> LeftCause:
        if rank in generation.roll_forward and self.committed == generation.committed - 1:
            self.engine.commit(self.committed)
            self.committed += 1
        master = generation.members[0]
        groups.form(
            store_address=(master.host, master.store_port),
            prefix=f"{self.run}/{generation.epoch}/{generation.number}",
            host=self.host,
            timeout_s=FORM_TIMEOUT_S,
        )
        moved = self._bring_state(generation, rank, groups)
        layout = ParallelLayout(data=len(generation.members), assignment=generation.assignment)
        self.engine.bind(groups, layout, generation.number)
        self._is_joined = True
        self._send(Joined(self.worker, generation.number, moved))
        while self.committed < self.job.train.steps:
            record, pause = self.engine.run(self.committed)
            self.committed += 1
            self._note(record)
            self._checkpoint_if_due(rank)
            if pause:
                return "pause"
        return "complete"

    def _bring_state(self, generation: Generation, rank: int, groups: Groups) -> int:
        """After this, every member holds the state of `generation.committed` steps; returns the bytes received."""
        holders = set(generation.holders) | set(generation.roll_forward)
        if generation.restore is not None:
            holders = {0}
            # Reading a checkpoint takes as long as it takes; the controller is told, and does not call it stuck.
            self._phase = "restore"
            if rank == 0:
                saved = checkpoints.load(Path(generation.restore), self._moved)
                self._tear()
                self.state.load(saved)
        elif rank in holders and self._is_torn:
            self._start_over()
        # The optimizer's own step count travels with the state. Nobody is past this before every holder is here.
        updates = self._agree_on_updates(groups, holders)
        if rank not in holders:
            self._tear()
        ranges = self.state.ranges()
        chunks = chunks_of(ranges)
        needing = set(range(len(generation.members))) - holders
        plan = plan_transfers(chunks, dict.fromkeys(chunks, holders), dict.fromkeys(chunks, needing))
        try:
            moved = execute(plan, ranges, groups)
        except StateCorrupt as error:
            raise PeerLost(str(error)) from error
        self.state.updates = updates
        self.committed, self._is_torn, self.engine.applying = generation.committed, False, False
        return moved

    def _moved(self) -> None:
        self._moves += 1

    def _tear(self) -> None:
        """From here until another state is in place, nothing of this one counts: a worker that is interrupted now is
        back at step 0, which it can make again by itself."""
        self.committed, self._is_torn, self.engine.prepared_step = 0, True, None
        self.engine.local.discard()

    def _start_over(self) -> None:
        """Back to the state of step 0, as a function of the job alone."""
        model = build.build_model(self.job, self._vocab_size).to(self.state.device)
        fresh = FlatState(model, build.optimizer_spec(self.job), self.state.device)
        self.state.load(dict(fresh.tensors()))
        self._is_torn = False

    def _agree_on_updates(self, groups: Groups, holders: set[int]) -> int:
        import torch

        if groups.world_size == 1:
            return self.state.updates
        mine = self.state.updates if groups.rank in holders else -1
        sent = torch.full((groups.world_size,), mine, dtype=torch.int64, device=self.state.device)
        received = torch.empty_like(sent)
        groups.all_to_all(received, sent, [1] * groups.world_size, [1] * groups.world_size)
        known = {int(value) for value in received.tolist() if value >= 0}
        if len(known) != 1:
            raise RuntimeError(f"the holders of the state disagree about its number of updates: {sorted(known)}")
        return known.pop()

    def _note(self, record: StepRecord) -> None:
        self._reports.append(
            StepReport(
                step=record.step,
                generation=record.generation,
                loss=record.loss,
                grad_norm=record.grad_norm,
                lr=record.lr,
                tokens=record.tokens,
                samples=step_hash(record.hashes),
                skipped=record.skipped,
                committed_at=record.committed_at,
                seconds=record.seconds,
                phase_seconds={phase: round(s, 5) for phase, s in record.phase_seconds.items()},
            )
        )

    def _on_phase(self, phase: str, step: int) -> None:
        self._phase, self._phase_step = phase, step
        self._faults.on_phase(phase, step)

    def _announce_fault(self, index: int) -> None:
        fired = FaultFired(self.worker, index, time.time())
        heard = self._send(fired)
        heard.wait(timeout=2.0)

    def _poison(self, step: int) -> None:
        self.engine.poison_step = step

    # ------------------------------------------------------------------------------------ checkpoints and the end

    def _checkpoint_if_due(self, rank: int) -> None:
        every = self.job.checkpoint.every_steps
        if every is None or rank != 0 or self.committed % every or self.committed == self.job.train.steps:
            return
        committed = self.committed
        if self._saver is not None and self._saver.is_alive():
            # Training does not wait for a slow disk.
            why = "the checkpoint before is still being written"
            self._send(CheckpointSaved(self.worker, committed, "", 0.0, error=why))
            return
        tensors = {name: tensor.detach().clone().cpu() for name, tensor in self.state.tensors()}
        self._saver = threading.Thread(
            target=lambda: self._send(self._save(tensors, committed)), name="checkpoint", daemon=True
        )
        self._saver.start()

    def _save(self, tensors: dict[str, Any], committed: int) -> CheckpointSaved:
        started = time.perf_counter()
        try:
            path, num_bytes = checkpoints.save(
                self._checkpoint_dir,
                committed,
                tensors,
                {"run": self.run, "job": self.job.digest()},
                keep=self.job.checkpoint.keep,
            )
        except (OSError, checkpoints.CheckpointError) as error:
            return CheckpointSaved(self.worker, committed, "", time.perf_counter() - started, error=str(error))
        return CheckpointSaved(self.worker, committed, str(path), time.perf_counter() - started, num_bytes)

    def _finalize(self, save: bool) -> None:
        try:
            if self._saver is not None:
                self._saver.join()
            if save:
                tensors = {name: tensor.detach().cpu() for name, tensor in self.state.tensors()}
                self._send(self._save(tensors, self.committed))
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
        next_heartbeat = 0.0
        while not self._over:
            with self._wake:
                if not self._outbox:
                    self._wake.wait(timeout=max(0.0, next_heartbeat - time.monotonic()))
                entry = self._outbox[0] if self._outbox else None
            if entry is None and self._is_spoken_for(answered):
                next_heartbeat = time.monotonic() + interval
                continue
            message = entry[0] if entry is not None else self._heartbeat()
            try:
                reply = self._report(message)
            except Exception as error:
                # The controller may be restarting; whatever was not heard is said again.
                log.debug("report failed: %s", error)
                reply = None
            now = time.monotonic()
            if reply is not None:
                answered = now
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
        generation = self._generation
        moved, self._spoken = self.committed > self._spoken, self.committed
        return (
            moved
            and generation is not None
            and self._left is None
            and generation.members[0].worker != self.worker
            and time.monotonic() - answered < self.job.elastic.lease_s / 4
        )

    def _heartbeat(self) -> Heartbeat:
        generation = self._generation
        first = generation is not None and generation.members[0].worker == self.worker
        return Heartbeat(
            self.worker,
            -1 if generation is None else generation.number,
            self._phase,
            self._phase_step,
            self.committed,
            reports=tuple(self._reports) if first else (),
            host_bytes=_resident_bytes(),
            moves=self._moves + (0 if (groups := self._groups) is None else groups.moves),
        )

    def _heed(self, reply: Reply) -> None:
        while self._reports and self._reports[0].step < reply.recorded:
            self._reports.popleft()
        if reply.shutdown:
            self._over = True
            self._on_shutdown()


def _resident_bytes() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    return 0
