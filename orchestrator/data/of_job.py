"""From a job to its data: which stores it needs, and what is made of them. The one module here that knows the job file.

Needs neither torch nor Ray, so that the driver can say what a run will use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.data.dataset import DataPlan, Dataset
from orchestrator.data.reading import Library
from orchestrator.data.store import RunTasks, TokenStore, open_store, prepare
from orchestrator.job import Job

_USUAL_HIDDEN_SIZE = 768
_MATRIX_WORK = 12
"""How many times the hidden size a token costs by itself in a decoder layer: the query, key, value and output matrices
are 4 of its squares, a feed-forward block of the usual width 8 (Kaplan et al. 2020, section 2.1)."""


def sources_of(job: Job) -> list[dict[str, Any]]:
    """`source`, `format`, `field` and `document` of each of the job's sources, as for `prepare`."""
    data = job.data
    if data.mix is None:
        return [{"source": data.source, "format": data.format, "field": data.field, "document": data.document}]
    return [
        {
            "source": entry.source,
            "format": entry.format or data.format,
            "field": entry.field or data.field,
            "document": entry.document or data.document,
        }
        for entry in data.mix
    ]


def prepare_stores(
    job: Job,
    *,
    run_tasks: Callable[[int], RunTasks[Any] | None] = lambda size_bytes: None,
    expect: Sequence[str] | None = None,
    verify: bool = True,
) -> list[TokenStore]:
    """The token store of each source, found or built. `run_tasks` says by the size of a source what runs its tasks;
    `expect`, `verify` and what is raised are as for `prepare`, one digest for each."""
    stores = []
    for number, source in enumerate(sources_of(job)):
        files = Library(job.data.mirrors).files(source["source"], source["format"])
        tasks = run_tasks(sum(max(0, file.size_bytes) for file in files))
        expected = None if expect is None else expect[number]
        stores.append(
            prepare(
                **source, tokenizer=job.data.tokenizer, mirrors=job.data.mirrors, cache=job.data.cache,
                run_tasks=tasks, expect=expected, verify=verify,
            )
        )  # fmt: skip
    return stores


def open_stores(job: Job, directories: Sequence[str | Path], digests: Sequence[str]) -> list[TokenStore]:
    """The stores that the driver has prepared: opened where they can be seen (one machine, a shared disk, a mirror), so
    that the sources need not be looked at again; else prepared here. Raises DataError."""
    known = [
        open_store(Path(path), digest, job.data.mirrors) for path, digest in zip(directories, digests, strict=True)
    ]
    found = [store for store in known if store is not None]
    return found if len(found) == len(known) else prepare_stores(job, expect=digests, verify=False)


def dataset_of(job: Job, stores: Sequence[TokenStore]) -> Dataset:
    """The job's data, from its stores. Raises DataError when one has no sample."""
    data = job.data
    plan = DataPlan(
        sequence_length=data.sequence_length,
        global_batch=job.train.global_batch,
        micro_batch=job.train.micro_batch,
        virtual_workers=job.elastic.virtual_workers,
        seed=job.train.seed,
        shuffle=data.shuffle,
        packing=data.packing,
        document_mask=data.document_mask,
        weights=None if data.mix is None else tuple(float(entry.weight) for entry in data.mix),
        token_cost=_MATRIX_WORK * _hidden_size(job),
    )
    return Dataset(stores, plan)


def _hidden_size(job: Job) -> int:
    """What the job file says; a usual one where it names a model by path or factory. Not what the model has: composing
    the data must not need it."""
    hf = job.model.hf
    for name in ("hidden_size", "n_embd"):
        if isinstance(hf, dict) and type(hf.get(name)) is int and hf[name] > 0:
            return int(hf[name])
    return _USUAL_HIDDEN_SIZE
