"""Running a job from Python."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import yaml

from monitoring.sinks.feeder import check_sinks
from orchestrator.checkpoint.of_run import job_of
from orchestrator.data.of_job import with_steps
from orchestrator.data.trying import try_data
from orchestrator.errors import PluginError
from orchestrator.job import Job
from orchestrator.job.kinds import hooks_from, sink_named
from orchestrator.job.parts import objective_of
from orchestrator.models.content import with_content
from orchestrator.models.validation import look_at_model
from orchestrator.rundir import RunDirectory, RunDirectoryError, runs_root
from orchestrator.training.compared import with_compared


@dataclass(frozen=True)
class RunResult:
    """What a run came to: the content of result.json (see docs/run-directory.md), and where it is.

    More than 15 attributes: they are those of result.json.
    """

    run: str
    status: str
    run_dir: str
    reason: str = ""
    steps: int = 0
    tokens: int = 0
    final_loss: float | None = None
    wall_seconds: float = 0.0
    goodput_ratio: float = 0.0
    median_step_seconds: float | None = None
    reduction: str = "canonical"
    bit_exact: bool | str = True
    state_digest: str | None = None
    data_digest: str | None = None
    generations: list[dict[str, Any]] = field(default_factory=list)
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    faults_not_fired: list[int] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    """The `last` and the `best` evaluation: step and metrics of each."""
    model: dict[str, Any] | None = None
    """Of a model's directory: which tensors are new, left out or untied; of any model: which are unused."""


def run(
    job: Job,
    run_dir: str | os.PathLike[str] | None = None,
    *,
    job_text: str | None = None,
    local_nodes: int = 0,
    ephemeral: bool = False,
    on_update: Callable[[dict[str, Any]], None] = lambda snapshot: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> RunResult:
    """Trains `job` to its end, on the Ray cluster at `RAY_ADDRESS` or on one started for it on this machine.

    `run_dir` defaults to a new directory under `runs/`; with the directory of an unfinished run of the same job, that
    run goes on from its newest valid checkpoint, with that of one under way on the cluster it is followed, and with
    that of a finished one its result is returned. On a cluster the run outlives this process unless it is `ephemeral`.
    `on_update` is called a few times a second with the run's state. Raises RunDirectoryError, DataError, ModelError,
    ClusterError or SinkProblem when the run cannot start; one that started and failed is a result with status "failed".
    """
    directory = RunDirectory(run_dir or runs_root() / f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    job = with_steps(job)
    previous = _previous(job, directory)
    if previous is not None:
        return _result(previous, directory)
    check_sinks(job.monitoring.model_dump(), sink_named)
    if job.hooks is not None:
        look_at_hooks(job.hooks)
    look_at_model(job)
    if directory.has_begun:
        job = _as_on_record(job_of(directory), job)
    job = with_compared(with_content(job), has_begun=directory.has_begun)
    if not os.environ.get("RAY_ADDRESS") and not directory.has_begun:
        try_data(job)  # What is wrong with it is told before a cluster of our own is started.

    from orchestrator.runtime.ray.driver import drive

    text = job_text if job_text is not None else yaml.safe_dump(job.resolved())
    result = drive(
        job, directory, job_text=text, local_nodes=local_nodes, ephemeral=ephemeral,
        on_update=on_update, on_note=on_note,
    )  # fmt: skip
    return _result(result, directory)


def look_at_hooks(path: str) -> None:
    """Whether there are such hooks. Raises PluginError."""
    try:
        hooks_from(path)
    except PluginError as error:
        raise PluginError(f"hooks: {error}") from error


def _previous(job: Job, directory: RunDirectory) -> dict[str, Any] | None:
    """The result of a finished run in this directory, after checking that it is one of this job."""
    known = directory.read_json("job.resolved.json")
    if known is None:
        return None
    finished = directory.final_result
    before = job_of(directory)
    differing = sorted(_differences(before.numerics(), _like(before, job, finished is not None).numerics()))
    if differing and directory.has_begun:
        raise RunDirectoryError(
            f"{directory.path} is a run of a job with other numbers; they differ in: {', '.join(differing)}. "
            "Choose another --run-dir, use the job file of that run, or start a new run from it with --fork"
        )
    return finished


def _like(before: Job, job: Job, is_finished: bool) -> Job:
    """`job` as it compares with the job of a run that there is: by the content of what it names, unless that run did
    not record it. Of a finished run that is not needed any more."""
    job = _as_on_record(before, job)
    if not is_finished and before.objective.settings.get("content") is not None:
        job = with_compared(job, has_begun=True)
    if before.model.content is None:
        return job
    if is_finished and job.model.content is None and job.model.hf == before.model.hf:
        return job.model_copy(update={"model": job.model.model_copy(update={"content": before.model.content})})
    return job if is_finished else with_content(job)


def _as_on_record(before: Job, job: Job) -> Job:
    """With the content of the same other model that its objective named before."""
    there, here = before.objective.settings, job.objective.settings
    if there.get("content") is None or before.objective.name != job.objective.name:
        return job
    field = objective_of(before).another
    # A run is named with the step of the checkpoint that was its newest when the other one began.
    was, now = (re.sub("@[0-9]+$", "", str(settings.get(field))) for settings in (there, here))
    if here.get("content") is None and was == now:
        given = job.objective.model_dump(exclude_unset=True) | {"content": there["content"], field: there[field]}
        job = job.model_copy(update={"objective": type(job.objective).model_validate(given)})
    return job


def _differences(was: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(was, dict) and isinstance(now, dict):
        keys = was.keys() | now.keys()
        return [d for key in keys for d in _differences(was.get(key), now.get(key), f"{path}.{key}".lstrip("."))]
    return [] if was == now else [f"{path} ({was!r} there, {now!r} here)"]


def _result(content: dict[str, Any], directory: RunDirectory) -> RunResult:
    known = {entry.name for entry in fields(RunResult)}
    return RunResult(**{key: value for key, value in content.items() if key in known}, run_dir=str(directory.path))
