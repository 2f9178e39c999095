"""What a model gave before it was trained, or another gives, for objectives that compare with that: computed once, by
all workers together in whatever layout there is, and kept.

It is a function of the job: of the weights of step 0, or of the other model, and the data. Ranks that have it tell
those that have not; it is in the storage of the checkpoints, too, for when nobody has it any more.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import cache, partial

import numpy as np
import xxhash
from numpy.typing import NDArray

from monitoring.outside import json_text
from orchestrator.checkpoint.catalog import Catalog
from orchestrator.checkpoint.manifest import UnusableCheckpoint
from orchestrator.data import Dataset
from orchestrator.data.held_out import HeldOut
from orchestrator.job import Job
from orchestrator.job.parts import objective_of
from orchestrator.models.problems import ModelError
from orchestrator.storage import Storage
from orchestrator.training.compared import reference_values
from strategies.comm.fabric import Fabric
from strategies.gradient.compute import Fetch
from strategies.gradient.spec import StepSpec
from strategies.model.values import Values
from strategies.objective.batch import Batch
from strategies.objective.objective import END_TO_END
from strategies.update.engine import StepEngine
from strategies.update.evaluation import Evaluation, Samples, reference, told_by_all

log = logging.getLogger(__name__)

NAME = "reference.bin"
"""In the storage of checkpoints: digests of what it depends on and of what follows, and that: fp32, little-endian."""
_DIGITS = 32


class References:
    """Of the samples that are trained on and of those that are evaluated on. `moves` counts what is computed of it.
    `values` gives the reference's parameters, where that is another model than the one that is trained."""

    def __init__(
        self, dataset: Dataset, held_out: HeldOut | None, spec: StepSpec, catalog: Catalog, identity: bytes,
        values: Callable[[], Values | None],
    ) -> None:  # fmt: skip
        self._values = values
        self._dataset, self._held_out, self._identity = dataset, held_out, identity
        self._storages = _storages_of(catalog)
        self._is_kept = False
        self._table: NDArray[np.float32] | None = None
        trained = HeldOut(dataset.stores, dataset.plan)
        sets: list[Samples] = [trained, *([] if held_out is None else [held_out])]
        self._passes = [Evaluation(samples, spec, reference) for samples in sets]

    @classmethod
    def of(
        cls, job: Job, dataset: Dataset, held_out: HeldOut | None, spec: StepSpec, catalog: Catalog
    ) -> References | None:  # fmt: skip
        """None where the job's objective compares with nothing."""
        if not objective_of(job).needs_reference:
            return None
        values = cache(partial(reference_values, job))
        if not _is_on_record(catalog):
            # Before training is waited for: it takes its time. What is wrong with it is told if it is needed.
            with suppress(ModelError):
                values()
        return cls(dataset, held_out, spec, catalog, _identity_of(job, dataset), values)

    @property
    def moves(self) -> int:
        return sum(each.moves for each in self._passes)

    # ------------------------------------------------------------------------------------ using it

    def joined_to(self, fetch: Fetch) -> Fetch:
        """What is fetched, with what the reference gave for it; before that is known, with zeros."""

        def joined(step: int, virtual_worker: int) -> Batch:
            batch = fetch(step, virtual_worker)
            return dataclasses.replace(batch, reference=self._rows_of(batch.ids, 0))

        return joined

    @property
    def held_out(self) -> Samples:
        """What is evaluated on, likewise."""
        assert self._held_out is not None
        return HeldOutBeside(self._held_out, lambda ids: self._rows_of(ids, self._first_held_out, self._held_out))

    @property
    def _first_held_out(self) -> int:
        return self._dataset.num_samples * self._dataset.sequences

    def _rows_of(self, ids: NDArray[np.int64], first: int, among: HeldOut | None = None) -> NDArray[np.float32]:
        each = self._dataset.sequences
        if self._table is None:
            return np.zeros(len(ids) * each, dtype=np.float32)
        places = ids if among is None else among.places_of(ids)
        numbers = (places[:, None] * each + np.arange(each)).reshape(-1)
        found: NDArray[np.float32] = self._table[first + numbers]
        return found

    # ------------------------------------------------------------------------------------ having it

    def bring(self, engine: StepEngine, fabric: Fabric, committed: int) -> None:
        """After this every rank has it. Raises PeerLost, and UnusableCheckpoint where it is lost."""
        own = np.empty(0) if self._table is None else self._table.astype(np.float64)
        told = told_by_all(fabric.control, np.array([float(len(own))]))
        holders = [rank for rank, (size,) in enumerate(told) if size]
        if not holders and fabric.rank == 0:
            # One looks for it, so that all come to the same.
            kept = self._kept()
            own = own if kept is None else kept.astype(np.float64)
        if len(holders) < len(told):
            teller = holders[0] if holders else 0
            found = told_by_all(fabric.control, own if fabric.rank == teller else np.empty(0))[teller]
            self._table = found.astype(np.float32) if len(found) else None
        if self._table is None:
            if committed:
                raise UnusableCheckpoint(
                    f"what the model gave before training is needed to go on after {committed} steps, and "
                    f"{self._storages[0].locate(NAME)} does not have it for this model, data and objective: bring the "
                    "file back, or begin a new run with these weights as its model"
                )
            others = self._values()  # It need not be there any more once this is known.
            with nullcontext() if others is None else engine.other_weights(others):
                values = [engine.evaluate(0, each)[f"{END_TO_END}reference"] for each in self._passes]
            self._table = np.array([number for each in values for number in each], dtype=np.float32)
        if fabric.rank == 0 and not self._is_kept:
            self._keep(self._table)

    def _kept(self) -> NDArray[np.float32] | None:
        """What is in the storage of this run, or of one that it was forked from; None where that is none, of another
        job, or damaged."""
        for number, storage in enumerate(self._storages):
            try:
                content = storage.read(NAME, max_bytes=1 << 40)
            except OSError as error:
                log.info("%s is not read: %s", storage.locate(NAME), error)
                continue
            identity, digest, data = content[:_DIGITS], content[_DIGITS : 2 * _DIGITS], content[2 * _DIGITS :]
            if identity == self._identity and xxhash.xxh3_128_hexdigest(data).encode() == digest:
                self._is_kept = number == 0
                return np.frombuffer(data, dtype="<f4").astype(np.float32)
            log.warning("%s is of another job, or damaged", storage.locate(NAME))
        return None

    def _keep(self, table: NDArray[np.float32]) -> None:
        """Writes it down; a storage that refuses is tried again by the next generation."""
        data = table.astype("<f4").tobytes()
        digest = xxhash.xxh3_128_hexdigest(data).encode()
        storage = self._storages[0]
        try:
            if NAME in storage.names(""):
                storage.remove(NAME)
            storage.put(NAME, lambda: iter([self._identity, digest, data]))
        except OSError as error:
            log.warning("what the reference gives could not be written down: %s", error)
            return
        self._is_kept = True
        log.info("what the reference gives is known for %d rows (%s)", len(table), digest.decode())


def _storages_of(catalog: Catalog) -> list[Storage]:
    """That of a run, and of those that it was forked from."""
    found = [catalog.storage]
    return found if catalog.origin is None else [*found, *_storages_of(catalog.origin[1])]


def _is_on_record(catalog: Catalog) -> bool:
    """Whether there is something, or it cannot be known."""
    try:
        return any(NAME in storage.names("") for storage in _storages_of(catalog))
    except OSError:
        return True


def _identity_of(job: Job, dataset: Dataset) -> bytes:
    """A digest of all that it depends on: the weights of step 0, the samples, and what is asked of them."""
    numerics = job.numerics()
    evaluation = numerics.get("evaluation") or {}
    parts = [numerics.get(section) for section in ("model", "data", "objective", "adapter")]
    parts += [evaluation.get(field) for field in ("share", "data", "samples")]
    told = json_text([*parts, job.train.seed, job.train.precision, dataset.digest], sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(told.encode()).encode()


def beside(samples: HeldOut, table: NDArray[np.float32]) -> HeldOutBeside:
    """Samples with what the reference gave for each of their rows, in their order: fp32 [rows]."""
    each = len(table) // samples.num_samples

    def rows_of(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = table[(samples.places_of(ids)[:, None] * each + np.arange(each)).reshape(-1)]
        return found

    return HeldOutBeside(samples, rows_of)


class HeldOutBeside:
    """Samples with what the reference gave for their rows. See `Samples`."""

    def __init__(self, samples: Samples, rows_of: Callable[[NDArray[np.int64]], NDArray[np.float32]]) -> None:
        self._samples, self._rows_of = samples, rows_of

    @property
    def num_micro_batches(self) -> int:
        return self._samples.num_micro_batches

    def batch(self, index: int) -> Batch:
        found = self._samples.batch(index)
        return dataclasses.replace(found, reference=self._rows_of(found.ids))
