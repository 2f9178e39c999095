"""What the controller has to look for, as nobody tells it: places found, nodes that drain or start, other runs that
wait for room, requests from the command line, and whether it is still wanted."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from monitoring.events import ABSENT, RequestAnswered, RunEvent
from orchestrator.control.core.machine import Machine
from orchestrator.control.core.protocol import GiveWay, NodesStarting, Placed, Resize, Stop
from orchestrator.control.core.workers import WorkerId
from orchestrator.job import Job
from orchestrator.rundir import RunDirectory
from orchestrator.runtime.lease import Lease
from orchestrator.runtime.ray.drains import DrainWatch
from orchestrator.runtime.ray.placement import WorkerHandle
from orchestrator.runtime.ray.resource_request import Need, nodes_by_id, nodes_starting
from orchestrator.runtime.ray.run_queue import RunQueue

log = logging.getLogger(__name__)

STARTING_POLL_S = 5.0
"""How often the autoscaler is asked whether nodes are starting, while workers wait for room."""
FOLLOWER_SILENCE_S = 15.0
"""How long the driver of an ephemeral run may be silent before the run ends."""


class ClusterWatcher:
    """Events go to `tell`; `record` puts something on record, `event_of` knows the requests that are the machine's own.
    `handles` are those of all workers, as they are when it looks."""

    def __init__(
        self,
        directory: RunDirectory,
        job: Job,
        machine: Machine,
        handles: Mapping[WorkerId, WorkerHandle],
        lease: Lease,
        *,
        tell: Callable[[Any], None],
        record: Callable[[RunEvent], None],
        event_of: Callable[[Mapping[str, Any]], Any],
        is_ephemeral: bool,
    ) -> None:
        self._directory = directory
        self._machine = machine
        self._handles = handles
        self._lease = lease
        self._tell = tell
        self._record = record
        self._event_of = event_of
        self._is_ephemeral = is_ephemeral
        self._drains = DrainWatch()
        self._turns = RunQueue(directory.run_id, job.elastic.scaling.turn_s)
        self._need = Need.of(job, f"in({','.join(job.resources.market)})" if job.resources.market else "")
        self._nodes: list[dict[str, Any]] = []
        self._asked_at = 0.0
        self._follower_heard = time.monotonic()

    def hear_follower(self) -> None:
        """Somebody follows the run."""
        self._follower_heard = time.monotonic()

    def close(self) -> None:
        """The run is over."""
        self._turns.leave()

    def look(self, now: float) -> None:
        """Once, at `now` (on the run's line of time). Ends this process when it is not wanted any more, or not here."""
        if self._lease.is_over():
            # Ray may start this actor again, which then sees that it is not wanted.
            log.error("a newer controller has the run: this one ends")
            os._exit(6)
        silent_s = time.monotonic() - self._follower_heard
        if self._is_ephemeral and silent_s > FOLLOWER_SILENCE_S:
            self._tell(Stop(f"its driver has been silent for {silent_s:.0f} s (--ephemeral)"))
        for handle in self._workers():
            if not handle.placed and (node := handle.where()) is not None:
                handle.placed, handle.node = True, node
                self._tell(Placed(handle.worker, node))
        for notice in self._drains.news(self._workers(), now):
            self._tell(notice)
        if self._drains.concerns_me:
            log.warning(
                "this node drains: Ray starts the next controller elsewhere, and the workers train on meanwhile"
            )
            # Records are written unbuffered, and closing them here could trip the thread that handles events.
            os._exit(7)
        self._look_for_starting_nodes(now)
        self._take_turns(now)

    def _workers(self) -> list[WorkerHandle]:
        return list(self._handles.values())

    def _look_for_starting_nodes(self, now: float) -> None:
        """Only while somebody waits for room."""
        if now - self._asked_at < STARTING_POLL_S or all(handle.placed for handle in self._workers()):
            return
        self._asked_at = now
        if (nodes := nodes_starting()) > 0:
            self._tell(NodesStarting(nodes))

    def _take_turns(self, now: float) -> None:
        """With other runs that wait for room, while this one does."""
        wants, gives_way_to, to = self._machine.wants_room, self._machine.gives_way_to, ""
        if wants != "no":
            if not gives_way_to:
                # What it has now, and had when it gave that back.
                self._nodes = nodes_by_id({handle.node for handle in self._workers() if handle.node is not None})
            to = self._turns.look(self._need, now, firm=wants == "firmly", could_use=self._has_place_for)
        else:
            self._turns.leave()
        if to != gives_way_to:
            self._tell(GiveWay(to))

    def _has_place_for(self, need: Need) -> bool:
        return any(need.fits(node["Resources"], node.get("Labels", {})) for node in self._nodes)

    def take_requests(self) -> None:
        """Those from the command line, in the run directory. Apart from `look`, which asks a cluster that may not
        answer."""
        for request in self._directory.take_requests():
            error = ""
            if request.get("error"):
                log.warning("in control/: %s", request["error"])
                error = request["error"]
            elif request["kind"] == "resize":
                self._tell(Resize(request["workers"]))
            elif request["kind"] == "stop":
                self._tell(Stop(str(request.get("reason", "stop requested"))))
            elif (event := self._event_of(request)) is not None:
                self._tell(event)
            else:
                error = f"unknown request {request['kind']!r}"
            self._record(RequestAnswered(id=request["id"], request=request["kind"], error=error or ABSENT))
