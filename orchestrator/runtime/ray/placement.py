"""Workers as Ray things: one placement group and one named, detached actor each, so that one can come or go alone."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Any

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from orchestrator.control.core.workers import WorkerId
from orchestrator.runtime.ray.names import NAMESPACE, teacher_name, worker_name
from orchestrator.runtime.ray.resource_request import Need, has_room
from orchestrator.runtime.ray.worker_actor import WorkerActor

log = logging.getLogger(__name__)


class Bundle:
    """The placement group of a unit: one worker, or a tensor-parallel group, which shares a node. It is None until Ray
    has been asked for it, by its `name`. It is given back when its last worker is gone; until then a lost one is
    replaced in it."""

    def __init__(self, name: str, group: PlacementGroup | None = None) -> None:
        self.name = name
        self.group = group
        self._workers: set[WorkerId] = set()
        self._is_given_back = False
        self._lock = threading.Lock()

    def take(self, worker: WorkerId) -> bool:
        """Whether the worker may be placed here; not any more when the place is given back."""
        with self._lock:
            if not self._is_given_back:
                self._workers.add(worker)
            return not self._is_given_back

    def leave(self, worker: WorkerId) -> None:
        with self._lock:
            self._workers.discard(worker)
            if self._workers or self._is_given_back:
                return
            self._is_given_back = True
        self._remove()

    def reserve(self, ask: Callable[[], PlacementGroup]) -> PlacementGroup:
        """The placement group, which `ask` asks Ray for if nobody has yet: by one thread only."""
        if self.group is None:
            self.group = ask()
            with self._lock:
                is_late = self._is_given_back
            if is_late:
                self._remove()
        return self.group

    def _remove(self) -> None:
        if self.group is not None:
            with suppress(Exception):
                remove_placement_group(self.group)


class WorkerHandle:
    """One worker's actor (None until Ray has been asked for it) and place; `watch` calls back when its process is
    gone."""

    def __init__(self, run_id: str, worker: WorkerId, actor: Any, place: Bundle | None) -> None:
        self.run_id = run_id
        self.worker = worker
        self.actor = actor
        self.place = place
        self.node: str | None = None
        self.pid: int | None = None
        self.placed = False
        self.is_ended = False
        self.was_asked_for = False

    @classmethod
    def to_be(cls, run_id: str, worker: WorkerId, places: Iterable[Bundle]) -> WorkerHandle:
        """Of a worker that Ray is yet to be asked for (`ask`): in one of these places of its unit, or in a new one when
        none of them is to be had any more."""
        place = next((place for place in places if place.take(worker)), None)
        if place is None:
            place = Bundle(worker_name(run_id, worker))
            place.take(worker)
        return cls(run_id, worker, None, place)

    def ask(
        self,
        spec: dict[str, Any],
        controller: Any,
        *,
        need: Need,
        avoid: Collection[str] = (),
        must_avoid: bool = False,
        lost: Collection[str] = (),
    ) -> None:
        """Asks Ray for its actor and, if it is the first in its place, for that, which `need` describes; also when
        there is no room yet. A new place is on none of the nodes to `avoid` if another has room, or in any case when it
        `must_avoid` them; and never on those that are `lost`, of which Ray may not know yet.

        Waits for a GCS that does not answer, for up to minutes, and then raises a RayError; what was asked for until
        then may yet come to be, and is found when it is asked for again.
        """
        assert self.place is not None
        place, is_again = self.place, self.was_asked_for
        self.was_asked_for = True

        def reserve() -> PlacementGroup:
            if is_again and (earlier := _group_named(place.name)) is not None:
                return earlier
            may_be_there = avoid and not must_avoid and not has_room(need, avoid)
            return _reserve(place.name, need, {*lost} if may_be_there else {*avoid, *lost})

        resources, group = spec["resources"], place.reserve(reserve)
        self.actor = (
            ray.remote(WorkerActor)
            .options(
                name=worker_name(self.run_id, self.worker),
                namespace=NAMESPACE,
                lifetime="detached",
                num_cpus=resources["cpu"],
                num_gpus=resources["gpu"] or None,
                max_restarts=0,
                get_if_exists=is_again,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=self.worker.slot % need.tensor
                ),
            )
            .remote(self.worker, spec, controller)
        )

    def take_back(self) -> None:
        """Ends what came of a request that Ray did not answer, of a worker that is not wanted any more. Raises like
        `ask`."""
        with suppress(ValueError):  # There is none by that name.
            ray.kill(ray.get_actor(worker_name(self.run_id, self.worker), namespace=NAMESPACE), no_restart=True)
        if self.place is not None and self.place.group is None:
            group = _group_named(self.place.name)
            if group is not None:
                remove_placement_group(group)

    def where(self) -> str | None:
        """The node this worker's placement group got, or None while it waits for room."""
        if self.place is None:
            return self.node
        if self.place.group is None:
            return None
        return _node_of(ray.util.placement_group_table(self.place.group))

    def watch(self, on_gone: Callable[[str], None]) -> None:
        """Sets the worker going, and calls `on_gone(detail)` from a thread of Ray's when its process has ended.

        A worker that lives already goes on; the call then waits behind the one that set it going.
        """

        def done(future: Any) -> None:
            try:
                future.result()
                on_gone("left")
            except Exception as error:
                on_gone(_death_detail(error))

        self.actor.live.remote().future().add_done_callback(done)

    def kill(self) -> None:
        """Ends the process for good, whatever it does, and gives its place back; never blocks for long. One that Ray is
        just being asked for is to be ended by who asks."""
        self.is_ended = True
        if self.pid is not None and self.node == ray.get_runtime_context().get_node_id():
            # ray.kill waits 5 s for a stopped process; the kernel does not.
            with suppress(psutil.Error, ProcessLookupError, PermissionError):
                if any("ray::" in part for part in psutil.Process(self.pid).cmdline()):
                    os.kill(self.pid, signal.SIGKILL)
        elif self.pid is not None and self.node is not None:
            self._kill_from_its_node(self.node, self.pid)
        if self.actor is not None:
            with suppress(Exception):
                ray.kill(self.actor, no_restart=True)
        self.free()

    @staticmethod
    def _kill_from_its_node(node: str, pid: int) -> None:
        with suppress(Exception):
            _kill_pid.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False)).remote(pid)

    def free(self) -> None:
        """Gives its part of the place back."""
        if self.place is not None:
            self.place.leave(self.worker)

    def kill_later(self) -> None:
        """Gives a worker that was told to leave 5 s to end in good order, then makes sure and frees its place."""
        timer = threading.Timer(5.0, self.kill)
        timer.daemon = True
        timer.start()


def _reserve(name: str, need: Need, avoid: Collection[str]) -> PlacementGroup:
    labels = dict(need.labels)
    if avoid:
        labels["ray.io/node-id"] = f"!in({','.join(sorted(avoid))})"
    # It is named after the first worker in it.
    group: PlacementGroup = placement_group(
        [dict(need.bundle) for _ in range(need.tensor)],
        strategy="STRICT_PACK" if need.tensor > 1 else "PACK",
        lifetime="detached",
        name=name,
        bundle_label_selector=[labels] * need.tensor if labels else None,
    )
    return group


def find_workers(run_id: str, tensor: int) -> list[WorkerHandle]:
    """The workers of an earlier controller that Ray knows, in their units' places."""
    places: dict[int, tuple[Bundle, str | None]] = {}
    # Of several of a unit (one was being given back) the last counts.
    for first, group, node in sorted(_groups(run_id), key=lambda found: found[0].incarnation):
        places[first.slot // tensor] = Bundle(worker_name(run_id, first), group), node
    handles = []
    for worker, actor in _actors(run_id).items():
        place, node = places.get(worker.slot // tensor, (None, None))
        if place is not None:
            place.take(worker)
        handle = WorkerHandle(run_id, worker, actor, place)
        handle.placed, handle.node = node is not None, node
        handles.append(handle)
    return handles


def _worker_named(run_id: str, name: str) -> WorkerId | None:
    """The worker of this run that an actor or a placement group is named after."""
    prefix = worker_name(run_id, WorkerId(0, 0)).removesuffix("0.0")
    return WorkerId(*map(int, name.removeprefix(prefix).split("."))) if name.startswith(prefix) else None


def _actors(run_id: str) -> dict[WorkerId, Any]:
    """Those of its workers that Ray knows by name."""
    found = {}
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] == NAMESPACE and (worker := _worker_named(run_id, entry["name"])) is not None:
            with suppress(ValueError):
                found[worker] = ray.get_actor(entry["name"], namespace=NAMESPACE)
    return found


def _teachers(run_id: str) -> list[Any]:
    """The processes that answer for its teacher."""
    names = [entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)]
    found = []
    for name in names:
        if name.startswith(teacher_name(run_id, "")):
            with suppress(ValueError):
                found.append(ray.get_actor(name, namespace=NAMESPACE))
    return found


def _group_named(name: str) -> PlacementGroup | None:
    """What an earlier attempt to ask for it left, if it came to be."""
    for group_id, entry in ray.util.placement_group_table().items():
        if entry["name"] == name and entry["state"] != "REMOVED":
            return PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id)))
    return None


def _groups(run_id: str) -> list[tuple[WorkerId, PlacementGroup, str | None]]:
    """Its placement groups: the first worker in each, and on which node it is."""
    return [
        (worker, PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))), _node_of(entry))
        for group_id, entry in ray.util.placement_group_table().items()
        if entry["state"] != "REMOVED" and (worker := _worker_named(run_id, entry["name"])) is not None
    ]


def _node_of(entry: dict[str, Any]) -> str | None:
    """Where a placement group is, by its entry in Ray's table; None while it waits for room."""
    if entry.get("state") != "CREATED":
        return None
    return next(iter(entry["bundles_to_node_id"].values()), None)


@ray.remote(num_cpus=0, max_retries=0)
def _kill_pid(pid: int) -> None:
    with suppress(psutil.Error, ProcessLookupError, PermissionError):
        if any("ray::" in part for part in psutil.Process(pid).cmdline()):
            os.kill(pid, signal.SIGKILL)


def _death_detail(error: Exception) -> str:
    """What Ray knows of a death, without its advice."""
    if isinstance(error, ray.exceptions.ActorDiedError) and "unexpectedly" in str(error):
        return "its process ended unexpectedly"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def release_places(run_id: str, taken: Iterable[Bundle]) -> None:
    """Gives back the places of a run that none of its workers has: those that an earlier controller was about to give
    back, or had asked for."""
    kept = {place.group.id for place in taken if place.group is not None}
    for _, group, _ in _groups(run_id):
        if group.id not in kept:
            with suppress(Exception):
                remove_placement_group(group)


def end_workers(run_id: str, patience_s: float = 0.0) -> None:
    """Ends whatever workers of a run are left, and its teachers, and gives back their places, also those that no worker
    came to fill. Ray is asked again for this long while it does not answer."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            for actor in (*_actors(run_id).values(), *_teachers(run_id)):
                with suppress(Exception):
                    ray.kill(actor, no_restart=True)
            release_places(run_id, ())
            return
        except Exception as error:
            if time.monotonic() > deadline:
                log.warning("what is left of this run on the cluster: %s: %s", type(error).__name__, error)
                return
            time.sleep(1.0)
