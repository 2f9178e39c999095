"""The checkpoints of a run directory: where they are, with which key, and a new run that goes on from them."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping
from typing import Any

from monitoring.outside import json_text
from monitoring.records import RecordFile, read_records
from orchestrator.checkpoint.catalog import Catalog
from orchestrator.checkpoint.encryption import Secret, find_key
from orchestrator.checkpoint.manifest import CheckpointError
from orchestrator.checkpoint.storage import open_storage
from orchestrator.job import Job
from orchestrator.rundir import RunDirectory, RunDirectoryError

log = logging.getLogger(__name__)


def job_of(directory: RunDirectory) -> Job:
    """The job that a run directory is of, with all that was overridden. Raises RunDirectoryError."""
    known = directory.read_json("job.resolved.json")
    if known is None:
        raise RunDirectoryError(f"{directory.path} has no job.resolved.json: it is not a run directory")
    try:
        return Job.model_validate(known)
    except ValueError as error:
        raise RunDirectoryError(f"{directory.path / 'job.resolved.json'} is no job of this version: {error}") from error


def catalog_of(directory: RunDirectory, job: Job, secret: Secret | None = None) -> Catalog:
    """The checkpoints of a run. Raises ValueError for a storage that cannot be used here."""
    return open_catalog(catalog_spec(directory, job), secret)


def catalog_spec(directory: RunDirectory, job: Job) -> dict[str, Any]:
    """Where the checkpoints of a run are, in words that any process understands."""
    spec: dict[str, Any] = {"url": directory.checkpoint_storage(job.checkpoint.storage), "run": directory.uid}
    forked = directory.read_json("fork.json")
    return spec if forked is None else spec | {"origin": {key: forked[key] for key in ("step", "url", "run")}}


def open_catalog(spec: Mapping[str, Any], secret: Secret | None = None) -> Catalog:
    """The catalog that `catalog_spec` describes. Raises ValueError for a storage that cannot be used here."""
    origin = spec.get("origin")
    other = None if origin is None else (int(origin["step"]), open_catalog(origin, secret))
    return Catalog(open_storage(spec["url"]), spec["run"], secret, other)


def fork(parent: RunDirectory, target: RunDirectory, job: Job, secret: Secret | None) -> int:
    """Makes `target` a run of `job` that goes on from the newest valid checkpoint of another run; returns its step.

    The steps until then come along in its metrics. Raises RunDirectoryError.
    """
    there = job_of(parent)
    catalog = catalog_of(parent, there, secret)
    reasons = []
    for step in catalog.steps():
        try:
            catalog.open(step)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        break
    else:
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise RunDirectoryError(f"{parent.path} has no valid checkpoint to fork from{why}")
    if step >= job.train.steps:
        raise RunDirectoryError(
            f"{parent.path} is at step {step}, and train.steps = {job.train.steps}: a fork would have nothing to do"
        )
    records = list(itertools.islice(read_records(parent.metrics), step))
    records += _steps_of(catalog, step, len(records))
    if len(records) < step:
        raise RunDirectoryError(
            f"{parent.path} cannot be forked: {len(records)} of the {step} steps of its checkpoint are on record"
        )
    holder = catalog.holder_of(step)
    target.path.parent.mkdir(parents=True, exist_ok=True)
    target.path.mkdir(mode=0o700)
    target.metrics.write_text("".join(json_text(record) + "\n" for record in records), encoding="utf-8")
    target.write_json(
        "fork.json", {"step": step, "from": str(parent.path), "url": holder.storage.locate(""), "run": holder.run}
    )
    return step


def catch_up(directory: RunDirectory, catalog: Catalog) -> int:
    """Puts those steps on record that a newer valid checkpoint has and metrics.jsonl lacks: the controller ended before
    it could write them. Returns how many. Without them that checkpoint could not be used, and they would be trained
    again. Raises OSError."""
    recorded = sum(1 for _ in read_records(directory.metrics))
    missing = _missing_steps(catalog, recorded)
    if missing:
        file = RecordFile(directory.metrics)
        for record in missing:
            file.append(record)
        if file.error is not None:
            raise file.error
        file.close()
    return len(missing)


def _missing_steps(catalog: Catalog, recorded: int) -> list[dict[str, Any]]:
    for committed in catalog.steps():
        if committed <= recorded:
            break
        if found := _steps_of(catalog, committed, recorded):
            return found
    return []


def _steps_of(catalog: Catalog, committed: int, recorded: int) -> list[dict[str, Any]]:
    """The records from step `recorded` on that the checkpoint of `committed` steps brings; none when it lacks any."""
    try:
        known = {record.get("step"): record for record in catalog.open(committed, keyless=True).manifest.steps}
    except CheckpointError as error:
        log.warning("a checkpoint that is newer than the record is passed over: %s", error)
        return []
    wanted = [known.get(step, {}) for step in range(recorded, committed)]
    if all(_is_step(record) for record in wanted):
        return wanted
    log.warning("the checkpoint of %d steps cannot be used: only %d are on record", committed, recorded)
    return []


def _is_step(record: Mapping[str, Any]) -> bool:
    try:
        numbers = [float(record[key]) for key in ("generation", "seconds", "committed_at", "tokens", "lr")]
        numbers += [float(record[key]) for key in ("loss", "grad_norm") if record[key] is not None]
        return all(map(math.isfinite, numbers)) and isinstance(record["samples"], str)
    except (KeyError, TypeError, ValueError):
        return False


def secret_of(job: Job) -> Secret | None:
    """The key that a job's checkpoints are encrypted with, if they are. Raises KeyProblem."""
    encryption = job.checkpoint.encryption
    return None if encryption is None else find_key(encryption.key, encryption.file)
