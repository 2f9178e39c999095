"""From a job to its data: which stores it needs, and what is made of them. The one module here that knows the job file.

Needs neither torch nor Ray, so that the driver can say what a run will use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.chat import BadConversation, ChatTemplate
from orchestrator.data.dataset import DataPlan, Dataset
from orchestrator.data.encoding import Side
from orchestrator.data.formats import DEFAULT_FIELD
from orchestrator.data.held_out import HeldOut
from orchestrator.data.labels import LabelSpec
from orchestrator.data.reading import Library, join
from orchestrator.data.records import RecordSpec
from orchestrator.data.shards import Signature
from orchestrator.data.sources import DataError
from orchestrator.data.store import RunTasks, TokenStore, open_store, prepare
from orchestrator.data.tokenizers import Tokenizer
from orchestrator.job import Job
from orchestrator.job.parts import objective_of
from strategies.objective.objective import Objective

_USUAL_HIDDEN_SIZE = 768
_MATRIX_WORK = 12
"""How many times the hidden size a token costs by itself in a decoder layer: the query, key, value and output matrices
are 4 of its squares, a feed-forward block of the usual width 8 (Kaplan et al. 2020, section 2.1)."""


def sources_of(job: Job) -> list[dict[str, Any]]:
    """`source`, `format`, `field`, `document` and `include` of each of the job's sources, as for `prepare`."""
    data = job.data
    if data.mix is None:
        given = {"source": data.source, "format": data.format, "field": data.field, "document": data.document}
        return [given | {"include": data.include}]
    sources = [
        {
            "source": entry.source,
            "format": entry.format or data.format,
            "field": entry.field or data.field,
            "document": entry.document or data.document,
            "include": data.include,
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
    files = Library(mirrors_of(job, number)).files(source["source"], source["format"], source["include"])
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
    return _prepare_all(job, sources_of(job), _side_of(job, is_held_out=False), run_tasks, expect, verify)


def prepare_held_out(
    job: Job,
    *,
    run_tasks: Callable[[int], RunTasks[Any] | None] | None = None,
    expect: Sequence[str] | None = None,
    verify: bool = True,
) -> list[TokenStore]:
    """Likewise of what the job evaluates on; nothing where it does not."""
    if job.evaluation is None or not job.evaluation.holds_out:
        return []
    return _prepare_all(job, held_out_sources(job), _side_of(job, is_held_out=True), run_tasks, expect, verify)


def held_out_sources(job: Job) -> list[dict[str, Any]]:
    """As `sources_of`, of what the job evaluates on: a share of its data, or data of its own."""
    asked = None if job.evaluation is None else job.evaluation.data
    if asked is None:
        return sources_of(job)
    data = job.data
    return [
        {
            "source": asked.source, "format": asked.format or data.format, "field": asked.field or data.field,
            "document": data.document, "include": data.include if asked.include is None else asked.include,
        }
    ]  # fmt: skip


def _sources_of_side(job: Job, *, is_held_out: bool) -> tuple[list[dict[str, Any]], Side | None]:
    """Of what is trained on, or evaluated on."""
    sources = held_out_sources(job) if is_held_out else sources_of(job)
    return sources, _side_of(job, is_held_out=is_held_out)


def _side_of(job: Job, *, is_held_out: bool) -> Side | None:
    share = None if job.evaluation is None else job.evaluation.share
    return None if share is None else Side(share, is_held_out)


def _prepare_all(
    job: Job, sources: Sequence[dict[str, Any]], side: Side | None,
    run_tasks: Callable[[int], RunTasks[Any] | None] | None, expect: Sequence[str] | None, verify: bool,
) -> list[TokenStore]:  # fmt: skip
    return [
        _prepare(job, number, source, side, run_tasks, None if expect is None else expect[number], verify)
        for number, source in enumerate(sources)
    ]


def _prepare(
    job: Job,
    number: int,
    source: dict[str, Any],
    side: Side | None,
    run_tasks: Callable[[int], RunTasks[Any] | None] | None,
    expect: str | None,
    verify: bool,
) -> TokenStore:
    mirrors = mirrors_of(job, number)
    tasks = None
    if run_tasks is not None:
        files = Library(mirrors).files(source["source"], source["format"], source["include"])
        tasks = run_tasks(sum(max(0, file.size_bytes) for file in files))
    return prepare(
        **source, tokenizer=job.data.tokenizer, mirrors=mirrors, cache=job.data.cache, run_tasks=tasks, expect=expect,
        verify=verify, records=record_spec(job, is_held_out=side is not None and side.is_held_out), side=side,
    )  # fmt: skip


def record_spec(job: Job, *, is_held_out: bool = False) -> RecordSpec | None:
    """What the job's objective makes of records; None where it takes texts. Raises DataError for a chat template that
    cannot be read."""
    objective, data = objective_of(job), job.data
    if not objective.shapes:
        return None
    own = job.evaluation.data.fields if is_held_out and job.evaluation and job.evaluation.data else None
    fields = data.fields if own is None else own
    return RecordSpec(
        shapes=objective.shapes,
        length=data.sequence_length + 1,
        counts=objective.counts,  # type: ignore[arg-type]
        sequences=objective.sequences,
        labels=label_spec(objective),
        fields=tuple(sorted(fields.items())),
        chat_template=_template(data.chat_template),
        add_bos=data.add_bos,
        truncate=data.truncate,
        skips=data.on_bad_record == "skip",
    )


def label_spec(objective: Objective) -> LabelSpec | None:
    """The labels of an objective's records, where they have some."""
    labels = objective.labels_of_records
    return None if labels is None else LabelSpec(labels.kind, labels.count, labels.names)


def prompts_of(job: Job, tokenizer: Tokenizer) -> list[NDArray[np.uint32]]:
    """The ids of the texts that evaluations are to go on with, uint32 [tokens] each. Raises DataError for one that is
    too long, or cannot be rendered."""
    asked = None if job.evaluation is None else job.evaluation.generate
    if asked is None:
        return []
    template = _template(job.data.chat_template) or getattr(tokenizer, "chat_template", "")
    if asked.chat and not template:
        raise DataError(
            "evaluation.generate.chat: the tokenizer has no chat template, name one with data.chat_template"
        )
    found = []
    for number, text in enumerate(asked.prompts):
        where = f"evaluation.generate.prompts: prompt {number}"
        if asked.chat:
            rendered = ChatTemplate(template, getattr(tokenizer, "special_tokens", {}))
            try:
                text = rendered.render([{"role": "user", "content": text}], ask=True)
            except BadConversation as error:
                raise DataError(f"{where}: {error}") from error
        ids = tokenizer.encode(text)
        if job.data.add_bos and (begin := getattr(tokenizer, "begin_of_document", None)) is not None:
            ids = np.append(np.uint32(begin), ids).astype(np.uint32)
        room = job.data.sequence_length - asked.max_new_tokens
        if not 0 < len(ids) <= room:
            raise DataError(
                f"{where} has {len(ids)} tokens, and data.sequence_length = {job.data.sequence_length} with "
                f"max_new_tokens = {asked.max_new_tokens} leaves room for 1 to {room}"
            )
        found.append(ids)
    return found


def _template(given: str | None) -> str:
    """The text of a chat template, which may be in a file."""
    if given is None or "{" in given or "\n" in given:
        return given or ""
    path = Path(given).expanduser()
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        text = f"data.chat_template: {given} cannot be read: {error}; it is a template, or its path"
        raise DataError(text) from error


def open_stores(
    job: Job, told: Sequence[tuple[str | Path, str, Sequence[Signature | None]]], *, is_held_out: bool = False
) -> list[TokenStore]:
    """The stores that the driver has prepared: opened where they can be seen (one machine, a shared disk, a mirror), so
    that the sources need not be looked at again; else prepared here. signatures: of each store, as for `TokenStore`.
    Raises DataError."""
    stores = []
    sources, side = _sources_of_side(job, is_held_out=is_held_out)
    for number, (path, digest, verified) in enumerate(told):
        found = open_store(Path(path), digest, mirrors_of(job, number), verified)
        if found is None:
            found = _prepare(job, number, sources[number], side, None, digest, False)
        stores.append(found)
    return stores


def with_steps(job: Job) -> Job:
    """The job with its number of steps, where it says how many epochs it wants. Prepares the data for that. Raises
    DataError, also for a number that is not what those epochs make."""
    train = job.train
    if train.epochs is None:
        return job
    samples = dataset_of(job, prepare_stores(job)).num_samples
    steps = math.ceil(train.epochs * samples / train.global_batch)
    if train.steps not in (0, steps):
        raise DataError(
            f"train.steps = {train.steps}, and train.epochs = {train.epochs:g} of {samples:,} samples are {steps} "
            "steps; give one of the two"
        )
    return job.model_copy(update={"train": train.model_copy(update={"steps": steps})})


def dataset_of(job: Job, stores: Sequence[TokenStore]) -> Dataset:
    """The job's data, from its stores. Raises DataError when one has no sample."""
    return Dataset(stores, _plan_of(job))


def held_out_of(job: Job, stores: Sequence[TokenStore]) -> HeldOut | None:
    """What the job evaluates on, from the stores of that; None where that is nothing. Raises DataError."""
    if job.evaluation is None or not job.evaluation.holds_out:
        return None
    return HeldOut(stores, _plan_of(job), job.evaluation.samples)


def _plan_of(job: Job) -> DataPlan:
    data = job.data
    return DataPlan(
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
        labels=label_spec(objective_of(job)),
        is_full=data.pad_to == "sequence_length",
    )


def _hidden_size(job: Job) -> int:
    """What the job file says; a usual one where it names a model by path or factory. Not what the model has: composing
    the data must not need it."""
    hf = job.model.hf
    for name in ("hidden_size", "n_embd"):
        if isinstance(hf, dict) and type(hf.get(name)) is int and hf[name] > 0:
            return int(hf[name])
    return _USUAL_HIDDEN_SIZE
