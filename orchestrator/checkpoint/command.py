"""`orchestrator checkpoints`: what checkpoints a run has, and whether they are what was saved."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from monitoring.records import read_records
from orchestrator.checkpoint.catalog import Catalog
from orchestrator.checkpoint.encryption import Secret, find_key
from orchestrator.checkpoint.manifest import CheckpointError
from orchestrator.checkpoint.storage import open_storage
from orchestrator.job import Job
from orchestrator.rundir import RunDirectory, RunDirectoryError


@dataclass(frozen=True)
class Row:
    """One checkpoint. `age_seconds`, `num_bytes` and `layout` are None where they cannot be known."""

    step: int
    location: str
    valid: bool
    why: str = ""
    age_seconds: float | None = None
    num_bytes: int | None = None
    writers: int | None = None
    layout: dict[str, Any] | None = None
    encrypted: bool = False


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
    holder = catalog.holder_of(step)
    target.path.mkdir(parents=True, exist_ok=False)
    records = itertools.islice(read_records(parent.metrics), step)
    target.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    target.write_json(
        "fork.json", {"step": step, "from": str(parent.path), "url": holder.storage.locate(""), "run": holder.run}
    )
    return step


def secret_of(job: Job) -> Secret | None:
    """The key that a job's checkpoints are encrypted with, if they are. Raises KeyProblem."""
    encryption = job.checkpoint.encryption
    return None if encryption is None else find_key(encryption.key, encryption.file)


def rows(catalog: Catalog, *, verify: bool) -> list[Row]:
    """All checkpoints, newest first; with `verify` every byte of them is read. Raises OSError."""
    found = []
    for step in catalog.all_steps():
        location = catalog.locate(step)
        try:
            checkpoint = catalog.open(step, keyless=True)
        except CheckpointError as error:
            found.append(Row(step, location, valid=False, why=str(error)))
            continue
        why = ""
        if verify:
            try:
                checkpoint.verify()
            except CheckpointError as error:
                why = str(error)
        manifest = checkpoint.manifest
        found.append(
            Row(
                step, location, valid=not why, why=why, age_seconds=max(0.0, time.time() - checkpoint.saved_at),
                num_bytes=checkpoint.num_bytes, writers=len(manifest.files), layout=manifest.layout,
                encrypted=manifest.encryption is not None,
            )
        )  # fmt: skip
    return found


def describe(row: Row, *, verified: bool) -> str:
    """One line about a checkpoint."""
    if row.num_bytes is None or row.age_seconds is None:
        return f"{row.step:>10}  {'':>10}  {'':>10}  {'':<28}  invalid: {row.why}"
    state = f"invalid: {row.why}" if not row.valid else "valid, every byte verified" if verified else "valid"
    if row.encrypted:
        state += ", encrypted"
    return f"{row.step:>10}  {_age(row.age_seconds):>10}  {_size(row.num_bytes):>10}  {_layout(row):<28}  {state}"


HEADER = f"{'step':>10}  {'age':>10}  {'size':>10}  {'saved by':<28}  state"


def _layout(row: Row) -> str:
    layout = row.layout or {}
    degrees = "·".join(
        f"{letter}{layout[key]}"
        for letter, key in (("d", "data"), ("t", "tensor"), ("p", "pipeline"))
        if layout.get(key, 1) != 1
    )
    shard = layout.get("shard", "none")
    parts = [degrees, "" if shard == "none" else shard]
    described = " ".join(part for part in parts if part)
    return f"{row.writers} {'rank' if row.writers == 1 else 'ranks'}" + (f" ({described})" if described else "")


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
