"""The driver: prepares the data, starts or finds the run's controller, and follows it.

On a cluster of others' the run is its controller's: it goes on without a driver, and cleans up after itself. A driver
ends it only when a user says so, and follows a run that is under way, started by anyone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from monitoring import discovery
from monitoring.logs import LogContext, logging_to
from monitoring.sinks.base import SinkRun
from monitoring.sinks.feeder import feeding
from orchestrator.checkpoint.of_run import secret_of
from orchestrator.job import Job
from orchestrator.job.kinds import hooks_from, sink_named
from orchestrator.rundir import RunDirectory, RunDirectoryError
from orchestrator.runtime.interruption import NOBODY_READS, Interrupted, Interruption
from orchestrator.runtime.ray.following import (
    cut_short,
    end_run,
    find_controller,
    follow,
    leave_result,
    start_controller,
    unfinished_result,
)
from orchestrator.runtime.ray.preparation import (
    check_storage,
    clear_result,
    controller_spec,
    refuse_packages,
    warn_of_open_token,
    warn_of_secrets,
)
from orchestrator.runtime.ray.session import ClusterError, connected, for_workers, has_cluster, ray_session
from orchestrator.runtime.ray.targets import targets_directory
from orchestrator.urls import environment_of, expand, expand_settings

log = logging.getLogger(__name__)

Update = Callable[[dict[str, Any]], None]
Note = Callable[[str], None]


def drive(
    job: Job,
    directory: RunDirectory,
    *,
    job_text: str,
    local_nodes: int = 0,
    ephemeral: bool = False,
    on_update: Update = lambda snapshot: None,
    on_note: Note = lambda text: None,
) -> dict[str, Any]:
    """Runs `job` in `directory` to its end and returns the content of result.json.

    A run that is under way on the cluster is followed from where it is; so a driver that died can be started again.
    An `ephemeral` run ends, with a checkpoint, soon after its driver is gone. `on_update` gets the controller's
    snapshot a few times a second. Raises ClusterError, DataError or RunDirectoryError when the run cannot start,
    KeyProblem when there is no key for its checkpoints, UrlProblem when there is no secret for one of its URLs.
    """

    interruption = Interruption()

    def note(text: str) -> None:
        log.info("%s", text)
        try:
            on_note(text)
        except BrokenPipeError:
            interruption.leave(NOBODY_READS)

    here = os.getcwd()
    refuse_packages(job, directory)
    warn_of_open_token(note)
    warn_of_secrets(job, note)
    own = bool(local_nodes) or not has_cluster()
    if own and (directory.is_steered or directory.is_driven):
        raise RunDirectoryError(f"{directory.path} is being run right now; see `orchestrator status {directory.path}`")
    if not directory.is_steered:
        directory.create(job_text, job.resolved())
    watched = _watched(job.monitoring.model_dump())
    with ExitStack() as held:
        if own:
            held.enter_context(directory.driving())
        held.enter_context(_logging(job, directory))
        try:
            # Signals are ours until the sinks have had their last, too.
            with (
                interruption.listening(),
                feeding(watched, directory.run_id, directory.path, job.resolved(), sink_named, _hooks_of(job.hooks)),
            ):
                return _drive(job, directory, here, local_nodes, ephemeral, interruption, on_update, note)
        except Interrupted as signalled:
            if directory.is_steered:
                raise ClusterError(
                    f"{signalled} before the run was followed; it goes on, `orchestrator stop {directory.path}` ends it"
                ) from None
            return cut_short(directory, f"{signalled} before the run began")
        except ClusterError as error:
            log.info("the run cannot go on: %s", error)  # the caller shows it
            if directory.events.exists() and not directory.is_steered and directory.read_json("result.json") is None:
                leave_result(directory, unfinished_result(directory, "failed", str(error)))
            raise


@contextmanager
def _logging(job: Job, directory: RunDirectory) -> Iterator[None]:
    about = LogContext(run=directory.run_id, process="driver")
    with ExitStack() as held:
        with directory.own_umask():
            held.enter_context(
                logging_to(
                    directory.path / "logs", about, form=job.monitoring.logs, level=job.monitoring.log_level, echo=True
                )
            )
        yield


def _watched(monitoring: dict[str, Any]) -> dict[str, Any]:
    """`monitoring` of a job as it can be used: with its secrets. Raises UrlProblem."""
    watched = monitoring | {"sinks": expand_settings(monitoring.get("sinks", {}))}
    if mlflow := monitoring.get("mlflow"):
        watched["mlflow"] = {**mlflow, "tracking_uri": expand(mlflow["tracking_uri"])}
    return watched


def _hooks_of(path: str | None) -> Callable[[SinkRun], Any] | None:
    """What makes the hooks of a job; found when they are wanted, so that a run that is looked at from where they are
    not is told of all the same."""
    if path is None:
        return None
    return lambda run: hooks_from(path)(run)


def _drive(
    job: Job,
    directory: RunDirectory,
    here: str,
    local_nodes: int,
    ephemeral: bool,
    interruption: Interruption,
    on_update: Update,
    on_note: Note,
) -> dict[str, Any]:
    # A user without a key, or without access, is told before anything is started.
    secret = secret_of(job)
    environment = environment_of(job)
    check_storage(job, directory)
    with ray_session(job, local_nodes, directory.path / "logs", on_note) as own:
        try:
            interruption.arm()  # Ray puts its own handler for SIGTERM in place when it starts.
            controller = None if own else find_controller(directory, on_note)
            if controller is None:
                spec = controller_spec(job, directory, here, secret, environment, own, ephemeral, on_note)
                if (final := clear_result(directory)) is not None:
                    return final  # It finished while the data was prepared.
                on_note("starting workers")
                interruption.follows = True
                controller = start_controller(directory, spec, own)
            else:
                on_note("the run is under way: following it, with the job file and options that it was started with")
                interruption.follows = True
            result = follow(controller, directory, interruption, on_update, on_note, own_cluster=own)
            assert result is not None, "a run of ours is followed to its end"
            return result
        finally:
            if own:
                end_run(directory.run_id)
            with suppress(OSError, ValueError):
                # A controller that was killed could not. One that still has the run goes on being watched.
                if not directory.is_steered:
                    targets = targets_directory(job, own_cluster=own, cwd=for_workers(here))
                    discovery.withdraw(discovery.file_of(targets, directory.run_id))


def attach(
    directory: RunDirectory,
    address: str | None = None,
    *,
    on_update: Update = lambda snapshot: None,
    on_note: Note = lambda text: None,
) -> dict[str, Any] | None:
    """Follows a run that is under way on the cluster at `address` (RAY_ADDRESS) to its end; returns the content of
    result.json, or None when a signal said to look away: the run goes on without us.

    Raises ClusterError when there is no such cluster, RunDirectoryError when the run is not under way there.
    """
    job = directory.read_json("job.resolved.json")
    try:
        with (
            Interruption().listening() as interruption,
            connected(address),
            feeding(
                _watched(job["monitoring"]),
                directory.run_id,
                directory.path,
                job,
                sink_named,
                _hooks_of(job.get("hooks")),
            ),
        ):
            interruption.arm()
            controller = find_controller(directory, on_note, even_if_over=True)
            if controller is None:
                ended = directory.read_json("result.json")
                if ended is None:
                    raise RunDirectoryError(
                        f"{directory.path} is not under way on this cluster; "
                        f"`orchestrator resume {directory.path}` goes on with it"
                    )
                return dict(ended)
            interruption.follows = True
            on_note("the run is under way: following it")
            return follow(controller, directory, interruption, on_update, on_note, is_ours=False)
    except Interrupted:
        return None
