"""Finding, starting and following the controller of a run, and ending what is left of one."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray

from monitoring.clock import RunClock
from monitoring.events import Recovered, RunFinished
from monitoring.goodput import read_ledger
from monitoring.records import RecordFile, read_records
from orchestrator.rundir import RunDirectory, RunDirectoryError
from orchestrator.runtime.executor import Executor, ExecutorContext
from orchestrator.runtime.interruption import NOBODY_READS, Interruption
from orchestrator.runtime.ray.controller_actor import ControllerActor
from orchestrator.runtime.ray.head_watch import HeadWatch, watching_head
from orchestrator.runtime.ray.names import NAMESPACE, controller_name
from orchestrator.runtime.ray.placement import end_workers
from orchestrator.runtime.ray.session import HEAD, ClusterError
from orchestrator.runtime.result import outline
from orchestrator.runtime.run_log import generation_entry, is_training, recovery_entry
from orchestrator.runtime.training_executor import TrainingExecutor

log = logging.getLogger(__name__)

SILENCE_S = 90.0
START_SILENCE_S = 600.0
"""How long a controller may be silent, and how long one that starts: Ray may have to bring it its packages first."""
POLL_S = 0.8
"""How often the display is brought up to date; what it shows is read from the run directory."""
ELSEWHERE_PATIENCE_S = 90.0
"""How long a controller that this cluster does not have may keep the run: one of a cluster that has just been lost ends
when its raylet does, and its machine's lock after that."""


def find_controller(
    directory: RunDirectory, on_note: Callable[[str], None], *, even_if_over: bool = False
) -> Any | None:
    """The controller of a run that is under way on this cluster; None when there is none. One whose run is over counts
    only `even_if_over`: it waits for somebody to fetch the result, and is told that nobody needs to.

    Raises RunDirectoryError when a controller elsewhere has the run, and keeps it.
    """
    deadline = time.monotonic() + ELSEWHERE_PATIENCE_S
    is_told = False
    while True:
        controller = _named(directory)
        if controller is not None:
            if even_if_over or not _dismissed(controller):
                return controller
        elif not (directory.is_steered or directory.is_driven):
            return None
        elif time.monotonic() > deadline:
            raise RunDirectoryError(
                f"{directory.path} is being run right now, and not on this cluster; "
                f"see `orchestrator status {directory.path}`"
            )
        elif not is_told:
            is_told = True
            on_note("a controller that this cluster does not have keeps the run; waiting for its end")
        time.sleep(0.2)


def _named(directory: RunDirectory) -> Any | None:
    with suppress(ValueError):
        return ray.get_actor(controller_name(directory.run_id), namespace=NAMESPACE)
    return None


def _may_come_back(controller: Any, directory: RunDirectory) -> bool:
    """Whether Ray still knows it, or cannot be asked. Another driver's has its name, but is another."""
    try:
        named = _named(directory)
    except Exception:
        return True
    return named is not None and named._actor_id == controller._actor_id


def _dismissed(controller: Any) -> bool:
    """Whether the controller's run is over; then it is told to go."""
    try:
        if not ray.get(controller.snapshot.remote(), timeout=5.0)["over"]:
            return False
        ray.get(controller.farewell.remote(), timeout=5.0)
    except ray.exceptions.ActorDiedError:
        return True
    except (ray.exceptions.RayError, TimeoutError):
        return False  # Being restarted, most likely.
    return True


def start_controller(directory: RunDirectory, spec: dict[str, Any], own: bool) -> Any:
    """On the head, away from workers whose nodes come and go; anywhere else if there is no head.

    By labels, as Ray forgets a soft affinity to a node when it starts an actor, and at the latest when it restarts one.
    """
    head = {"ray.io/node-id": _head_node()}
    executor: Callable[[ExecutorContext], Executor] = TrainingExecutor
    anywhere = [{"label_selector": {"ray.io/node-id": "!none"}}]
    where = {"resources": {HEAD: 0.001}} if own else {"label_selector": head, "fallback_strategy": anywhere}
    return (
        ray.remote(ControllerActor)
        .options(
            name=controller_name(directory.run_id),
            namespace=NAMESPACE,
            # The first of two drivers that start at once makes it; the other follows that.
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=1000,
            **where,
        )
        .remote(spec, executor)
    )


def _head_node() -> str:
    for node in ray.nodes():
        if node["Alive"] and "node:__internal_head__" in node["Resources"]:
            return str(node["NodeID"])
    return str(ray.get_runtime_context().get_node_id())


def follow(
    controller: Any,
    directory: RunDirectory,
    interruption: Interruption,
    on_update: Callable[[dict[str, Any]], None],
    on_note: Callable[[str], None],
    *,
    is_ours: bool = True,
    own_cluster: bool = False,
) -> dict[str, Any] | None:
    """Shows a run until it is over. Signals end one that `is_ours`, and otherwise only this (then None is returned).

    When the terminal goes away, a run on our `own_cluster`, which cannot outlive this process, ends in good order too;
    on a cluster of others' it goes on.

    Raises ClusterError when the controller is gone for good or silent for long, or the head of the cluster is, or the
    terminal is gone and the run goes on; RunDirectoryError when the controller was refused.
    """
    with watching_head(directory, on_note) as head:
        return _follow(controller, directory, interruption, on_update, head, is_ours=is_ours, own_cluster=own_cluster)


def _follow(
    controller: Any,
    directory: RunDirectory,
    interruption: Interruption,
    on_update: Callable[[dict[str, Any]], None],
    head: HeadWatch,
    *,
    is_ours: bool,
    own_cluster: bool,
) -> dict[str, Any] | None:
    heard, patience_s = time.monotonic(), START_SILENCE_S
    stops_sent = 0
    while True:
        if interruption.count and not is_ours:
            return None
        head.check()
        if interruption.is_left and interruption.count == 1 and not own_cluster:
            raise ClusterError(
                f"the terminal is gone ({interruption.name}); the run goes on: `orchestrator attach {directory.path}` "
                "follows it again"
            )
        if interruption.count >= 2:
            return cut_short(directory, f"{interruption.name} twice")
        try:
            if interruption.count > stops_sent:
                ray.get(controller.stop.remote(interruption.name), timeout=5.0)
                stops_sent = interruption.count
            snapshot = ray.get(controller.snapshot.remote(0.0 if interruption.count else POLL_S), timeout=5.0)
            heard, patience_s = time.monotonic(), SILENCE_S
            try:
                on_update(snapshot)
            except BrokenPipeError:
                interruption.leave(NOBODY_READS)
            except Exception as error:
                log.debug("the run could not be shown: %s", error)  # It does not fail for that.
            if snapshot["over"]:
                result: dict[str, Any] = ray.get(controller.result.remote(), timeout=5.0)
                controller.farewell.remote()
                return result
        except (ray.exceptions.RayError, TimeoutError) as error:
            # Ray says so of calls to one that it starts again, too, if that was on a node that drains.
            if isinstance(error, ray.exceptions.ActorDiedError) and not _may_come_back(controller, directory):
                return _without_controller(directory, error)
            # Restarting, most likely; the workers train on meanwhile.
            if time.monotonic() - heard > patience_s:
                raise ClusterError(
                    f"the controller of {directory.path} has not answered for {patience_s:.0f} s; the run may go on: "
                    f"see `orchestrator status {directory.path}`, and `orchestrator attach` to follow it again"
                ) from None
            time.sleep(0.1)
        if interruption.count:
            time.sleep(0.1)


def _without_controller(directory: RunDirectory, error: Exception) -> dict[str, Any]:
    """The result of a run whose controller ended before it could be asked. One that is dead without a result will not
    come back: what it left on this cluster is ended, and that is the result."""
    if (final := directory.final_result) is not None:
        return final
    refused = re.search(r"RunDirectoryError: (.*)", str(error))
    if refused is not None:
        raise RunDirectoryError(refused[1]) from None
    ended = directory.read_json("result.json")
    if ended is not None:
        return dict(ended)
    with suppress(ray.exceptions.RayError):
        if _named(directory) is not None:
            raise ClusterError(f"another driver has {directory.path} now: `orchestrator attach` follows it") from None
    end_run(directory.run_id)
    reason = f"the controller died and could not be restarted: {error}"
    if directory.events.exists() and not directory.is_steered:
        leave_result(directory, unfinished_result(directory, "failed", reason))
    raise ClusterError(reason) from error


def cut_short(directory: RunDirectory, reason: str) -> dict[str, Any]:
    """Ends everything now; what was committed is on record, what was not checkpointed is lost."""
    end_run(directory.run_id)
    if (ended := directory.read_json("result.json")) is not None:
        return dict(ended)
    result = unfinished_result(directory, "stopped", reason)
    if leave_result(directory, result):
        clock = RunClock(read_records(directory.events))
        ended = RunFinished(status="stopped", reason=reason)
        RecordFile(directory.events).append(ended.record(clock.stamp(clock.now())))
    return result


def leave_result(directory: RunDirectory, result: dict[str, Any]) -> bool:
    """Writes result.json; where that cannot be done, `result` says so, as a run that has failed."""
    try:
        directory.write_json("result.json", result)
    except OSError as error:
        log.error("result.json cannot be written: %s", error)
        why = f"{result['reason']}; the run's end could not be recorded: {error}"
        result |= {"status": "failed", "reason": why}
        return False
    return True


def unfinished_result(directory: RunDirectory, status: str, reason: str) -> dict[str, Any]:
    """result.json of a run that nobody is left to end in good order, from what is on record."""
    steps = list(read_records(directory.metrics))
    events = list(read_records(directory.events))
    account = read_ledger(events, steps).account(RunClock(events).now())
    return outline(directory, steps, status, reason) | {
        "wall_seconds": round(account.wall_seconds, 3),
        "goodput_ratio": round(account.ratio, 4),
        "state_digest": None,
        "data_digest": None,
        "generations": [generation_entry(event) for event in events if is_training(event)],
        "recoveries": [recovery_entry(event) for event in events if event["kind"] == Recovered.kind],
    }


def end_run(run_id: str) -> None:
    """Ends whatever actors and placement groups of a run are left, controller first so that it cannot ask for more."""
    if not ray.is_initialized():
        return  # Asking would start a Ray.
    with suppress(Exception):
        ray.kill(ray.get_actor(controller_name(run_id), namespace=NAMESPACE), no_restart=True)
    end_workers(run_id)
