"""A job's data, whole: its stores, how they become samples, and what each virtual worker of each step gets of them.

A pure function of what it is made from, on the driver and on every worker alike. Knows nothing of the job file (see
`of_job`), ranks or models.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.compose import Composer
from orchestrator.data.cuts import Packing
from orchestrator.data.labels import LabelSpec
from orchestrator.data.ledger import virtual_worker_hash, write_lengths
from orchestrator.data.mix import MixedSampler
from orchestrator.data.sampler import Sampler
from orchestrator.data.samples import Line, cut_of
from orchestrator.data.store import TokenStore
from strategies.objective.batch import Batch

LENGTHS_NAME = "sample-lengths.bin"
_STEPS_KEPT = 4


@dataclass(frozen=True)
class DataPlan:
    """How a job uses its stores. `weights`: of each store, None where there is no mix. `token_cost`: see `Composer`."""

    sequence_length: int
    global_batch: int
    micro_batch: int
    virtual_workers: int
    seed: int
    shuffle: bool = True
    packing: Packing = "stream"
    document_mask: bool = False
    weights: tuple[float, ...] | None = None
    token_cost: int = 1
    labels: LabelSpec | None = None
    """Of records that have some."""
    is_full: bool = False
    """Whether rows that are padded have the length of a row, all of them, and not that of the longest beside them."""


@dataclass(frozen=True)
class _Step:
    """A step's samples in order, int64 [virtual_workers, share]; its targets and the positions it computes; and, for
    each virtual worker, the same, its predicted cost and the widths of its micro-batches (None: all are full)."""

    ids: NDArray[np.int64]
    targets: int
    positions: int
    num_targets: list[int]
    num_positions: list[int]
    costs: list[float] | None
    widths: list[tuple[int, ...]] | None
    labels: NDArray[np.int64] | None = None
    """Of the samples, in order, int64 [samples], where they have some."""


def line_of(stores: Sequence[TokenStore], plan: DataPlan) -> Line:
    """All samples of these stores, as `plan` cuts them. Raises DataError when a store has none."""
    cuts = [
        cut_of(store, plan.packing, plan.sequence_length, mask=plan.document_mask, labels=plan.labels)
        for store in stores
    ]
    return Line(cuts)


class Dataset:
    """See the module. `num_samples` is that of all stores together; ids are global: those of a store follow those of
    the store before. Safe to be asked by several threads at once."""

    def __init__(self, stores: Sequence[TokenStore], plan: DataPlan) -> None:
        """Raises DataError when a store has no sample or a weight is too small, ValueError like `Sampler`."""
        self.stores = tuple(stores)
        self.plan = plan
        self._line = line_of(self.stores, plan)
        self.sizes = self._line.sizes
        self.num_samples = sum(self.sizes)
        common = (plan.global_batch, plan.virtual_workers, plan.seed, plan.shuffle)
        self.sampler: Sampler | MixedSampler
        if plan.weights is None:
            self.sampler = Sampler(self.sizes[0], *common)
        else:
            self.sampler = MixedSampler(self.sizes, plan.weights, *common)
        self._composer = None
        lengths = self.sample_lengths
        if lengths is not None:
            self._composer = Composer(lengths, plan.micro_batch, plan.virtual_workers, plan.token_cost)
        self._steps: OrderedDict[int, _Step] = OrderedDict()
        self._lock = threading.Lock()

    # ------------------------------------------------------------------------------------ what it is

    @property
    def virtual_workers(self) -> int:
        """Into how many shares a step is cut."""
        return self.plan.virtual_workers

    @property
    def sequences(self) -> int:
        """Rows of a sample."""
        return self._line.sequences

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(store.vocab_size for store in self.stores)

    @property
    def num_tokens(self) -> int:
        """Tokens in all stores."""
        return sum(store.num_tokens for store in self.stores)

    @property
    def digest(self) -> str:
        """Of the tokens of all stores: the store's own where there is one."""
        if self.plan.weights is None:
            return self.stores[0].digest
        return "sha256:" + hashlib.sha256("\n".join(store.digest for store in self.stores).encode()).hexdigest()

    @property
    def padding(self) -> float:
        """The share of padding in packed rows; 0 where rows are not packed."""
        return self._line.padding

    @cached_property
    def sample_lengths(self) -> NDArray[np.int64] | None:
        """In tokens, by global id, int64 [num_samples]; None where all samples have one length."""
        return None if self.plan.is_full else self._line.lengths

    def describe(self, directory: Path, first_step: int = 0) -> dict[str, Any]:
        """What `audit` is given, for environment.json in `directory`; writes a file there where samples differ in
        length. Raises OSError."""
        plan = self.plan
        found: dict[str, Any] = {
            "num_samples": self.num_samples,
            "global_batch": plan.global_batch,
            "virtual_workers": plan.virtual_workers,
            "seed": plan.seed,
            "shuffle": plan.shuffle,
            "first_step": first_step,
        }
        if plan.weights is not None:
            pairs = zip(self.sizes, plan.weights, strict=True)
            found["sources"] = [{"num_samples": size, "weight": weight} for size, weight in pairs]
        if self.sample_lengths is not None:
            digest = write_lengths(directory / LENGTHS_NAME, self.sample_lengths)
            found["composition"] = {
                "lengths": LENGTHS_NAME, "digest": digest, "micro_batch": plan.micro_batch,
                "token_cost": plan.token_cost,
            }  # fmt: skip
        return found

    # ------------------------------------------------------------------------------------ what a step gets

    def step_ids(self, step: int) -> NDArray[np.int64]:
        """The ids of a whole step in the order of its virtual workers, int64 [global_batch]."""
        line = self.sampler.step_ids(step)
        return line if self._composer is None else self._composer.compose(line).ids

    def batch(self, step: int, virtual_worker: int) -> Batch:
        """What one virtual worker computes at one step. Raises ValueError for a virtual worker out of range."""
        plan = self.plan
        if plan.packing == "stream" and not plan.document_mask:
            ids = self.sampler.sample_ids(step, virtual_worker)
            tokens = self._line.rows(ids, plan.sequence_length).tokens
            targets = plan.global_batch * plan.sequence_length
            return Batch(
                tokens, ids, virtual_worker_hash(ids), None, targets, len(ids) * plan.sequence_length,
                step_samples=plan.global_batch,
            )  # fmt: skip
        found = self._step(step)
        if not 0 <= virtual_worker < plan.virtual_workers:
            raise ValueError(f"virtual worker {virtual_worker} is outside range({plan.virtual_workers})")
        ids, num_targets = found.ids[virtual_worker], found.num_targets[virtual_worker]
        widths = None if found.widths is None else found.widths[virtual_worker]
        rows = self._line.rows(ids, plan.sequence_length if widths is None else max(widths))
        return Batch(
            rows.tokens, ids, virtual_worker_hash(ids), rows.documents,
            targets=found.targets, num_targets=num_targets,
            num_padding=found.num_positions[virtual_worker] - num_targets,
            step_padding=found.positions - found.targets,
            cost=1.0 if found.costs is None else found.costs[virtual_worker], widths=widths,
            marks=rows.marks, labels=rows.labels, step_labels=found.labels, step_samples=plan.global_batch,
            sequences=self._line.sequences,
        )  # fmt: skip

    def _step(self, step: int) -> _Step:
        """The same for all virtual workers of a step, so it is kept for a while."""
        with self._lock:
            if step not in self._steps:
                self._steps[step] = self._compose(step)
                if len(self._steps) > _STEPS_KEPT:
                    self._steps.popitem(last=False)
            return self._steps[step]

    def _compose(self, step: int) -> _Step:
        plan = self.plan
        line = self.sampler.step_ids(step)
        costs: list[float] | None = None
        widths: list[tuple[int, ...]] | None = None
        if self._composer is None:
            positions_of_each = self._line.sequences * plan.sequence_length * (len(line) // plan.virtual_workers)
            ids, positions = line, [positions_of_each] * plan.virtual_workers
        else:
            composed = self._composer.compose(line)
            ids = composed.ids
            costs = [cost / self._usual_cost for cost in composed.costs]
            widths = [tuple(row) for row in composed.widths.tolist()]
            positions = [plan.micro_batch * self._line.sequences * sum(row) for row in widths]
        ids = ids.reshape(plan.virtual_workers, -1)
        num_targets: list[int] = self._line.targets(ids.reshape(-1)).reshape(ids.shape).sum(axis=1).tolist()
        # A step may be without any target (documents of one token); its loss is then the sum of none, 0.
        labels = self._line.labels(ids.reshape(-1)) if plan.labels is not None else None
        return _Step(ids, sum(num_targets), sum(positions), num_targets, positions, costs, widths, labels)

    @cached_property
    def _usual_cost(self) -> float:
        """The predicted cost of an average virtual worker of the job, if nothing were padded."""
        assert self._composer is not None
        assert self.sample_lengths is not None
        cost = self._composer.cost(self.sample_lengths - 1)
        weights = (1.0,) if self.plan.weights is None else self.plan.weights
        means = [float(part.mean()) for part in np.split(cost, self._line.offsets[1:])]
        mean = sum(weight * mean for weight, mean in zip(weights, means, strict=True)) / sum(weights)
        return mean * self.plan.global_batch / self.plan.virtual_workers
