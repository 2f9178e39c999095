"""The checkpoints of a run directory: where they are, with which key, and a new run that goes on from them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from monitoring.outside import json_text
from monitoring.records import RecordFile, read_records
from monitoring.shapes import STEP
from orchestrator.checkpoint.catalog import Catalog
from orchestrator.checkpoint.encryption import Secret, find_key
from orchestrator.checkpoint.manifest import CheckpointError
from orchestrator.job import Job
from orchestrator.rundir import RunDirectory, RunDirectoryError
from orchestrator.storage import open_storage

log = logging.getLogger(__name__)


def job_of(directory: RunDirectory) -> Job:
    """The job that a run directory is of, with all that was overridden. Raises RunDirectoryError."""
    known = directory.read_json("job.resolved.json")
    if known is None:
        raise RunDirectoryError(f"{directory.path} has no job.resolved.json: it is not a run directory")
    try:
        return Job.model_validate(known)
    except ValueError as error:
        raise RunDirectoryError(f"{directory.path / 'job.resolved.json'} cannot be used here: {error}") from error


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


def fork(parent: RunDirectory, target: RunDirectory, job: Job, secret: Secret | None, at: int | None = None) -> int:
    """Makes `target` a run of `job` that goes on from the newest valid checkpoint of another run, or from the one after
    `at` steps; returns its step.

    The steps until then come along in its metrics. Raises RunDirectoryError.
    """
    there = job_of(parent)
    catalog = catalog_of(parent, there, secret)
    on_record = _unbroken(read_records(parent.metrics))
    reasons = []
    there_are = catalog.steps()
    if at is not None and at not in there_are:
        steps = ", ".join(map(str, there_are)) or "none"
        raise RunDirectoryError(f"{parent.path} has no checkpoint of {at} steps to fork from (there: {steps})")
    for step in there_are if at is None else [at]:
        try:
            catalog.open(step)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        records = on_record[:step] + _steps_of(catalog, step, on_record)
        if len(records) == step:
            break
        reasons.append(f"of the {step} steps of its checkpoint, {len(on_record)} are on record")
    else:
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise RunDirectoryError(f"{parent.path} has no valid checkpoint to fork from{why}")
    if step >= job.train.steps:
        raise RunDirectoryError(
            f"{parent.path} is at step {step}, and train.steps = {job.train.steps}: a fork would have nothing to do"
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
    it could write them, or a line is damaged. Returns how many. Without them that checkpoint could not be used, and
    they would be trained again, as are those behind a damaged line that no checkpoint knows: they are taken off the
    record. Raises OSError."""
    records = list(read_records(directory.metrics))
    on_record = _unbroken(records)
    missing = _missing_steps(catalog, on_record)
    has_hole = len(records) > len(on_record)
    if not missing and not has_hole:
        return 0
    file = RecordFile(directory.metrics)
    try:
        if has_hole:
            log.warning("%s is damaged behind step %d: what follows is made again", directory.metrics, len(on_record))
            file.keep(lambda record: record["step"] < len(on_record))
        for record in missing:
            file.append(record)
        if file.error is not None:
            raise file.error
    finally:
        file.close()
    return len(missing)


def _unbroken(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the steps from 0 on, up to the first that is missing."""
    return [record for _, record in itertools.takewhile(lambda each: each[1]["step"] == each[0], enumerate(records))]


def _missing_steps(catalog: Catalog, on_record: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    for committed in catalog.steps():
        if committed <= len(on_record):
            break
        if found := _steps_of(catalog, committed, on_record):
            return found
    return []


def _steps_of(catalog: Catalog, committed: int, on_record: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records behind those `on_record` that the checkpoint of `committed` steps brings; none when it lacks any."""
    if committed <= len(on_record):
        return []
    try:
        known = {record.get("step"): record for record in catalog.open(committed, keyless=True).manifest.steps}
    except CheckpointError as error:
        log.warning("a checkpoint that is newer than the record is passed over: %s", error)
        return []
    found: list[dict[str, Any]] = []
    # Its times are a wall clock's, which may have been set: no step was committed before the one that it follows.
    at = float(on_record[-1]["committed_at"]) if on_record else 0.0
    for step in range(len(on_record), committed):
        record = known.get(step, {})
        if STEP(record) is not None or not isinstance(record.get("samples"), str):
            log.warning("the checkpoint of %d steps cannot be used: %d are on record", committed, len(on_record))
            return []
        at = max(at, float(record["committed_at"]))
        found.append({**record, "committed_at": at})
    return found


def secret_of(job: Job) -> Secret | None:
    """The key that a job's checkpoints are encrypted with, if they are. Raises KeyProblem."""
    encryption = job.checkpoint.encryption
    return None if encryption is None else find_key(encryption.key, encryption.file)
