"""Workers as Ray things: one placement group and one named, detached actor each, so that one can come or go alone."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from orchestrator.cluster.worker_actor import WorkerActor
from orchestrator.messages import WorkerId

NAMESPACE = "orchestrator"
"""All actors of all runs live in this Ray namespace."""


def controller_name(run_id: str) -> str:
    return f"{run_id}/controller"


def worker_name(run_id: str, worker: WorkerId) -> str:
    return f"{run_id}/worker-{worker}"


class WorkerHandle:
    """One worker's actor and placement group; `watch` calls back when its process is gone."""

    def __init__(self, run_id: str, worker: WorkerId, actor: Any, group: PlacementGroup | None) -> None:
        self.run_id = run_id
        self.worker = worker
        self.actor = actor
        self.group = group
        self.node: str | None = None
        self.pid: int | None = None
        self.placed = False

    @classmethod
    def request(cls, run_id: str, worker: WorkerId, spec: dict[str, Any], controller: Any) -> WorkerHandle:
        """Asks Ray for a place and an actor in it; returns at once, also when there is no room yet."""
        resources = spec["resources"]
        bundle = {"CPU": float(resources["cpu"])}
        if resources["gpu"]:
            bundle["GPU"] = float(resources["gpu"])
        name = worker_name(run_id, worker)
        group = placement_group([bundle], strategy="PACK", lifetime="detached", name=name)
        actor = (
            ray.remote(WorkerActor)
            .options(
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                num_cpus=resources["cpu"],
                num_gpus=resources["gpu"] or None,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=group),
            )
            .remote(worker, spec, controller)
        )
        return cls(run_id, worker, actor, group)

    @classmethod
    def find(cls, run_id: str, worker: WorkerId) -> WorkerHandle | None:
        """The worker of an earlier controller, if it still lives."""
        name = worker_name(run_id, worker)
        try:
            actor = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return None
        group = None
        with suppress(ValueError):
            group = ray.util.get_placement_group(name)
        return cls(run_id, worker, actor, group)

    def where(self) -> str | None:
        """The node this worker's placement group got, or None while it waits for room."""
        if self.group is None:
            return self.node
        table = ray.util.placement_group_table(self.group)
        if table.get("state") != "CREATED":
            return None
        return next(iter(table["bundles_to_node_id"].values()), None)

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
        """Ends the process for good, whatever it does, and gives its place back; never blocks for long."""
        if self.pid is not None and self.node == ray.get_runtime_context().get_node_id():
            # ray.kill waits 5 s for a stopped process; the kernel does not.
            with suppress(psutil.Error, ProcessLookupError, PermissionError):
                if any("ray::" in part for part in psutil.Process(self.pid).cmdline()):
                    os.kill(self.pid, signal.SIGKILL)
        elif self.pid is not None and self.node is not None:
            self._kill_from_its_node(self.node, self.pid)
        with suppress(Exception):
            ray.kill(self.actor, no_restart=True)
        self.free()

    @staticmethod
    def _kill_from_its_node(node: str, pid: int) -> None:
        with suppress(Exception):
            _kill_pid.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False)).remote(pid)

    def free(self) -> None:
        """Gives the place back."""
        if self.group is not None:
            with suppress(Exception):
                remove_placement_group(self.group)
            self.group = None

    def kill_later(self) -> None:
        """Gives a worker that was told to leave 5 s to end in good order, then makes sure and frees its place."""
        timer = threading.Timer(5.0, self.kill)
        timer.daemon = True
        timer.start()


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


def refuses_connections(host: str, port: int) -> bool:
    """Whether a process that listened on a port is gone: its machine answers, and says that nobody is there.

    The kernel tells within a millisecond what Ray's own bookkeeping tells within tens, or not at all when the node's
    raylet died with it. A stopped process still accepts, so it is not taken for dead.
    """
    try:
        socket.create_connection((host, port), timeout=0.5).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def raylet_is_gone(node_id: str) -> bool:
    """Whether a node's raylet no longer answers its port. Ray itself takes 12 s and more to say so."""
    for node in ray.nodes():
        if node["NodeID"] == node_id:
            if not node["Alive"]:
                return True
            try:
                socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=0.5).close()
            except OSError:
                return True
            return False
    return True


def end_workers(run_id: str) -> None:
    """Ends whatever workers of a run are left, and gives back their places, also those that no worker came to fill."""
    prefix = worker_name(run_id, WorkerId(0, 0)).removesuffix("0.0")
    with suppress(Exception):
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] == NAMESPACE and entry["name"].startswith(prefix):
                with suppress(Exception):
                    ray.kill(ray.get_actor(entry["name"], namespace=NAMESPACE), no_restart=True)
        for group_id, entry in ray.util.placement_group_table().items():
            if entry["name"].startswith(prefix) and entry["state"] != "REMOVED":
                with suppress(Exception):
                    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))
