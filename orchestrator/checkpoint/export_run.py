"""The model of a run as a directory that others load: asked for by people, or by a run that compares itself with it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from orchestrator.checkpoint.adapters import MergedWeights, export_adapter
from orchestrator.checkpoint.export import export
from orchestrator.checkpoint.of_run import catalog_of, job_of, secret_of
from orchestrator.checkpoint.weights import weights_of
from orchestrator.models.content import content_of
from orchestrator.models.directory import find_directory
from orchestrator.models.problems import reason_of, refused
from orchestrator.models.quantization import DequantizedWeights
from orchestrator.rundir import RunDirectory, RunDirectoryError

_AT = re.compile(r"(?P<path>.+)@(?P<step>[0-9]+)")


class Exported(NamedTuple):
    """After how many steps, to which files, and whether it is the whole `model` or an `adapter`."""

    step: int
    files: list[Path]
    what: str


def export_run(
    directory: RunDirectory, to: Path, step: int | None = None, dtype: str | None = None, *,
    merge: bool = False, ema: bool = False,
) -> Exported:  # fmt: skip
    """Writes what a run has trained, after `step` steps (None: of its newest checkpoint), to the new directory `to`: a
    model, or an adapter unless that is to be merged with what it was trained on. Raises RunDirectoryError, ExportError,
    CheckpointError, OSError."""
    job = job_of(directory)
    catalog = catalog_of(directory, job, secret_of(job))
    chosen = _chosen(directory, catalog.steps(), step)
    weights = weights_of(catalog.open(chosen), job, ema=ema)
    if job.adapter is None:
        return Exported(chosen, export(weights, job, to, dtype), "model")
    if not merge:
        return Exported(chosen, export_adapter(weights, job, to, dtype), "adapter")
    if job.adapter.quantize_base != "none":
        weights = DequantizedWeights(weights)
    return Exported(chosen, export(MergedWeights(weights, job.adapter), job, to, dtype), "model")


def _chosen(directory: RunDirectory, steps: list[int], step: int | None) -> int:
    if not steps or (step is not None and step not in steps):
        there = ", ".join(map(str, steps)) or "none"
        which = "" if step is None else f" of {step} steps"
        raise RunDirectoryError(f"{directory.path} has no checkpoint{which} (there: {there})")
    return steps[0] if step is None else step


class Named(NamedTuple):
    """A model by a `name` that means the same later on, and the directory with it, that was written from a run's
    checkpoint if `is_of_run`."""

    name: str
    directory: Path
    is_of_run: bool = False

    @property
    def content(self) -> str:
        """What it is known by. Of a run its weights: other versions write another configuration and tokenizer of the
        same model. Raises ModelError."""
        return content_of(self.directory, only_weights=self.is_of_run)


def find_model(name: str) -> Named:
    """What a directory, a hub's model in the local cache, or a run is as a model. Of a run (`RUN` its newest
    checkpoint, `RUN@STEP` that one) it is written to the user's cache, once. Raises ModelError."""
    given = _AT.fullmatch(name)
    path = Path(name if given is None else given["path"]).expanduser()
    if not (path / "job.resolved.json").is_file():
        return Named(name, find_directory(name))
    try:
        return _of_run(RunDirectory(path), None if given is None else int(given["step"]), str(path))
    except Exception as error:  # A storage may fail in any way.
        raise refused(f"the model of the run {path} cannot be had: {reason_of(error)}") from error


def _of_run(run: RunDirectory, step: int | None, path: str) -> Named:
    from orchestrator.data.store import default_cache

    if step is None:
        job = job_of(run)
        step = _chosen(run, catalog_of(run, job, secret_of(job)).steps(), None)
    target = default_cache() / "models-of-runs" / f"{run.uid}-{step}"
    if not (target / "config.json").is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent, ignore_cleanup_errors=True) as draft:
            export_run(run, Path(draft) / "model", step, merge=True)
            try:
                (Path(draft) / "model").rename(target)
            except OSError:
                if not (target / "config.json").is_file():  # Else another process was faster.
                    shutil.rmtree(target, ignore_errors=True)  # Somebody has deleted some of it.
                    (Path(draft) / "model").rename(target)
    return Named(f"{path}@{step}", target, is_of_run=True)
