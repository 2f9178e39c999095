"""From a job to its data: which stores it needs, and what is made of them. The one module here that knows the job file.

Needs neither torch nor Ray, so that the driver can say what a run will use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.data.dataset import DataPlan, Dataset
from orchestrator.data.formats import DEFAULT_FIELD
from orchestrator.data.reading import Library, join
from orchestrator.data.shards import Signature
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
    sources = [
        {
            "source": entry.source,
            "format": entry.format or data.format,
            "field": entry.field or data.field,
            "document": entry.document or data.document,
        }
        for entry in data.mix
    ]
    if data.field != DEFAULT_FIELD:
        # What `data` says is for those entries that have records, unless none has any.
        is_text = [_is_text(job, number, source) for number, source in enumerate(sources)]
        for entry, source, text in zip(data.mix, sources, is_text, strict=True):
            if text and entry.field is None and not all(is_text):
                source["field"] = None
    return sources


def _is_text(job: Job, number: int, source: dict[str, Any]) -> bool:
    files = Library(mirrors_of(job, number)).files(source["source"], source["format"])
    return all(file.format == "text" for file in files)


def mirrors_of(job: Job, number: int) -> list[str]:
    """Where copies of a source's files and token stores are: in a mirror itself, or, of a mix of several, below the
    entry's number."""
    mirrors = job.data.mirrors
    several = job.data.mix is not None and len(job.data.mix) > 1
    return [join(mirror, f"{number:04d}") for mirror in mirrors] if several else list(mirrors)


def prepare_stores(
    job: Job,
    *,
    run_tasks: Callable[[int], RunTasks[Any] | None] | None = None,
    expect: Sequence[str] | None = None,
    verify: bool = True,
) -> list[TokenStore]:
    """The token store of each source, found or built. `run_tasks` says by the size of a source what runs its tasks;
    `expect`, `verify` and what is raised are as for `prepare`, one digest for each."""
    numbers = range(1 if job.data.mix is None else len(job.data.mix))
    return [
        _prepare(job, number, run_tasks, None if expect is None else expect[number], verify) for number in numbers
    ]  # fmt: skip


def _prepare(
    job: Job,
    number: int,
    run_tasks: Callable[[int], RunTasks[Any] | None] | None,
    expect: str | None,
    verify: bool,
) -> TokenStore:
    source, mirrors = sources_of(job)[number], mirrors_of(job, number)
    tasks = None
    if run_tasks is not None:
        files = Library(mirrors).files(source["source"], source["format"])
        tasks = run_tasks(sum(max(0, file.size_bytes) for file in files))
    return prepare(
        **source, tokenizer=job.data.tokenizer, mirrors=mirrors, cache=job.data.cache, run_tasks=tasks, expect=expect,
        verify=verify,
    )  # fmt: skip


def open_stores(
    job: Job,
    directories: Sequence[str | Path],
    digests: Sequence[str],
    signatures: Sequence[Sequence[Signature | None]] = (),
) -> list[TokenStore]:
    """The stores that the driver has prepared: opened where they can be seen (one machine, a shared disk, a mirror), so
    that the sources need not be looked at again; else prepared here. signatures: of each store, as for `TokenStore`.
    Raises DataError."""
    stores = []
    for number, (path, digest) in enumerate(zip(directories, digests, strict=True)):
        verified = signatures[number] if signatures else ()
        found = open_store(Path(path), digest, mirrors_of(job, number), verified)
        stores.append(_prepare(job, number, None, digest, False) if found is None else found)
    return stores


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
