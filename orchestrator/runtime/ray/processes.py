"""The processes of workers: asked for, watched, ended, and found again by another controller."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from orchestrator.control.core.protocol import Died, KillWorker, ReleaseWorker, RequestWorker
from orchestrator.control.core.workers import WorkerId
from orchestrator.runtime.ray.placement import (
    Bundle,
    WorkerHandle,
    find_workers,
    raylet_is_gone,
    refuses_connections,
    release_places,
)
from orchestrator.runtime.ray.resource_request import Need


class WorkerProcesses:
    """All workers of `run_id` that are asked for or live, by `handles`. `unit` slots share a node; `controller` is the
    actor that they report to. When a process is gone that goes to `tell`."""

    def __init__(self, run_id: str, unit: int, controller: Any, tell: Callable[[Died], None]) -> None:
        self.handles: dict[WorkerId, WorkerHandle] = {}
        self._run_id = run_id
        self._unit = unit
        self._controller = controller
        self._tell = tell
        self._start_errors: dict[WorkerId, str] = {}
        self._lost_nodes: set[str] = set()

    # ------------------------------------------------------------------------------------ they come

    def request(self, action: RequestWorker, spec: dict[str, Any], need: Need) -> None:
        """Asks Ray for one more, made from `spec`, where there is room for what it needs."""
        handle = WorkerHandle.request(
            self._run_id, action.worker, spec, self._controller, need=need,
            places=self._places_of_unit(action.worker), avoid=action.avoid, must_avoid=action.must_avoid,
            lost=self._lost_nodes,
        )  # fmt: skip
        self.adopt(handle)

    def _places_of_unit(self, worker: WorkerId) -> list[Bundle]:
        """Where the others of a worker's unit are, the newest first; also those that are gone and not yet dealt with,
        but for lost nodes."""
        unit = [h for h in list(self.handles.values()) if h.worker.slot // self._unit == worker.slot // self._unit]
        unit.sort(key=lambda handle: -handle.worker.incarnation)
        return [h.place for h in unit if h.place is not None and h.node not in self._lost_nodes]

    def find(self) -> dict[WorkerId, WorkerHandle]:
        """Those of an earlier controller that have a place. The others are ended: they wait for room, and will be asked
        for again; why they waited, and for how long, went with the predecessor."""
        placed: dict[WorkerId, WorkerHandle] = {}
        for handle in find_workers(self._run_id, self._unit):
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
        release_places(self._run_id, [h.place for h in self.handles.values() if h.place is not None])

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
            if handle.node is not None and raylet_is_gone(handle.node):
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
