"""The Ray actor that steers one run: it feeds the state machine with events and carries out its actions.

All events go through one queue into one thread, so that the machine sees them in one order. The actor may be killed
and restarted at any time: the workers train on, and its successor finds them by name.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray._private import worker as ray_worker

from monitoring import discovery
from monitoring.clock import Reading
from monitoring.redaction import redact
from monitoring.skew import Window
from orchestrator.checkpoint.of_run import catalog_of, catalog_spec, catch_up
from orchestrator.control.controller import Controller
from orchestrator.control.detection import stretched_s
from orchestrator.control.history import History
from orchestrator.control.protocol import (
    Abort,
    Action,
    Died,
    Event,
    Finish,
    KillWorker,
    Placed,
    Record,
    ReleaseWorker,
    RequestWorker,
    Rollback,
    Start,
    StepCommitted,
    Stop,
    TakeOver,
    TellShortage,
    Tick,
)
from orchestrator.control.views import ControllerConfig, RebalanceRules, ScalingRules, WorkerState
from orchestrator.job import Job
from orchestrator.job.parts import objective_of
from orchestrator.lateness import Lateness
from orchestrator.planning.choose import LayoutChooser
from orchestrator.rundir import RunDirectory, RunDirectoryError
from orchestrator.runtime.action_log import narrate, set_up_logs, tell
from orchestrator.runtime.lease import Lease
from orchestrator.runtime.mailbox import Delivery, Introduction, Introductions, Mailbox
from orchestrator.runtime.presence import Presence
from orchestrator.runtime.ray import fault_injection as game_days
from orchestrator.runtime.ray.cluster_watcher import ClusterWatcher
from orchestrator.runtime.ray.placement import (
    Bundle,
    WorkerHandle,
    end_workers,
    find_workers,
    raylet_is_gone,
    refuses_connections,
    release_places,
)
from orchestrator.runtime.ray.resource_request import Need, why_no_room
from orchestrator.runtime.result import compose, outline_of, settled
from orchestrator.runtime.run_log import RunLog
from orchestrator.runtime.status import glance
from orchestrator.training.messages import FaultFired, Heartbeat, Ready, Reply, WorkerId, dated
from orchestrator.training.orders import Interrupt, Leave, Order
from orchestrator.urls import take_over

log = logging.getLogger(__name__)

T = TypeVar("T")

TICK_S = 0.25
POLL_S = 1.0
"""How often the cluster and the control directory are looked at."""
INTRODUCTION_S = 5.0
"""How long, at least, a restarted controller waits for the living workers to introduce themselves; longer while it is
late itself, and while they show life: a worker that lost its controller and its GCS together asks again after 25 s."""
MOST_INTRODUCTION_S = 60.0
SOON_S = 1.5
"""How long it takes them mostly. For whoever takes longer it is seen whether its node is still there."""
STORAGE_PATIENCE_S = 60.0
"""How long a controller that starts waits for a run directory that cannot be read or written."""
LINGER_S = 20.0
"""How long a finished controller waits for its driver to fetch the result before it goes."""


def _config(job: Job, term: int) -> ControllerConfig:
    return ControllerConfig(
        total_steps=job.train.steps,
        chooser=LayoutChooser.for_job(job),
        min_workers=job.elastic.workers.min,
        max_workers=job.elastic.workers.max,
        standby=job.elastic.standby,
        checkpointing=True,
        save_every_s=job.checkpoint.every_seconds,
        heartbeat_timeout_s=job.elastic.heartbeat_timeout_s,
        progress_timeout_s=job.elastic.progress_timeout_s,
        start_timeout_s=job.elastic.start_timeout_s,
        wait_timeout_s=job.elastic.wait_timeout_s,
        max_failures_per_step=job.elastic.max_failures_per_step,
        final_patience_s=job.checkpoint.final_patience_s,
        term=term,
        rebalance=RebalanceRules.for_job(job),
        scaling=ScalingRules.for_job(job),
    )


class ControllerActor:
    """See the module. `spec` is what every incarnation of this run's controller is made from."""

    def __init__(self, spec: dict[str, Any]) -> None:
        """Ray does not try again what raises here, so a file system that is away for a moment is waited for.

        Raises RunDirectoryError when another controller has the run.
        """
        self._spec = spec
        take_over(spec["environment"])
        self._directory = RunDirectory(spec["run_dir"])
        self._lateness = Lateness()
        self._lateness.watch()
        deadline = time.monotonic() + STORAGE_PATIENCE_S
        self._lease = self._patiently(lambda: Lease(self._directory, spec["session"]), deadline)
        self._patiently(lambda: self._set_up(spec), deadline)

    def _patiently(self, call: Callable[[], T], deadline: float) -> T:
        while True:
            try:
                return call()
            except OSError as error:
                if time.monotonic() > deadline:
                    end_workers(self._directory.run_id)
                    raise
                log.warning("the controller cannot begin yet: %s", error)
                time.sleep(1.0)
            except RunDirectoryError:
                end_workers(self._directory.run_id)
                raise

    def _set_up(self, spec: dict[str, Any]) -> None:
        os.umask(self._directory.umask)
        self._term = self._lease.term
        self._about = set_up_logs(spec | {"run_id": self._directory.run_id}, f"controller-{self._term}")
        log.info("controller of term %d, process %d", self._term, os.getpid())
        self._job = job = Job.model_validate(spec["job"])
        self._handles: dict[WorkerId, WorkerHandle] = {}
        self._mailboxes: dict[WorkerId, Mailbox] = {}
        self._mailboxes_lock = threading.Lock()
        self._introductions = Introductions()
        self._start_errors: dict[WorkerId, str] = {}
        self._lost_nodes: set[str] = set()
        self._result: dict[str, Any] | None = None
        self._farewell = threading.Event()
        self._queue: queue.Queue[tuple[Event, float]] = queue.Queue()
        self._me = ray.get_runtime_context().current_actor
        if not self._lease.has_ended and (found := catch_up(self._directory, catalog_of(self._directory, job))):
            log.info("%d steps that only a checkpoint knew of are put on record", found)
        self._run_log = RunLog(self._directory, job)
        self._clock = self._run_log.clock
        self._presence = Presence(self._directory, self._run_log)
        self._loss = ""
        self._complaint = ""
        history = self._history(self._run_log.past_events, self._run_log.past_steps)
        self._warm = frozenset(history.warm)
        self._window: Window | None = None
        self._telling = threading.Lock()
        self._has_told_the_end = False
        self._published_at = 0.0
        self._publishing_s = 0.0
        self._machine = Controller(
            _config(job, self._term),
            history,
            checkpoints=self._checkpoints(),
        )
        self._watcher = ClusterWatcher(
            self._directory, job, self._machine, self._handles, self._lease,
            tell=lambda event: self._queue.put((event, self._clock.now())), record=self._record,
            is_ephemeral=spec["ephemeral"],
        )  # fmt: skip
        self._run_log.forget_the_past()
        self._record("controller", {"epoch": self._term, "pid": os.getpid(), "session": spec["session"],
                                    "node": ray.get_runtime_context().get_node_id(),
                                    "own_cluster": spec["own_cluster"]})  # fmt: skip
        # Where this process is, which on a cluster need not be where the driver is.
        host = "127.0.0.1" if spec["own_cluster"] else ray.util.get_node_ip_address()
        port = self._run_log.metrics.serve(host, job.monitoring.port)
        self._url = f"http://{host}:{port}/metrics"
        self._record("metrics_endpoint", {"url": self._url})
        self._target = self._announce(host, port)
        threading.Thread(target=self._event_loop, name="brain", daemon=True).start()
        threading.Thread(target=self._poll_cluster, name="lookout", daemon=True).start()
        threading.Thread(target=self._reporter, name="reporter", daemon=True).start()

    def _history(self, events: list[dict[str, Any]], steps: list[dict[str, Any]]) -> History:
        """What is on record, with the faults of this job file only: a run may be gone on with under others."""
        history = History.read(events, steps)
        faults = dict(enumerate(fault.model_dump() for fault in self._job.faults))
        fired = [event for event in events if event["kind"] == "fault_injected"]
        history.fired_faults = {e["fault"] for e in fired if e.get("what") == faults.get(e["fault"])}
        return history

    def _announce(self, host: str, port: int) -> Path | None:
        """Lets Prometheus find this run, and forget those that ended without a word."""
        try:
            directory = targets_directory(
                self._job, own_cluster=self._spec["own_cluster"], cwd=self._spec["cwd"]
            )  # fmt: skip
            found = discovery.announce(directory, self._directory.run_id, host, port)
        except (OSError, ValueError) as error:
            log.warning("Prometheus will not find this run by itself: %s", error)
            return None
        # What others left there may take its time.
        threading.Thread(target=discovery.sweep, args=(directory,), name="sweep", daemon=True).start()
        return found

    def _checkpoints(self) -> dict[int, str]:
        """Those that are complete, by the number of committed steps."""
        catalog = catalog_of(self._directory, self._job)
        return {step: catalog.locate(step) for step in catalog.steps()}

    # ------------------------------------------------------------------------------------ what others call

    async def report(self, worker: WorkerId, message: Any, sent: Reading) -> Reply:
        """A worker's message, `sent` when by its own clock; answered at once, handled in order."""
        arrived = self._clock.now()
        self._queue.put((dated(message, self._clock.shift_of(worker, sent, arrived)), arrived))
        self._introductions.hear(worker, message.committed if isinstance(message, Heartbeat) else None)
        if isinstance(message, FaultFired):
            # It happens as soon as we answer, so it has to be on record before, or it could happen twice.
            while message.index not in self._machine.fired_faults and self._result is None:
                await asyncio.sleep(0.001)
        return Reply(
            recorded=self._run_log.recorded, term=self._term, shutdown=self._result is not None,
            known=self._run_log.committed,
        )  # fmt: skip

    @ray.method(max_task_retries=-1)
    async def orders(self, worker: WorkerId, term: int, after: int, wait_s: float) -> Delivery:
        """What `worker`, which has its orders up to number `after` from the controller of `term`, is to do next.

        Ray asks again when this controller dies, and so brings its successor and the workers together at once; a call
        that is made while there is none fails only after 2 s.
        """
        if term != self._term:
            return Delivery(self._term, ())
        return Delivery(self._term, await self._mailbox(worker).fetch(after, wait_s))

    async def introduce(self, introduction: Introduction) -> None:
        """A worker that has not spoken with this controller before says who and where it is."""
        if introduction.status is not None:
            shift = self._clock.shift_of(introduction.worker, introduction.sent, self._clock.now())
            introduction = introduction._replace(status=dated(introduction.status, shift))
        self._introductions.add(introduction)
        handle = self._handles.get(introduction.worker)
        if handle is not None:
            handle.node, handle.pid, handle.placed = introduction.node, introduction.pid, True
            self._queue.put((Placed(introduction.worker, introduction.node), self._clock.now()))
            if introduction.status is not None:
                # It may have told a predecessor, which knew that and is gone.
                self._queue.put((introduction.status.ready, self._clock.now()))

    async def start_failed(self, worker: WorkerId, detail: str, fatal: bool) -> None:
        """A worker could not be built; with `fatal` no other could either."""
        await asyncio.to_thread(self._record, "start_failed", {"worker": worker.slot, "detail": detail})
        self._start_errors[worker] = detail
        if fatal:
            self._queue.put((Abort(detail), self._clock.now()))

    async def stop(self, reason: str) -> None:
        self._watcher.hear_follower()
        self._queue.put((Stop(reason), self._clock.now()))

    async def snapshot(self, wait_s: float = 0.0) -> dict[str, Any]:
        """The run at a glance, for whoever follows it; after `wait_s`, or as soon as the run is over."""
        self._watcher.hear_follower()
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while self._result is None:
                    await asyncio.sleep(0.25)
        machine = self._machine
        states = [view.state for view in list(machine.workers.values())]
        generation = machine.generation
        return {
            "state": machine.state.value,
            "status": machine.status,
            "step": self._run_log.committed,
            "unwritten": self._run_log.unwritten(),
            "steps": self._job.train.steps,
            "last_step": self._run_log.last_step,
            "median_step_seconds": machine.progress.median_step_s(),
            "workers": states.count(WorkerState.MEMBER),
            "standby": states.count(WorkerState.IDLE),
            "starting": states.count(WorkerState.STARTING) + states.count(WorkerState.REQUESTED),
            "target": machine.target,
            "generation": None if generation is None else generation.number,
            "recoveries": len(self._run_log.recoveries),
            "last_recovery": self._run_log.recoveries[-1] if self._run_log.recoveries else None,
            "last_incident": self._run_log.last_incident,
            "over": self._result is not None,
            "epoch": self._term,
        }

    async def result(self) -> dict[str, Any] | None:
        """The content of result.json once the run is over."""
        return self._result

    async def farewell(self) -> None:
        """The driver has what it needs; a finished controller may go."""
        self._farewell.set()

    # ------------------------------------------------------------------------------------ the brain thread

    def _event_loop(self) -> None:
        try:
            self._begin()
            last_tick = 0.0
            while self._result is None:
                # Nobody is silent whose message is only waiting to be handled: the time is that of what has been.
                try:
                    event, now = self._queue.get(timeout=TICK_S)
                    self._lateness.note(self._clock.now() - now)
                    self._dispatch(event, now)
                except queue.Empty:
                    now = self._clock.now()
                if self._loss and self._job.checkpoint.storage is None:
                    self._end("failed", self._loss, None)  # Its state would be lost as its record is.
                if now - last_tick >= TICK_S:
                    last_tick = now
                    self._dispatch(Tick(self._lateness.recent_s()), now)
        except BaseException as error:
            log.exception("the controller failed")
            print(redact(traceback.format_exc()), file=sys.stderr)
            self._end("failed", f"the controller failed: {type(error).__name__}: {error}", None)
        self._go()

    def _begin(self) -> None:
        if self._run_log.started_at is None:
            job = self._job
            self._record("run_started", {"run": self._directory.run_id, "job": job.digest(), "steps": job.train.steps,
                                         "min_workers": job.elastic.workers.min,
                                         "loss_unit": objective_of(job).loss_unit})  # fmt: skip
        elif self._lease.is_successor and (previous := self._directory.read_json("result.json")) is not None:
            # A predecessor ended the run and died before it could say goodbye: that of an earlier driver's is cleared.
            if not self._lease.has_ended:
                ended = {"status": previous["status"], "reason": previous.get("reason", "")}
                self._record("run_finished", ended)
            end_workers(self._directory.run_id)
            self._result = previous
            return
        if self._lease.is_successor:
            found = self._find_workers()
            counts = {"workers_found": len(found.workers), "workers_starting": len(found.starting)}
            self._record("controller_restarted", {"epoch": self._term, **counts})
            self._dispatch(found, self._clock.now())
        else:
            # Whatever is left of this run on the cluster had another driver's controller, and obeys nobody.
            end_workers(self._directory.run_id)
            self._dispatch(Start(), self._clock.now())

    def _find_workers(self) -> TakeOver:
        """The living workers of a predecessor, by their own accounts. Those that were warm are waited for; the others
        are on their way, and go on being so."""
        placed: dict[WorkerId, WorkerHandle] = {}
        for handle in find_workers(self._directory.run_id, self._job.strategy.tensor):
            if handle.placed:
                placed[handle.worker] = handle
            else:
                handle.kill()  # It waits for room, and will again: why, and for how long, went with the predecessor.
        warm = self._warm & placed.keys()
        met = self._introductions.wait_for(warm, SOON_S)
        if silent := warm - met.keys():
            silent -= {worker for worker in silent if self._is_lost(placed[worker])}
            met = self._wait_for(silent)
        statuses, starting = [], []
        for worker, handle in placed.items():
            introduction = met.get(worker)
            if introduction is not None:
                handle.pid = introduction.pid
            if introduction is not None and introduction.status is not None:
                statuses.append(introduction.status)
            elif worker not in warm and handle.node is not None:
                starting.append(Placed(worker, handle.node))
            else:
                handle.kill()
                continue
            self._handles[worker] = handle
            self._watch(handle)
        met = self._introductions.wait_for((), 0.0)
        for worker in (each.worker for each in starting):
            if (late := met.get(worker)) is not None and late.status is not None:
                # It came meanwhile, and what it had told the predecessor it will not tell again.
                self._queue.put((late.status.ready, self._clock.now()))
        release_places(self._directory.run_id, [h.place for h in self._handles.values() if h.place is not None])
        return TakeOver(tuple(statuses), tuple(starting))

    def _wait_for(self, silent: Set[WorkerId]) -> dict[WorkerId, Introduction]:
        """Those that have been met when these have, or patience with them has run out."""
        began, timeout_s = time.monotonic(), self._job.elastic.heartbeat_timeout_s
        while True:
            met = self._introductions.wait_for(silent, TICK_S)
            missing, waited_s = silent - met.keys(), SOON_S + time.monotonic() - began
            limit_s = stretched_s(max(INTRODUCTION_S, timeout_s), self._lateness.recent_s())
            is_late = waited_s > limit_s and not self._introductions.show_life(missing, timeout_s)
            if not missing or is_late or waited_s > MOST_INTRODUCTION_S:
                return met

    def _is_lost(self, handle: WorkerHandle) -> bool:
        """Whether a worker's node is gone, as far as can be told; then nobody is placed there any more."""
        with suppress(Exception):
            if handle.node is not None and raylet_is_gone(handle.node):
                self._lost_nodes.add(handle.node)
                return True
        return False

    def _watch(self, handle: WorkerHandle) -> None:
        def gone(detail: str) -> None:
            node_lost = self._is_lost(handle)
            if self._handles.get(handle.worker) is not handle:
                # It was let go, and had time to leave. Not on this thread, which is Ray's own.
                threading.Thread(target=handle.free, daemon=True).start()
            why = self._start_errors.pop(handle.worker, detail)
            self._queue.put((Died(handle.worker, why, node_lost), self._clock.now()))

        handle.watch(gone)

    def _dispatch(self, event: Event, at: float) -> None:
        if self._result is not None:
            return
        if isinstance(event, FaultFired):
            if event.index in self._machine.fired_faults:
                return  # Told again, because the answer was lost with the controller.
            self._practise(event)
        if isinstance(event, Ready) and event.loaded is not None and self._run_log.loaded is None:
            self._record("model_loaded", event.loaded)
        for action in self._machine.handle(event, at):
            self._carry_out(action)
        if isinstance(event, Died) and (dead := self._handles.pop(event.worker, None)) is not None:
            # Its place outlives it, and no other could have it.
            threading.Thread(target=dead.kill, daemon=True).start()
        if isinstance(event, Died):
            with self._mailboxes_lock:
                self._mailboxes.pop(event.worker, None)
            self._introductions.forget(event.worker)
        if isinstance(event, FaultFired):
            if self._job.faults[event.index].kind == "controller":
                os.kill(os.getpid(), signal.SIGKILL)
        elif (window := self._machine.window) is not None and window is not self._window:
            self._window = window
            self._run_log.metrics.on_window(window)

    def _carry_out(self, action: Action) -> None:
        narrate(action, self._about)
        match action:
            case Record():
                self._record(action.kind, action.fields)
            case StepCommitted():
                self._run_log.step(action.report)
            case RequestWorker():
                handle = WorkerHandle.request(
                    self._directory.run_id, action.worker, self._worker_spec(), self._me,
                    need=Need.of(self._job, action.market), places=self._places_of_unit(action.worker),
                    avoid=action.avoid, must_avoid=action.must_avoid, lost=self._lost_nodes,
                )  # fmt: skip
                self._handles[action.worker] = handle
                self._watch(handle)
            case TellShortage():
                threading.Thread(target=self._tell_shortage, args=(action,), daemon=True).start()
            case ReleaseWorker():
                if (leaving := self._handles.pop(action.worker, None)) is not None:
                    self._send(Leave(action.worker))
                    # One that waits for a place goes at once, or the autoscaler might yet start a node for it.
                    if leaving.placed:
                        leaving.kill_later()
                    else:
                        threading.Thread(target=leaving.kill, daemon=True).start()
            case KillWorker():
                if (evicting := self._handles.pop(action.worker, None)) is not None:
                    # Off this thread: recovery must not wait until Ray has finished with a dead worker.
                    threading.Thread(target=evicting.kill, daemon=True).start()
            case Order():
                self._send(action)
            case Rollback():
                self._run_log.roll_back(action.committed)
            case Finish():
                self._end(action.status, action.reason, action.digest)

    def _tell_shortage(self, action: TellShortage) -> None:
        """On a thread of its own, as the cluster is asked for its reasons."""
        try:
            reason = why_no_room(Need.of(self._job, action.market))
        except Exception as error:
            reason = f"the cluster cannot be asked why: {type(error).__name__}: {error}"
        self._record("shortage", {"workers": [worker.slot for worker in action.workers],
                                  "waited_seconds": round(action.waited_s, 1), "reason": reason})  # fmt: skip

    def _send(self, order: Order) -> None:
        """Leaves an order in the mailboxes of those it is for. A worker that does not come for it is dead or silent,
        which is noticed by itself."""
        sent = order.sent()
        for worker in order.recipients:
            self._mailbox(worker).put(sent)
        if isinstance(order, Interrupt):
            self._probe(order.workers)

    def _mailbox(self, worker: WorkerId) -> Mailbox:
        with self._mailboxes_lock:
            return self._mailboxes.setdefault(worker, Mailbox())

    def _probe(self, workers: tuple[WorkerId, ...]) -> None:
        """Somebody lost a peer: finds out which of the others is gone, without waiting for Ray to say so."""

        def look(worker: WorkerId, host: str, port: int) -> None:
            handle = self._handles.get(worker)
            if handle is not None and refuses_connections(host, port):
                self._queue.put((Died(worker, "its process is gone", self._is_lost(handle)), self._clock.now()))

        for worker in workers:
            view = self._machine.workers.get(worker)
            if view is not None and view.ready is not None:
                arguments = (worker, view.ready.host, view.ready.store_port)
                threading.Thread(target=look, args=arguments, daemon=True).start()

    def _places_of_unit(self, worker: WorkerId) -> list[Bundle]:
        """Where the others of a worker's tensor-parallel group are, the newest first; also those that are gone and not
        yet dealt with, but for lost nodes."""
        tensor = self._job.strategy.tensor
        unit = [h for h in list(self._handles.values()) if h.worker.slot // tensor == worker.slot // tensor]
        unit.sort(key=lambda handle: -handle.worker.incarnation)
        return [h.place for h in unit if h.place is not None and h.node not in self._lost_nodes]

    def _worker_spec(self) -> dict[str, Any]:
        return {
            "run_id": self._directory.run_id,
            "job": self._spec["job"],
            "environment": self._spec["environment"],
            "cwd": self._spec["cwd"],
            "stores": self._spec["stores"],
            "store_digests": self._spec["store_digests"],
            "store_signatures": self._spec["store_signatures"],
            "run_dir": str(self._directory.path),
            "umask": self._directory.umask,
            "catalog": catalog_spec(self._directory, self._job),
            "secret": self._spec.get("secret"),
            "rendezvous_secret": self._spec["rendezvous_secret"],
            "own_cluster": self._spec["own_cluster"],
            "resources": self._job.resources.model_dump(),
        }

    def _practise(self, event: FaultFired) -> None:
        """A drain or node fault is carried out here, where the cluster can be reached."""
        handle = self._handles.get(event.worker) if event.worker is not None else None
        if handle is not None and handle.node is not None:
            notice = game_days.practise(self._job.faults[event.index], handle.worker, handle.node, self._clock.now())
            if notice is not None:
                self._queue.put((notice, self._clock.now()))

    # ------------------------------------------------------------------------------------ the lookout thread

    def _poll_cluster(self) -> None:
        """Looks at what nobody tells us: placements, draining nodes, requests from the command line."""
        while self._result is None:
            time.sleep(POLL_S)
            try:
                if self._result is None:
                    self._watcher.look(self._clock.now())
            except Exception as error:
                log.warning("lookout: %s: %s", type(error).__name__, error)

    def _reporter(self) -> None:
        """Tells how things are; on a thread of its own, as the run directory may be far away and slow."""
        while self._result is None:
            time.sleep(POLL_S / 2)
            try:
                self._look_at_directory()
                self._watcher.take_requests()
                self._publish()
                self._complaint = ""
            except Exception as error:
                complaint = f"{type(error).__name__}: {error}"
                if complaint != self._complaint:  # Twice a second, it would fill what log there is.
                    log.warning("the run directory: %s", complaint)
                self._complaint = complaint

    def _look_at_directory(self) -> None:
        """Writes what waits for room, and sees whether there is a directory at all."""
        self._run_log.flush(self._clock.now())
        if self._loss or not (loss := self._presence.look(time.monotonic())):
            return
        log.error("%s; the run ends", loss)
        self._loss = loss
        self._queue.put((Stop(loss), self._clock.now()))

    # ------------------------------------------------------------------------------------ records and the end

    def _record(self, kind: str, fields: dict[str, Any]) -> None:
        tell(self._run_log.record(kind, fields))

    def _publish(self) -> None:
        """Brings status.json and the metrics up to date. What takes long is done the more seldom, so that neither many
        workers nor a slow directory keep this machine busy."""
        now = self._clock.now()
        if now - self._published_at < max(POLL_S / 2, 20 * self._publishing_s):
            return
        try:
            with self._telling:
                if not self._has_told_the_end:
                    self._run_log.publish(self._glance(now), now)
        finally:
            self._published_at, self._publishing_s = self._clock.now(), self._clock.now() - now

    def _publish_the_end(self) -> None:
        """Nothing is told after this. What cannot be told changes nothing of how the run ended."""
        with self._telling, suppress(Exception):
            self._has_told_the_end = True
            now = self._clock.now()
            self._run_log.publish(self._glance(now), now)

    def _glance(self, now: float) -> dict[str, Any]:
        node = ray.get_runtime_context().get_node_id()
        return {
            "run": self._directory.run_id,
            "epoch": self._term,
            "controller": {"pid": os.getpid(), "node": node},
            "metrics_url": self._url,
            **glance(self._machine, self._run_log, self._job, now),
        }

    def _end(self, status: str, reason: str, digest: str | None) -> None:
        """Writes the result, then ends every worker; nothing of the run is left behind."""
        if self._result is not None:
            return
        if (loss := self._loss or self._presence.loss()) != "":
            status, reason = "failed", self._told_loss(loss)
        waits = not loss and self._run_log.unwritten() is not None
        if waits or "composition" in self._spec["data"]:
            # The audit goes through all steps again, which may take long, as may a disk to have room again; the
            # workers' machines do not wait for it.
            self._end_workers()
        patience_s = 0.0 if loss else self._job.checkpoint.final_patience_s
        deadline = time.monotonic() + patience_s
        settled(lambda: self._run_log.flush(self._clock.now()), deadline)
        result = compose(self._directory, self._job, self._run_log, self._spec["data"], status, reason, digest)
        if loss:
            result |= outline_of(self._run_log)
        unfired = [index for index in range(len(self._job.faults)) if index not in self._machine.fired_faults]
        if unfired and result["status"] == "finished":
            result["faults_not_fired"] = unfired
        try:
            account = self._run_log.account(self._clock.now())
            result |= {"wall_seconds": round(account.wall_seconds, 3), "goodput_ratio": round(account.ratio, 4)}
            if not loss:
                self._write_end(result, deadline)
        finally:
            self._end_workers()
            if self._target is not None:
                with suppress(OSError):
                    discovery.withdraw(self._target)
            self._lease.end()
            self._result = result

    def _told_loss(self, loss: str) -> str:
        """What is lost with the run directory, and what is not."""
        last = self._run_log.last_checkpoint
        if last is None or self._job.checkpoint.storage is None:
            return f"{loss}; {self._run_log.committed} steps were committed"
        return f"{loss}; the state of {last['committed']} steps is in {last['path']}"

    def _write_end(self, result: dict[str, Any], deadline: float) -> None:
        """Writes down how the run ended. Where that cannot be done, whoever follows the run is told all the same, and
        that it has failed."""
        failure = ""

        def write() -> bool:
            nonlocal failure
            try:
                self._directory.write_json("result.json", result)
            except OSError as error:
                failure = str(error)
                return False
            return True

        everything = settled(lambda: self._run_log.flush(self._clock.now()), deadline)
        if not everything and (waiting := self._run_log.unwritten()) is not None:
            failure = f"{waiting['error']} ({waiting['records']} records, {waiting['steps']} of them of steps)"
        if not everything or not settled(write, deadline):
            why = f"{result['reason']}; the run's end could not be recorded: {failure}"
            result |= {"status": "failed", "reason": why}
            settled(write, time.monotonic())
        # After the result: what has one is over for whoever comes next, also if this process dies here.
        self._record("run_finished", {"status": result["status"], "reason": result["reason"]})
        settled(lambda: self._run_log.flush(self._clock.now()), deadline)
        self._publish_the_end()

    def _end_workers(self) -> None:
        for handle in list(self._handles.values()):
            handle.kill()

    def _go(self) -> None:
        # Whatever has been placed meanwhile, or was lost sight of with an earlier controller.
        end_workers(self._directory.run_id)
        self._watcher.close()
        self._farewell.wait(timeout=LINGER_S)
        self._run_log.close()
        time.sleep(0.2)
        with suppress(Exception):
            ray.kill(self._me, no_restart=True)


def targets_directory(job: Job, *, own_cluster: bool, cwd: str | None) -> Path:
    """Where this run's endpoint is told to Prometheus: where the job says (relative to `cwd`, None: to here), or beside
    Ray's own discovery file."""
    if job.monitoring.targets is not None:
        return Path(cwd or ".") / job.monitoring.targets
    if own_cluster:
        return discovery.targets_directory()  # Its own Ray's directory is gone with it, and nobody watches it.
    node: Any = ray_worker._global_node
    return discovery.targets_directory(str(Path(node.get_session_dir_path()).parent))
