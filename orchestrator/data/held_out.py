"""What is evaluated on: the samples of some stores, each once, in micro-batches of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.dataset import DataPlan, line_of
from orchestrator.data.sampler import permute
from orchestrator.data.store import TokenStore
from strategies.objective.batch import Batch


class HeldOut:
    """All samples in their order, or no more than `samples` of them, drawn by the seed. They are cut and padded as
    `plan` says for training. See `strategies.update.evaluation.Samples`."""

    def __init__(self, stores: Sequence[TokenStore], plan: DataPlan, samples: int | None = None) -> None:
        """Raises DataError when a store has no sample."""
        self._plan, self._line = plan, line_of(stores, plan)
        total = sum(self._line.sizes)
        some = np.arange(total if samples is None else min(samples, total), dtype=np.int64)
        self._ids = some if len(some) == total else np.sort(permute(some, total, plan.seed))
        self._lengths = None if plan.is_full else self._line.lengths

    @property
    def num_samples(self) -> int:
        """How many there are."""
        return len(self._ids)

    @property
    def num_micro_batches(self) -> int:
        """Of as many samples as in training; the last may have fewer."""
        return -(-len(self._ids) // self._plan.micro_batch)

    def places_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where these are among all that are evaluated on."""
        return np.searchsorted(self._ids, ids)

    def batch(self, index: int) -> Batch:
        """Micro-batch `index`; its targets and samples are its own, and no step's."""
        plan = self._plan
        ids = self._ids[index * plan.micro_batch : (index + 1) * plan.micro_batch]
        width = plan.sequence_length if self._lengths is None else max(1, int(self._lengths[ids].max()) - 1)
        rows = self._line.rows(ids, width)
        targets = int(self._line.targets(ids).sum())
        documents = np.zeros(rows.tokens.shape, dtype=np.int32) if rows.documents is None else rows.documents
        return Batch(
            rows.tokens, ids, 0, documents, targets, targets, marks=rows.marks, labels=rows.labels,
            step_labels=rows.labels, step_samples=len(ids), sequences=self._line.sequences,
        )  # fmt: skip
