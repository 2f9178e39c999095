"""What a model gave before it was trained, for objectives that compare with that: computed once, by all workers
together in whatever layout there is, and kept.

It is a function of the job: of the weights of step 0 and the data. Whoever has it tells those who have not; it is in
the storage of the checkpoints, too, for when nobody has it any more.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import numpy as np
import xxhash
from numpy.typing import NDArray

from orchestrator.checkpoint.manifest import CheckpointError
from orchestrator.data import Dataset
from orchestrator.data.held_out import HeldOut
from orchestrator.job import Job
from orchestrator.job.parts import objective_of
from orchestrator.storage import Storage
from strategies.comm.fabric import Fabric
from strategies.gradient.compute import Fetch
from strategies.gradient.spec import StepSpec
from strategies.objective.batch import Batch
from strategies.objective.objective import END_TO_END
from strategies.update.engine import StepEngine
from strategies.update.evaluation import Evaluation, Samples, reference, told_by_all

log = logging.getLogger(__name__)

NAME = "reference.bin"
"""In the storage of checkpoints: a digest, and behind it fp32, little-endian."""
_DIGITS = 32


class References:
    """Of the samples that are trained on and of those that are evaluated on. `moves` counts what is computed of it."""

    def __init__(
        self, dataset: Dataset, trained: HeldOut, held_out: HeldOut | None, spec: StepSpec, storage: Storage
    ) -> None:  # fmt: skip
        self._dataset, self._trained, self._held_out, self._storage = dataset, trained, held_out, storage
        self._table: NDArray[np.float32] | None = None
        sets: list[Samples] = [trained, *([] if held_out is None else [held_out])]
        self._passes = [Evaluation(samples, spec, reference) for samples in sets]

    @classmethod
    def of(
        cls, job: Job, dataset: Dataset, held_out: HeldOut | None, spec: StepSpec, storage: Storage
    ) -> References | None:  # fmt: skip
        """None where the job's objective compares with nothing."""
        if not objective_of(job).needs_reference:
            return None
        return cls(dataset, HeldOut(dataset.stores, dataset.plan), held_out, spec, storage)

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
        return _Joined(self._held_out, lambda ids: self._rows_of(ids, self._first_held_out, self._held_out))

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
        """After this every rank has it. Raises PeerLost, and CheckpointError where it is lost."""
        own = np.empty(0) if self._table is None else self._table.astype(np.float64)
        told = told_by_all(fabric.control, np.array([float(len(own))]))
        holders = [rank for rank, (size,) in enumerate(told) if size]
        if len(holders) == len(told):
            return
        if holders:
            # One tells all that it has.
            found = told_by_all(fabric.control, own if fabric.rank == holders[0] else np.empty(0))
            self._table = found[holders[0]].astype(np.float32)
        elif committed:
            self._table = self._read()
        else:
            values = [engine.evaluate(0, each)[f"{END_TO_END}reference"] for each in self._passes]
            self._table = np.array([number for each in values for number in each], dtype=np.float32)
            if fabric.rank == 0:
                self._write(self._table)

    def _write(self, table: NDArray[np.float32]) -> None:
        data = table.astype("<f4").tobytes()
        digest = xxhash.xxh3_128_hexdigest(data).encode()
        self._storage.put(NAME, lambda: iter([digest, data]))
        log.info("what the reference gives is known for %d rows (%s)", len(table), digest.decode())

    def _read(self) -> NDArray[np.float32]:
        try:
            content = self._storage.read(NAME, max_bytes=1 << 40)
        except OSError as error:
            raise CheckpointError(f"{self._storage.locate(NAME)} cannot be read: {error}") from error
        digest, data = content[:_DIGITS], content[_DIGITS:]
        if xxhash.xxh3_128_hexdigest(data).encode() != digest:
            raise CheckpointError(f"{self._storage.locate(NAME)} is not what was written: its digest is another")
        return np.frombuffer(data, dtype="<f4").astype(np.float32)


class _Joined:
    """Samples with what the reference gave for their rows."""

    def __init__(self, samples: Samples, rows_of: Callable[[NDArray[np.int64]], NDArray[np.float32]]) -> None:
        self._samples, self._rows_of = samples, rows_of

    @property
    def num_micro_batches(self) -> int:
        return self._samples.num_micro_batches

    def batch(self, index: int) -> Batch:
        found = self._samples.batch(index)
        return dataclasses.replace(found, reference=self._rows_of(found.ids))
