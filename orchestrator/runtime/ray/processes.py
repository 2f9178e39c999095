"""The processes of workers: asked for, watched, ended, and found again by another controller."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import ray

from monitoring.events import RunEvent
from orchestrator.control.core.protocol import Abort, Died, KillWorker, ReleaseWorker, RequestWorker
from orchestrator.control.core.workers import WorkerId
from orchestrator.job import Job
from orchestrator.runtime.ray.placement import (
    Bundle,
    WorkerHandle,
    find_workers,
    release_places,
)
from orchestrator.runtime.ray.presence import Raylets, refuses_connections
from orchestrator.runtime.ray.resource_request import Need
from orchestrator.runtime.ray.teacher_actor import TeachersLease

log = logging.getLogger(__name__)

T = TypeVar("T")

AGAIN_S = 1.0
"""How long it waits before it asks once more where the GCS did not answer."""
SILENT_S = 5.0
"""A request takes milliseconds."""
MOST_ASKING_S = 70.0
"""Longer than Ray waits for a GCS that does not answer to one request."""


class WorkerProcesses:
    """All workers of `run_id` that are asked for or live, by `handles`. `unit` slots share a node; `controller` is the
    actor that they report to. When a process is gone that goes to `tell`.

    Ray is asked for workers on a thread of its own, in the order of the requests: while the GCS is away that takes as
    long as the GCS is, and those that live train on meanwhile, and recover from what happens to them.
    """

    def __init__(self, run_id: str, unit: int, controller: Any, tell: Callable[[Died | Abort], None]) -> None:
        self.handles: dict[WorkerId, WorkerHandle] = {}
        self._raylets = Raylets()
        self._run_id = run_id
        self._unit = unit
        self._controller = controller
        self._tell = tell
        self._start_errors: dict[WorkerId, str] = {}
        self._lost_nodes: set[str] = set()
        self._teachers: TeachersLease | None = None
        self._requests: queue.SimpleQueue[tuple[WorkerHandle, Callable[[], None]] | None] = queue.SimpleQueue()
        self._asking_since: float | None = None
        self._asking = threading.Thread(target=self._ask_for_each, name="requests", daemon=True)
        self._asking.start()

    # ------------------------------------------------------------------------------------ they come

    def request(self, action: RequestWorker, spec: dict[str, Any], need: Need) -> None:
        """Has Ray asked for one more, made from `spec`, where there is room for what it needs."""
        handle = WorkerHandle.to_be(self._run_id, action.worker, self._places_of_unit(action))
        self.handles[handle.worker] = handle
        ask = partial(
            handle.ask, spec, self._controller, need=need, avoid=action.avoid, must_avoid=action.must_avoid,
            lost=self._lost_nodes,
        )  # fmt: skip
        self._requests.put((handle, ask))

    def _ask_for_each(self) -> None:
        while (request := self._requests.get()) is not None:
            handle, ask = request
            self._asking_since = time.monotonic()
            try:
                self._ask(handle, ask)
            except Exception as error:
                log.exception("worker %s cannot be asked for", handle.worker)
                why = f"worker {handle.worker} cannot be asked for: {type(error).__name__}: {error}"
                # Of a run that has trained it is not the end: the next request may fare better.
                self._tell(Abort(why))
                self._tell(Died(handle.worker, why))
            self._asking_since = None

    def _ask(self, handle: WorkerHandle, ask: Callable[[], None]) -> None:
        """Until it is asked for, or not wanted any more."""

        def ask_if_wanted() -> None:
            if not handle.is_ended:
                ask()

        _patiently(ask_if_wanted)
        if handle.actor is None:
            if handle.was_asked_for:
                _patiently(handle.take_back)
            self._tell(Died(handle.worker, "not wanted any more"))
            return
        self._watch(handle)
        if handle.is_ended:
            handle.kill()

    @property
    def asks_in_vain(self) -> bool:
        """Whether Ray has not answered a request for some time."""
        since = self._asking_since
        return since is not None and time.monotonic() - since > SILENT_S

    def ask_no_more(self) -> None:
        """When all that were asked for are to be ended: waits for the request that is under way."""
        self._requests.put(None)
        self._asking.join(MOST_ASKING_S)

    def _places_of_unit(self, action: RequestWorker) -> list[Bundle]:
        """Where the others of a worker's unit are, the newest first; also those that are gone and not yet dealt with,
        but for lost nodes, and for those to avoid, unless others of the unit are there."""
        number = action.worker.slot // self._unit
        unit = [handle for handle in list(self.handles.values()) if handle.worker.slot // self._unit == number]
        unit.sort(key=lambda handle: -handle.worker.incarnation)
        shunned = self._lost_nodes | (set(action.avoid) if self._unit == 1 else set())
        return [handle.place for handle in unit if handle.place is not None and handle.node not in shunned]

    def have_teachers(
        self, spec: Callable[[], dict[str, Any]], job: Job, record: Callable[[RunEvent], object]
    ) -> None:  # fmt: skip
        """Has Ray asked for those of the job, if it wants any; they hear of the run with every `learn_nodes`."""
        if job.elastic.teachers:
            self._teachers = TeachersLease(self._run_id, spec(), job, record)

    def learn_nodes(self) -> None:
        """Where the nodes of all workers are, while there is a GCS to ask."""
        if self._teachers is not None:
            self._teachers.look()
        self._raylets.learn({handle.node for handle in list(self.handles.values()) if handle.node is not None})

    def find(self) -> dict[WorkerId, WorkerHandle]:
        """Those of an earlier controller that have a place. The others are ended: they wait for room, and will be asked
        for again; why they waited, and for how long, went with the predecessor."""
        placed: dict[WorkerId, WorkerHandle] = {}
        handles = _patiently(lambda: find_workers(self._run_id, self._unit))
        _patiently(lambda: self._raylets.learn({handle.node for handle in handles if handle.node is not None}))
        for handle in handles:
            if handle.placed:
                placed[handle.worker] = handle
            else:
                handle.kill()
        return placed

    def adopt(self, handle: WorkerHandle) -> None:
        """This one counts from here on."""
        self.handles[handle.worker] = handle
        self._watch(handle)

    def release_other_places(self) -> None:
        """Gives back those of an earlier controller that none of these workers has."""
        taken = [h.place for h in self.handles.values() if h.place is not None]
        _patiently(lambda: release_places(self._run_id, taken))

    def start_failed(self, worker: WorkerId, detail: str) -> None:
        """Why it is going to die."""
        self._start_errors[worker] = detail

    # ------------------------------------------------------------------------------------ and go

    def _watch(self, handle: WorkerHandle) -> None:
        def gone(detail: str) -> None:
            node_lost = self.is_lost(handle)
            if self.handles.get(handle.worker) is not handle:
                # It was let go, and had time to leave. Not on this thread, which is Ray's own.
                threading.Thread(target=handle.free, daemon=True).start()
            why = self._start_errors.pop(handle.worker, detail)
            self._tell(Died(handle.worker, why, node_lost))

        handle.watch(gone)

    def is_lost(self, handle: WorkerHandle) -> bool:
        """Whether a worker's node is gone, as far as can be told; then no other is placed there any more."""
        with suppress(Exception):
            if handle.node is not None and self._raylets.is_gone(handle.node):
                self._lost_nodes.add(handle.node)
                return True
        return False

    def probe(self, endpoints: Mapping[WorkerId, tuple[str, int]]) -> None:
        """Finds out which of these workers, that listened there, are gone, without waiting for Ray to say so."""

        def look(worker: WorkerId, host: str, port: int) -> None:
            handle = self.handles.get(worker)
            if handle is not None and refuses_connections(host, port):
                self._tell(Died(worker, "its process is gone", self.is_lost(handle)))

        for worker, (host, port) in endpoints.items():
            threading.Thread(target=look, args=(worker, host, port), daemon=True).start()

    def release(self, action: ReleaseWorker) -> None:
        """It has been told to leave. One that waits for a place goes at once, or the autoscaler might yet start a node
        for it."""
        if (leaving := self.handles.pop(action.worker, None)) is not None:
            if leaving.placed:
                leaving.kill_later()
            else:
                threading.Thread(target=leaving.kill, daemon=True).start()

    def kill(self, action: KillWorker) -> None:
        """Off the caller's thread: recovery must not wait until Ray has finished with a dead worker."""
        self.forget(action.worker)

    def forget(self, worker: WorkerId) -> None:
        """It is dead, or is to be. Its place outlives it, and no other could have it."""
        if (handle := self.handles.pop(worker, None)) is not None:
            threading.Thread(target=handle.kill, daemon=True).start()

    def end_all(self) -> None:
        for handle in list(self.handles.values()):
            handle.kill()


def _patiently(call: Callable[[], T]) -> T:
    """What `call` returns once the GCS answers."""
    while True:
        try:
            return call()
        except (ray.exceptions.RayError, TimeoutError) as error:
            log.warning("Ray is asked again: %s: %s", type(error).__name__, error)
            time.sleep(AGAIN_S)
