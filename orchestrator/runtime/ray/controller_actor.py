"""The Ray actor that steers one run: it feeds a state machine with events and carries out its actions.

All events go through one queue into one thread, so that the machine sees them in one order. The actor may be killed
and restarted at any time: the workers go on, and its successor finds them by name. What the machine decides about, and
what its decisions mean, is the executor's; here are the processes of workers, and what is said to and by them.
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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import ray

from monitoring.clock import Reading
from monitoring.events import ControllerBegan, RunEvent, Shortage, StartFailed
from monitoring.redaction import redact
from orchestrator.control.core.orders import Leave, Order
from orchestrator.control.core.protocol import (
    Abort,
    Died,
    FaultFired,
    Finish,
    KillWorker,
    Placed,
    ReleaseWorker,
    RequestWorker,
    Start,
    Stop,
    TellShortage,
    Tick,
)
from orchestrator.control.core.workers import WorkerId
from orchestrator.job import Job
from orchestrator.lateness import Lateness
from orchestrator.rundir import RunDirectory, RunDirectoryError
from orchestrator.runtime.action_log import set_up_logs
from orchestrator.runtime.executor import Executor, ExecutorContext
from orchestrator.runtime.lease import Lease
from orchestrator.runtime.mailbox import Delivery, Introduction, Introductions, Mailboxes
from orchestrator.runtime.ray import fault_injection
from orchestrator.runtime.ray.cluster_watcher import ClusterWatcher
from orchestrator.runtime.ray.placement import end_workers
from orchestrator.runtime.ray.processes import WorkerProcesses
from orchestrator.runtime.ray.resource_request import Need, why_no_room
from orchestrator.runtime.ray.survivors import Survivors
from orchestrator.runtime.ray.targets import targets_directory
from orchestrator.urls import take_over

log = logging.getLogger(__name__)

T = TypeVar("T")

TICK_S = 0.25
POLL_S = 1.0
"""How often the cluster and the control directory are looked at."""
STORAGE_PATIENCE_S = 60.0
"""How long a controller that starts waits for a run directory that cannot be read or written."""
LAST_PATIENCE_S = 600.0
"""How long a finished controller tries to give back its places while the GCS is away: nobody else would."""
LINGER_S = 20.0
"""How long a finished controller waits for its driver to fetch the result before it goes."""


class ControllerActor:
    """See the module. `spec` is what every incarnation of this run's controller is made from, `executor` makes what
    knows what is steered.

    More than 15 attributes: what the threads of the process share.
    """

    def __init__(self, spec: dict[str, Any], executor: Callable[[ExecutorContext], Executor]) -> None:
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
        self._patiently(lambda: self._set_up(executor), deadline)

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

    def _set_up(self, executor: Callable[[ExecutorContext], Executor]) -> None:
        spec, context = self._spec, ray.get_runtime_context()
        os.umask(self._directory.umask)
        about = set_up_logs(spec | {"run_id": self._directory.run_id}, f"controller-{self._lease.term}")
        log.info("controller of term %d, process %d", self._lease.term, os.getpid())
        self._job = job = Job.model_validate(spec["job"])
        self._mailboxes = Mailboxes()
        self._introductions = Introductions()
        self._farewell = threading.Event()
        self._complaint = ""
        self._queue: queue.Queue[tuple[Any, float]] = queue.Queue()
        self._me = context.current_actor
        node = str(context.get_node_id())
        given = ExecutorContext(spec, job, self._directory, self._lease, about, node, self._tell, self._end_all)
        self._executor = executor(given)
        self._clock, self._machine = self._executor.clock, self._executor.machine
        self._processes = WorkerProcesses(self._directory.run_id, self._executor.unit, self._me, self._tell)
        self._watcher = ClusterWatcher(
            self._directory, job, self._machine, self._processes.handles, self._lease, tell=self._tell,
            record=self._executor.record, event_of=self._executor.event_of, is_ephemeral=spec["ephemeral"],
        )  # fmt: skip
        self._executor.record(
            ControllerBegan(
                epoch=self._lease.term,
                pid=os.getpid(),
                session=spec["session"],
                node=node,
                own_cluster=spec["own_cluster"],
            )
        )
        # Where this process is, which on a cluster need not be where the driver is.
        host = "127.0.0.1" if spec["own_cluster"] else ray.util.get_node_ip_address()
        self._executor.open(host, self._targets())
        threading.Thread(target=self._event_loop, name="event-loop", daemon=True).start()
        threading.Thread(target=self._poll_cluster, name="poller", daemon=True).start()
        threading.Thread(target=self._reporter, name="reporter", daemon=True).start()

    def _targets(self) -> Path | None:
        try:
            return targets_directory(self._job, own_cluster=self._spec["own_cluster"], cwd=self._spec["cwd"])
        except (OSError, ValueError) as error:
            log.warning("Prometheus will not find this run by itself: %s", error)
        return None

    def _tell(self, event: Any) -> None:
        """An event that happens now."""
        self._queue.put((event, self._clock.now()))

    def _end_all(self) -> None:
        self._processes.end_all()

    # ------------------------------------------------------------------------------------ what others call

    async def report(self, worker: WorkerId, message: Any, sent: Reading) -> Any:
        """A worker's message, `sent` when by its own clock; answered at once, handled in order."""
        executor, arrived = self._executor, self._clock.now()
        self._queue.put((executor.dated(message, self._clock.shift_of(worker, sent, arrived)), arrived))
        self._introductions.hear(worker, executor.progress_of(message))
        if isinstance(message, FaultFired):
            # It happens as soon as we answer, so it has to be on record before, or it could happen twice.
            while message.index not in self._machine.fired_faults and executor.result is None:
                await asyncio.sleep(0.001)
        return executor.reply()

    @ray.method(max_task_retries=-1)
    async def orders(self, worker: WorkerId, term: int, after: int, wait_s: float) -> Delivery:
        """What `worker`, which has its orders up to number `after` from the controller of `term`, is to do next.

        Ray asks again when this controller dies, and so brings its successor and the workers together at once; a call
        that is made while there is none fails only after 2 s.
        """
        if term != self._lease.term:
            return Delivery(self._lease.term, ())
        return Delivery(self._lease.term, await self._mailboxes.of(worker).fetch(after, wait_s))

    async def introduce(self, introduction: Introduction) -> None:
        """A worker that has not spoken with this controller before says who and where it is."""
        if introduction.status is not None:
            shift = self._clock.shift_of(introduction.worker, introduction.sent, self._clock.now())
            introduction = introduction._replace(status=self._executor.dated(introduction.status, shift))
        self._introductions.add(introduction)
        handle = self._processes.handles.get(introduction.worker)
        if handle is not None:
            handle.node, handle.pid, handle.placed = introduction.node, introduction.pid, True
            self._tell(Placed(introduction.worker, introduction.node))
            if introduction.status is not None:
                # It may have told a predecessor, which knew that and is gone.
                self._tell(introduction.status.ready)

    async def start_failed(self, worker: WorkerId, detail: str, fatal: bool) -> None:
        """A worker could not be built; with `fatal` no other could either."""
        await asyncio.to_thread(self._executor.record, StartFailed(worker=worker.slot, detail=detail))
        self._processes.start_failed(worker, detail)
        if fatal:
            self._tell(Abort(detail))

    async def stop(self, reason: str) -> None:
        self._watcher.hear_follower()
        self._tell(Stop(reason))

    async def snapshot(self, wait_s: float = 0.0) -> dict[str, Any]:
        """status.json as it is now, for those that follow it; after `wait_s`, or as soon as the run is over."""
        self._watcher.hear_follower()
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while self._executor.result is None:
                    await asyncio.sleep(0.25)
        return self._executor.snapshot()

    async def result(self) -> dict[str, Any] | None:
        """The content of result.json once the run is over."""
        return self._executor.result

    async def farewell(self) -> None:
        """The driver has what it needs; a finished controller may go."""
        self._farewell.set()

    # ------------------------------------------------------------------------------------ the event loop's thread

    def _event_loop(self) -> None:
        executor = self._executor
        try:
            self._begin()
            last_tick = 0.0
            while executor.result is None:
                # Nobody is silent whose message is only waiting to be handled: the time is that of what has been.
                try:
                    event, now = self._queue.get(timeout=TICK_S)
                    self._lateness.note(self._clock.now() - now)
                    self._dispatch(event, now)
                except queue.Empty:
                    now = self._clock.now()
                if reason := executor.must_end():
                    executor.end("failed", reason, None)
                if now - last_tick >= TICK_S:
                    last_tick = now
                    self._dispatch(Tick(self._lateness.recent_s(), self._processes.asks_in_vain), now)
        except BaseException as error:
            log.exception("the controller failed")
            print(redact(traceback.format_exc()), file=sys.stderr)
            executor.end("failed", f"the controller failed: {type(error).__name__}: {error}", None)
        self._go()

    def _begin(self) -> None:
        if not self._executor.begin():
            end_workers(self._directory.run_id)
        elif self._lease.is_successor:
            self._processes.have_teachers(self._executor.worker_spec, self._job, self._executor.record)
            found = Survivors.find(
                self._processes, self._introductions, self._lateness, self._executor.warm,
                self._executor.heartbeat_timeout_s, self._tell,
            )  # fmt: skip
            self._dispatch(self._executor.resume(found.statuses, found.starting), self._clock.now())
        else:
            # Whatever is left of this run on the cluster had another driver's controller, and obeys nobody.
            end_workers(self._directory.run_id)
            # Before workers, which would take all the room that there is.
            self._processes.have_teachers(self._executor.worker_spec, self._job, self._executor.record)
            self._dispatch(Start(), self._clock.now())

    def _dispatch(self, event: Any, at: float) -> None:
        executor = self._executor
        if executor.result is not None:
            return
        if isinstance(event, FaultFired):
            if event.index in self._machine.fired_faults:
                return  # Told again, because the answer was lost with the controller.
            self._inject(event)
        executor.before(event)
        for action in self._machine.handle(event, at):
            self._carry_out(action)
        if isinstance(event, Died):
            self._processes.forget(event.worker)
            self._mailboxes.forget(event.worker)
            self._introductions.forget(event.worker)
        if isinstance(event, FaultFired):
            if executor.faults[event.index].kind == "controller":
                os.kill(os.getpid(), signal.SIGKILL)
        else:
            executor.after(event)

    def _carry_out(self, action: Any) -> None:
        executor, processes = self._executor, self._processes
        executor.log_action(action)
        match action:
            case RunEvent():
                executor.record(action)
            case RequestWorker():
                processes.request(action, executor.worker_spec(), Need.of(self._job, action.market))
            case TellShortage():
                threading.Thread(target=self._tell_shortage, args=(action,), daemon=True).start()
            case ReleaseWorker():
                if action.worker in processes.handles:
                    self._send(Leave(action.worker))
                    processes.release(action)
            case KillWorker():
                processes.kill(action)
            case Order():
                self._send(action)
            case Finish():
                executor.end(action.status, action.reason, action.digest)
            case _:
                executor.carry_out(action)

    def _tell_shortage(self, action: TellShortage) -> None:
        """On a thread of its own, as the cluster is asked for its reasons."""
        reason = why_no_room(Need.of(self._job, action.market))
        slots = [worker.slot for worker in action.workers]
        self._executor.record(Shortage(workers=slots, waited_seconds=round(action.waited_s, 1), reason=reason))

    def _send(self, order: Order) -> None:
        self._mailboxes.send(order)
        self._processes.probe(self._executor.probed_by(order))

    def _inject(self, event: FaultFired) -> None:
        """A drain or node fault is carried out here, where the cluster can be reached."""
        handle = self._processes.handles.get(event.worker) if event.worker is not None else None
        if handle is not None and handle.node is not None:
            fault = self._executor.faults[event.index]
            notice = fault_injection.practise(fault, handle.worker, handle.node, self._clock.now())
            if notice is not None:
                self._tell(notice)

    def _go(self) -> None:
        self._processes.ask_no_more()
        # Whatever has been placed meanwhile, or was lost sight of with an earlier controller.
        end_workers(self._directory.run_id, patience_s=LAST_PATIENCE_S)
        self._watcher.close()
        self._farewell.wait(timeout=LINGER_S)
        self._executor.close()
        time.sleep(0.2)
        with suppress(Exception):
            ray.kill(self._me, no_restart=True)

    # ------------------------------------------------------------------------------------ other threads

    def _poll_cluster(self) -> None:
        """Looks at what nobody tells us: placements, draining nodes, other runs."""
        while self._executor.result is None:
            time.sleep(POLL_S)
            try:
                if self._executor.result is None:
                    self._processes.learn_nodes()
                    self._watcher.look(self._clock.now())
            except Exception as error:
                log.warning("the cluster: %s: %s", type(error).__name__, error)

    def _reporter(self) -> None:
        """Takes requests and tells how things are; apart from `_poll_cluster`, as the run directory may be far away and
        slow."""
        while self._executor.result is None:
            time.sleep(POLL_S / 2)
            try:
                self._executor.look()
                self._watcher.take_requests()
                self._executor.publish()
                self._complaint = ""
            except Exception as error:
                complaint = f"{type(error).__name__}: {error}"
                if complaint != self._complaint:  # Twice a second, it would fill what log there is.
                    log.warning("the run directory: %s", complaint)
                self._complaint = complaint
