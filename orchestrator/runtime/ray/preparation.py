"""What has to be there before a run's controller can start: its storage, its data, the record of where it runs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.checkpoint.of_run import catalog_of
from orchestrator.data import Dataset, load_tokenizer
from orchestrator.data.of_job import dataset_of, held_out_of, prepare_held_out, prepare_stores, prompts_of
from orchestrator.data.store import RunTasks, TokenStore
from orchestrator.doctor.authentication import judge_token
from orchestrator.doctor.check import WARNING
from orchestrator.doctor.facts import token_facts
from orchestrator.job import Job
from orchestrator.rundir import RunDirectory, RunDirectoryError, is_package
from orchestrator.runtime.ray.session import ClusterError, for_workers, return_to
from orchestrator.urls import fields_with_secrets, take_over
from strategies.comm.rendezvous_proof import fresh_secret

_PARALLEL_BYTES = 64 << 20
"""Below this much text, tokenising here is faster than starting Ray workers for it."""


def refuse_packages(job: Job, directory: RunDirectory) -> None:
    """Nothing that is to last belongs where Ray unpacks the files of a submitted job, which it removes again.

    Raises RunDirectoryError.
    """
    storage = job.checkpoint.storage
    places = {"--run-dir": directory.path}
    if storage is not None and "://" not in storage:
        places["checkpoint.storage"] = Path(storage).resolve()
    for name, path in places.items():
        if is_package(path):
            raise RunDirectoryError(
                f"{name} {path} is in the directory that Ray made for this job, and removes after it; "
                "give an absolute path, on a file system that every node mounts"
            )


def warn_of_open_token(on_note: Callable[[str], None]) -> None:
    """Says what doctor says of a token that others can read: who has it can run code on the cluster."""
    for check in judge_token(token_facts(os.environ, Path.home()), to_cluster=False):
        if check.level == WARNING:
            on_note(f"warning: {check.found}; {check.advice}")


def warn_of_secrets(job: Job, on_note: Callable[[str], None]) -> None:
    """Says which fields hold a password in the clear."""
    if fields := fields_with_secrets(job):
        on_note(
            f"warning: a secret stands in {', '.join(fields)}; it is not written down in the run directory, so that "
            "`resume` will not have it: write ${env:NAME} in its place"
        )


def check_storage(job: Job, directory: RunDirectory) -> None:
    """Raises ClusterError when the storage of the run's checkpoints cannot be read."""
    try:
        catalog_of(directory, job).steps()
    except (OSError, ValueError) as error:
        where = job.checkpoint.storage or directory.path
        raise ClusterError(f"checkpoint.storage {where} cannot be read from here: {error}") from error


def controller_spec(
    job: Job,
    directory: RunDirectory,
    here: str,
    secret: Any,
    environment: Mapping[str, str],
    own: bool,
    ephemeral: bool,
    on_note: Callable[[str], None],
) -> dict[str, Any]:
    """Prepares the data; what every incarnation of the run's controller is made from."""
    on_note("preparing the data")
    return_to(here)
    dataset, held_out = _prepare(job, environment, on_note)
    if dataset.padding:
        on_note(f"packed {dataset.num_samples:,} rows, {dataset.padding:.2%} of their tokens padding")
    _same_data(directory, dataset, held_out)
    data = dataset.describe(directory.path, directory.forked_at)
    directory.write_json("environment.json", _environment(job, data, dataset, held_out))
    return {
        "secret": secret,
        # Told to the run's own processes only, over Ray's connections, and written down nowhere.
        "rendezvous_secret": fresh_secret(),
        "run_dir": str(directory.path),
        # As is this.
        "environment": environment,
        "job": job.resolved(),
        "cwd": for_workers(here),
        "stores": _told(dataset.stores),
        "held_out": _told(held_out),
        "data": data,
        "own_cluster": own,
        "ephemeral": ephemeral and not own,  # A cluster of our own ends with its driver in any case.
        "session": uuid.uuid4().hex[:12],
    }


def clear_result(directory: RunDirectory) -> dict[str, Any] | None:
    """Removes what an earlier attempt came to, which is gone on from; that of a run that has finished stays and is
    returned. Under the run's lock, so that nobody writes one meanwhile; its holder keeps it."""
    try:
        lock = directory.lock()
    except RunDirectoryError:
        return None
    try:
        if (final := directory.final_result) is not None:
            return final
        with suppress(FileNotFoundError):
            (directory.path / "result.json").unlink()
        return None
    finally:
        os.close(lock)


def _prepare(
    job: Job, environment: Mapping[str, str], on_note: Callable[[str], None]
) -> tuple[Dataset, list[TokenStore]]:  # fmt: skip
    """The data, and the stores of what is evaluated on."""

    def tasks(size_bytes: int) -> RunTasks[Any] | None:
        return partial(_run_on_ray, environment) if size_bytes >= _PARALLEL_BYTES else None

    stores, held_out = prepare_stores(job, run_tasks=tasks), prepare_held_out(job, run_tasks=tasks)
    for store in (*stores, *held_out):
        if store.records is not None and store.records.skipped:
            first = "; ".join(store.records.first_skipped)
            count = store.records.skipped
            on_note(f"warning: {count:,} bad record{'s' * (count > 1)} of {store.source} left out: {first}")
    # Now, and not when the workers want them.
    if job.evaluation is not None and job.evaluation.generate is not None:
        prompts_of(job, load_tokenizer(job.data.tokenizer))
    if job.evaluation is not None and job.evaluation.tasks:
        from orchestrator.training.tasks import load_tasks

        load_tasks(job)
        on_note(f"evaluation by {', '.join(job.evaluation.tasks)}")
    if (samples := held_out_of(job, held_out)) is not None:
        what = "rows" if job.data.packing != "pad" else "samples"
        kept, out = (sum(len(store.document_lengths()) for store in some) for some in (stores, held_out))
        note = f"evaluation on {samples.num_samples:,} {what}"
        if job.evaluation is not None and job.evaluation.share is not None:
            note += f", of {out:,} held out of {kept + out:,} documents or records"
        on_note(note)
    return dataset_of(job, stores), held_out


def _told(stores: Sequence[TokenStore]) -> list[tuple[str, str, list[Any]]]:
    """Where each is, its digest, and how it is known again."""
    return [(str(store.directory), store.digest, store.signatures) for store in stores]


def _with_environment(environment: Mapping[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
    take_over(environment)
    return function(*arguments)


def _run_on_ray(
    environment: Mapping[str, str], function: Callable[..., Any], arguments: list[tuple[Any, ...]]
) -> list[Any]:
    """Runs tasks on Ray workers of this node, whose disk holds the store."""
    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
    task = ray.remote(_with_environment).options(num_cpus=0, max_retries=2, scheduling_strategy=here)
    results: dict[int, Any] = {}
    pending: dict[Any, int] = {}
    waiting = list(enumerate(arguments))
    while waiting or pending:
        while waiting and len(pending) < (os.cpu_count() or 1):
            index, args = waiting.pop(0)
            pending[task.remote(environment, function, *args)] = index
        done, _ = ray.wait(list(pending), num_returns=1)
        for reference in done:
            results[pending.pop(reference)] = ray.get(reference)
    return [results[index] for index in range(len(arguments))]


def _same_data(directory: RunDirectory, dataset: Dataset, held_out: Sequence[TokenStore]) -> None:
    """Refuses to go on with other data than a run has begun with, or has been evaluated on."""
    known = directory.read_json("environment.json")
    if known is None or not directory.metrics.exists() or not directory.metrics.stat().st_size:
        return
    if "store" not in known:
        raise RunDirectoryError(
            f"{directory.path / 'environment.json'} is damaged: it does not say what data the run has"
        )
    if known["store"]["digest"] != dataset.digest:
        raise RunDirectoryError(
            f"{directory.path} was begun with other data ({known['store']['tokens']:,} tokens then, "
            f"{dataset.num_tokens:,} now, another digest): a source, the tokenizer, or how this version "
            "encodes has changed since; "
            "restore it, or choose another --run-dir"
        )
    if known.get("held_out", []) != [store.digest for store in held_out]:
        raise RunDirectoryError(
            f"{directory.path} was begun with other data to evaluate on: what evaluation.share or evaluation.data "
            "names has changed since; restore it, or choose another --run-dir"
        )


def _environment(job: Job, data: dict[str, Any], dataset: Dataset, held_out: Sequence[TokenStore]) -> dict[str, Any]:
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
        **({"gpu_settings": _gpu_settings()} if job.resources.gpu else {}),
        "data": data,
        "store": {
            "directory": ", ".join(str(store.directory) for store in dataset.stores),
            "digest": dataset.digest,
            "tokens": dataset.num_tokens,
            "padding": round(dataset.padding, 6),
            "parts": [{"location": store.location, "digest": store.digest} for store in dataset.stores],
        },
        "held_out": [store.digest for store in held_out],
    }


def _gpu_settings() -> dict[str, Any]:
    """What every worker sets before it computes on a GPU."""
    from strategies.comm.nccl import ENVIRONMENT
    from strategies.model.same_bits import FLAGS, FOR_SAME_BITS

    return {"environment": FOR_SAME_BITS | ENVIRONMENT, "torch": FLAGS}


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
