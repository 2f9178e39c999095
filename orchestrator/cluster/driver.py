"""The driver: prepares the data, starts or finds the run's controller, follows it, and leaves nothing behind."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from monitoring import discovery
from monitoring.goodput import read_ledger
from monitoring.logs import LogContext, logging_to
from monitoring.records import RecordFile, read_records
from monitoring.sinks.feeder import feeding
from orchestrator.checkpoint.of_run import catalog_of, secret_of
from orchestrator.cluster.chronicle import generation_entry, is_training, recovery_entry
from orchestrator.cluster.controller_actor import ControllerActor, targets_directory
from orchestrator.cluster.placement import NAMESPACE, controller_name, end_workers
from orchestrator.cluster.session import HEAD, ClusterError, connected, has_cluster, ray_session, working_directory
from orchestrator.data import Dataset
from orchestrator.data.of_job import dataset_of, prepare_stores
from orchestrator.data.store import RunTasks
from orchestrator.job import Job
from orchestrator.rundir import RunDirectory, RunDirectoryError

log = logging.getLogger(__name__)

_PARALLEL_BYTES = 64 << 20
"""Below this much text, tokenising here is faster than starting Ray workers for it."""

CONTROLLER_SILENCE_S = 90.0
POLL_S = 0.8
"""How often the display is brought up to date; what it shows is read from the run directory."""

Update = Callable[[dict[str, Any]], None]


class Interrupted(BaseException):
    """A signal came before there was a run that could be ended in good order."""


class Interruption:
    """What the user's signals ask for: the first ends the run in good order, the second at once.

    While the run is being prepared (`follows` is false) a signal ends that, by an exception.
    """

    def __init__(self) -> None:
        self.count = 0
        self.name = ""
        self.follows = False

    @contextmanager
    def listening(self) -> Iterator[Interruption]:
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.arm()
        try:
            yield self
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in previous.items():
                    signal.signal(number, handler)

    def arm(self) -> None:
        """Takes the signals; to be repeated after others may have taken them. Only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._heard)

    def _heard(self, number: int, frame: Any) -> None:
        self.count += 1
        self.name = signal.Signals(number).name
        if not self.follows:
            raise Interrupted(self.name)


def drive(
    job: Job,
    directory: RunDirectory,
    *,
    job_text: str,
    local_nodes: int = 0,
    ephemeral: bool = False,
    on_update: Update = lambda snapshot: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Runs `job` in `directory` to its end and returns the content of result.json.

    A run that is under way on the cluster is followed from where it is; so a driver that died can be started again.
    An `ephemeral` run ends, with a checkpoint, soon after its driver is gone. `on_update` gets the controller's
    snapshot a few times a second. Raises ClusterError, DataError or RunDirectoryError when the run cannot start,
    KeyProblem when there is no key for its checkpoints.
    """

    def note(text: str) -> None:
        log.info("%s", text)
        on_note(text)

    if directory.is_steered and not has_cluster():
        raise RunDirectoryError(f"{directory.path} is being run right now; see `orchestrator status {directory.path}`")
    if not directory.is_steered:
        directory.create(job_text, job.resolved())
    about = LogContext(run=directory.run_id, process="driver")
    form, level = job.monitoring.logs, job.monitoring.log_level
    watched = job.monitoring.model_dump()
    with logging_to(directory.path / "logs", about, form=form, level=level, echo=True):
        try:
            # Signals are ours until the sinks have had their last, too.
            with (
                Interruption().listening() as interruption,
                feeding(watched, directory.run_id, directory.path, job.resolved()),
            ):
                return _drive(job, directory, local_nodes, ephemeral, interruption, on_update, note)
        except Interrupted as signalled:
            return _cut_short(directory, f"{signalled} before the run began")
        except ClusterError as error:
            log.info("the run cannot go on: %s", error)  # whoever catches it shows it
            if directory.events.exists():
                directory.write_json("result.json", unfinished_result(directory, "failed", str(error)))
            raise


def _drive(
    job: Job,
    directory: RunDirectory,
    local_nodes: int,
    ephemeral: bool,
    interruption: Interruption,
    on_update: Update,
    on_note: Callable[[str], None],
) -> dict[str, Any]:
    # Whoever has no key, or no access, is told before anything is started.
    secret = secret_of(job)
    _check_storage(job, directory)
    with ray_session(job, local_nodes, directory.path / "logs") as own:
        try:
            interruption.arm()  # Ray puts its own handler for SIGTERM in place when it starts.
            controller = None if own else living_controller(directory)
            if controller is None:
                spec = _spec(job, directory, secret, own, ephemeral, on_note)
                on_note("starting workers")
                interruption.follows = True
                controller = _start_controller(directory, spec, own)
            else:
                on_note("the run is under way: following it")
                interruption.follows = True
            result = _follow(controller, directory, interruption, on_update)
            assert result is not None, "a run of ours is followed to its end"
            return result
        finally:
            end_run(directory.run_id)
            with suppress(OSError, ValueError):
                # A controller that was killed could not. One that is not ours goes on being watched.
                if not directory.is_steered:
                    targets = targets_directory(job, own_cluster=own, cwd=working_directory())
                    discovery.withdraw(discovery.file_of(targets, directory.run_id))


def _spec(
    job: Job, directory: RunDirectory, secret: Any, own: bool, ephemeral: bool, on_note: Callable[[str], None]
) -> dict[str, Any]:
    """Prepares the data; what every incarnation of the run's controller is made from."""
    on_note("preparing the data")
    dataset = _prepare(job)
    if dataset.padding:
        on_note(f"packed {dataset.num_samples:,} rows, {dataset.padding:.2%} of their tokens padding")
    _same_data(directory, dataset)
    data = dataset.describe(directory.path, directory.forked_at)
    directory.write_json("environment.json", _environment(data, dataset))
    with suppress(FileNotFoundError):
        (directory.path / "result.json").unlink()  # Of an earlier attempt, which this one goes on from.
    return {
        "secret": secret,
        "run_dir": str(directory.path),
        "job": job.resolved(),
        "cwd": working_directory(),
        "stores": [str(store.directory) for store in dataset.stores],
        "store_digests": [store.digest for store in dataset.stores],
        "data": data,
        "own_cluster": own,
        "ephemeral": ephemeral and not own,  # A cluster of our own ends with its driver in any case.
        "session": uuid.uuid4().hex[:12],
    }


def _prepare(job: Job) -> Dataset:
    def tasks(size_bytes: int) -> RunTasks[Any] | None:
        return _run_on_ray if size_bytes >= _PARALLEL_BYTES else None

    return dataset_of(job, prepare_stores(job, run_tasks=tasks))


def _run_on_ray(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
    """Runs tasks on Ray workers of this node, whose disk holds the store."""
    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
    task = ray.remote(function).options(num_cpus=0, max_retries=2, scheduling_strategy=here)
    results: dict[int, Any] = {}
    pending: dict[Any, int] = {}
    waiting = list(enumerate(arguments))
    while waiting or pending:
        while waiting and len(pending) < (os.cpu_count() or 1):
            index, args = waiting.pop(0)
            pending[task.remote(*args)] = index
        done, _ = ray.wait(list(pending), num_returns=1)
        for reference in done:
            results[pending.pop(reference)] = ray.get(reference)
    return [results[index] for index in range(len(arguments))]


def _check_storage(job: Job, directory: RunDirectory) -> None:
    try:
        catalog_of(directory, job).steps()
    except (OSError, ValueError) as error:
        where = job.checkpoint.storage or directory.path
        raise ClusterError(f"checkpoint.storage {where} cannot be read from here: {error}") from error


def _same_data(directory: RunDirectory, dataset: Dataset) -> None:
    """Refuses to go on with other data than a run has begun with."""
    known = directory.read_json("environment.json")
    if known is None or not directory.metrics.exists() or not directory.metrics.stat().st_size:
        return
    if known["store"]["digest"] != dataset.digest:
        raise RunDirectoryError(
            f"{directory.path} was begun with other data ({known['store']['tokens']:,} tokens then, "
            f"{dataset.num_tokens:,} now, another digest): a source or the tokenizer has changed since; "
            "restore it, or choose another --run-dir"
        )


def _environment(data: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    packages = ("elastic-orchestrator", "ray", "torch", "transformers", "numpy")
    versions = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "platform": platform.platform(),
        "packages": versions,
        "data": data,
        "store": {
            "directory": ", ".join(str(store.directory) for store in dataset.stores),
            "digest": dataset.digest,
            "tokens": dataset.num_tokens,
            "padding": round(dataset.padding, 6),
        },
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def living_controller(directory: RunDirectory) -> Any | None:
    """The controller of a run that is under way on this cluster; None when there is none."""
    with suppress(ValueError):
        return ray.get_actor(controller_name(directory.run_id), namespace=NAMESPACE)
    if directory.is_steered:
        raise RunDirectoryError(
            f"{directory.path} is being run right now, and not on this cluster; "
            f"see `orchestrator status {directory.path}`"
        )
    return None


def _start_controller(directory: RunDirectory, spec: dict[str, Any], own: bool) -> Any:
    return (
        ray.remote(ControllerActor)
        .options(
            name=controller_name(directory.run_id),
            namespace=NAMESPACE,
            # The first of two drivers that start at once makes it; the other follows that.
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            resources={HEAD: 0.001} if own else None,
            max_restarts=-1,
            max_concurrency=1000,
            # On the head, away from workers whose nodes come and go; anywhere else if it must be.
            scheduling_strategy=("DEFAULT" if own else NodeAffinitySchedulingStrategy(node_id=_head_node(), soft=True)),
        )
        .remote(spec)
    )


def _head_node() -> str:
    for node in ray.nodes():
        if node["Alive"] and "node:__internal_head__" in node["Resources"]:
            return str(node["NodeID"])
    return str(ray.get_runtime_context().get_node_id())


def _follow(
    controller: Any, directory: RunDirectory, interruption: Interruption, on_update: Update, *, is_ours: bool = True
) -> dict[str, Any] | None:
    """Shows a run until it is over. Signals end one that `is_ours`, and otherwise only this (then None is returned)."""
    heard = time.monotonic()
    stops_sent = 0
    while True:
        if interruption.count and not is_ours:
            return None
        if interruption.count >= 2:
            return _cut_short(directory, f"{interruption.name} twice")
        try:
            if interruption.count > stops_sent:
                ray.get(controller.stop.remote(interruption.name), timeout=5.0)
                stops_sent = interruption.count
            snapshot = ray.get(controller.snapshot.remote(0.0 if interruption.count else POLL_S), timeout=5.0)
            heard = time.monotonic()
            with suppress(Exception):
                on_update(snapshot)  # A run does not fail because it could not be shown.
            if snapshot["over"]:
                result: dict[str, Any] = ray.get(controller.result.remote(), timeout=5.0)
                controller.farewell.remote()
                return result
        except ray.exceptions.ActorDiedError as error:
            finished = directory.read_json("result.json")
            if finished is not None:
                return dict(finished)
            raise ClusterError(f"the controller died and could not be restarted: {error}") from error
        except (ray.exceptions.RayError, TimeoutError):
            # Restarting, most likely; the workers train on meanwhile.
            if time.monotonic() - heard > CONTROLLER_SILENCE_S:
                raise ClusterError(f"the controller has not answered for {CONTROLLER_SILENCE_S:.0f} s") from None
            time.sleep(0.1)
        if interruption.count:
            time.sleep(0.1)


def attach(
    directory: RunDirectory,
    address: str | None = None,
    *,
    on_update: Update = lambda snapshot: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """Follows a run that is under way on the cluster at `address` (RAY_ADDRESS) to its end; returns the content of
    result.json, or None when a signal said to look away: the run goes on without us.

    Raises ClusterError when there is no such cluster, RunDirectoryError when the run is not under way there.
    """
    with Interruption().listening() as interruption, connected(address):
        interruption.arm()
        controller = living_controller(directory)
        if controller is None:
            ended = directory.read_json("result.json")
            if ended is None or ended.get("status") == "stopped":
                raise RunDirectoryError(
                    f"{directory.path} is not under way on this cluster; "
                    f"`orchestrator resume {directory.path}` goes on with it"
                )
            return dict(ended)
        interruption.follows = True
        on_note("the run is under way: following it")
        return _follow(controller, directory, interruption, on_update, is_ours=False)


def _cut_short(directory: RunDirectory, reason: str) -> dict[str, Any]:
    """Ends everything now; what was committed is on record, what was not checkpointed is lost."""
    end_run(directory.run_id)
    if (ended := directory.read_json("result.json")) is not None:
        return dict(ended)
    result = unfinished_result(directory, "stopped", reason)
    directory.write_json("result.json", result)
    RecordFile(directory.events).append(
        {"time": time.time(), "kind": "run_finished", "status": "stopped", "reason": reason}
    )
    return result


def unfinished_result(directory: RunDirectory, status: str, reason: str) -> dict[str, Any]:
    """result.json of a run that nobody is left to end in good order, from what is on record."""
    steps = list(read_records(directory.metrics))
    events = list(read_records(directory.events))
    account = read_ledger(events, steps).account(time.time())
    return {
        "run": directory.run_id,
        "status": status,
        "reason": reason,
        "steps": len(steps),
        "tokens": sum(int(record["tokens"]) for record in steps),
        "final_loss": steps[-1]["loss"] if steps else None,
        "wall_seconds": round(account.wall_seconds, 3),
        "goodput_ratio": round(account.ratio, 4),
        "state_digest": None,
        "data_digest": None,
        "generations": [generation_entry(event) for event in events if is_training(event)],
        "recoveries": [recovery_entry(event) for event in events if event["kind"] == "recovery"],
    }


def end_run(run_id: str) -> None:
    """Ends whatever actors and placement groups of a run are left, controller first so that it cannot ask for more."""
    if not ray.is_initialized():
        return  # Asking would start a Ray.
    with suppress(Exception):
        ray.kill(ray.get_actor(controller_name(run_id), namespace=NAMESPACE), no_restart=True)
    end_workers(run_id)
