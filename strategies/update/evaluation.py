"""Evaluation of the weights that there are: forward passes over samples that are not trained on.

A micro-batch of them belongs to a virtual worker, so who holds that computes it, in whatever layout there is; what is
measured of it does not depend on that. Everything that was measured is told to all ranks, and added up in the order of
micro-batches, so that all know the same numbers, to the bit. A rank that is interrupted keeps what it has measured; the
next generation computes only what is missing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from strategies.comm.fabric import Fabric
from strategies.gradient.context import WorkContext
from strategies.gradient.forward import Chain, ForwardPasses
from strategies.gradient.spec import StepSpec
from strategies.layout.parallel import ParallelLayout
from strategies.model.head import Head
from strategies.model.model_part import ModelPart
from strategies.model.stage import whole_model
from strategies.objective.batch import Batch
from strategies.objective.metric import measured_by
from strategies.objective.objective import END_TO_END, Sums, TokenObjective
from strategies.objective.rows import Rows
from strategies.state.training_state import TrainingState
from strategies.update.vote import exchange, told_by

if TYPE_CHECKING:
    from strategies.model.fsdp import ShardedModelPart

Measured = dict[str, list[float]]
"""What was measured of one micro-batch, or of all."""


Measure = Callable[[StepSpec, torch.Tensor, Head | None, Rows], Sums]
"""From hidden states and their head, or logits, what is measured of some rows."""


class Samples(Protocol):
    """What is evaluated on."""

    @property
    def num_micro_batches(self) -> int:
        """How many micro-batches its samples make."""

    def batch(self, index: int) -> Batch:
        """One of them; the last may have fewer samples."""


class Place(NamedTuple):
    """Where a rank evaluates. `enter` is called with (phase, step), `check` before every micro-batch; what they raise
    interrupts it."""

    layout: ParallelLayout
    fabric: Fabric
    context: WorkContext | None
    """None: it has no part of the model, and only learns what others measure."""
    enter: Callable[[str, int], None]
    check: Callable[[], None]


class Evaluation:
    """Evaluates on `samples`, whenever it is asked to; `measured` is what is looked at. `moves` counts micro-batches
    that were computed."""

    def __init__(self, samples: Samples, spec: StepSpec, measured: Measure | None = None) -> None:
        self.samples, self._spec = samples, spec
        self._measured = measure if measured is None else measured
        self._step: int | None = None
        self._kept: dict[int, Measured] = {}
        self.moves = 0

    def run(self, step: int, state: TrainingState, place: Place) -> Measured:
        """What the weights after `step` steps give, of all samples. All ranks call it together. Raises PeerLost."""
        if step != self._step:
            self._step, self._kept = step, {}
        place.enter("tally", step)
        control = place.fabric.control
        # Who has seen a micro-batch before this generation need not be who holds its virtual worker now.
        known = told_by_all(control, np.array(sorted(self._kept), dtype=np.float64))
        done = {int(index) for row in known for index in row}
        shares = self._shares(place.layout, done)
        place.enter("evaluate", step)
        if place.context is not None and any(shares):
            self._compute(shares, state, place, place.context)
        place.enter("tally", step)
        found: dict[int, Measured] = {}
        for row in told_by_all(control, _packed(self._kept)):
            found |= _unpacked(row)
        assert sorted(found) == list(range(self.samples.num_micro_batches)), "a micro-batch was not evaluated"
        return added_up([found[index] for index in sorted(found)])

    def forget(self) -> None:
        """What is kept of an evaluation is of no use any more."""
        self._step, self._kept = None, {}

    def _shares(self, layout: ParallelLayout, done: set[int]) -> list[list[int]]:
        """The micro-batches that are missing, by replica."""
        holder = {index: replica for replica, held in enumerate(layout.assignment) for index in held}
        shares: list[list[int]] = [[] for _ in layout.assignment]
        for index in range(self.samples.num_micro_batches):
            if index not in done:
                shares[holder[index % layout.virtual_workers]].append(index)
        return shares

    @torch.no_grad()
    def _compute(
        self, shares: Sequence[Sequence[int]], state: TrainingState, place: Place, context: WorkContext
    ) -> None:  # fmt: skip
        part = state.arrangement.part
        assert part is not None
        layout, mine = context.layout, list(shares[context.place.data])
        # Where replicas have rows of each other's weights, all make as many passes.
        rounds = max(map(len, shares)) if part.is_sharded else len(mine)
        is_told = bool(told_by(layout, place.fabric.rank))
        passes = _Passes(self._spec, part, context, self._measured)
        rows = (self._rows(mine, number, part) for number in range(rounds))

        @contextmanager
        def enter(number: int) -> Iterator[None]:
            place.check()
            yield
            self.moves += 1
            if number < len(mine) and passes.last is not None and is_told:
                self._kept[mine[number]] = {name: values.tolist() for name, values in passes.last.items()}

        with _evaluating(part):
            passes.run(rows, enter)

    def _rows(self, mine: Sequence[int], number: int, part: ModelPart | ShardedModelPart) -> Rows:
        """The rows of this replica's micro-batch of that number, or made-up ones where it has none."""
        index = mine[number] if number < len(mine) else 0
        (rows,) = self._spec.micro_batches_of(self.samples.batch(index), part.device)
        if number < len(mine) or not hasattr(getattr(part.blueprint.model, "config", None), "model_type"):
            return rows
        return self._spec.objective.made_up(rows)


class _Passes:
    """Forward passes of one rank, in the order that all ranks of its replica make them. `last` is what was measured in
    the last one, where the model ends."""

    def __init__(
        self, spec: StepSpec, part: ModelPart | ShardedModelPart, context: WorkContext, measured: Measure
    ) -> None:  # fmt: skip
        self._spec, self._part, self._context, self._measured = spec, part, context, measured
        self._rows: Rows | None = None
        self.last: Sums | None = None

    def run(self, micro_batches: Iterator[Rows], enter: Callable[[int], Any]) -> None:
        """Raises PeerLost."""
        spec, part = self._spec, self._part
        if self._context.layout.pipeline == 1:
            for number, rows in enumerate(micro_batches):
                self._rows = rows
                with enter(number), spec.autocast(part.device):
                    part.modules[0](rows.tokens[:, :-1], rows.positions, self._score)
            return
        sizes = part.blueprint.stages.activations(spec.autocast(part.device))
        chain = Chain(self._context, part.device, sizes)
        ForwardPasses(part, spec, self._score, chain).run(self._noted(micro_batches), enter)

    def _noted(self, micro_batches: Iterator[Rows]) -> Iterator[Rows]:
        for rows in micro_batches:
            self._rows = rows
            yield rows

    def _score(self, value: torch.Tensor, head: Head | None) -> torch.Tensor:
        """Measures what the model gives: hidden states and their head, or logits."""
        assert self._rows is not None
        self.last = self._measured(self._spec, value, head, self._rows)
        return value.new_zeros(())


def measure(spec: StepSpec, value: torch.Tensor, head: Head | None, rows: Rows) -> Sums:
    """What the objective measures of some rows: from hidden states [rows, length, width] and their head, some positions
    at a time where that can be, or without a head from logits."""
    objective, chunk = spec.objective, spec.loss_chunk
    if head is None or not isinstance(objective, TokenObjective) or not (objective.by_token and chunk):
        given = whole_logits(value if head is None else head(value))
        found = objective.measure(given, rows)
        if spec.metrics:
            found |= measured_by(spec.metrics, given.flatten(0, 1), objective.labels(rows).flatten())
        return found
    hidden, labels = value.flatten(0, 1), objective.labels(rows).flatten()
    found = {}
    for start in range(0, len(labels), chunk):
        logits = whole_logits(head(hidden[None, start : start + chunk])).flatten(0, 1)
        part = objective.measure_tokens(logits, labels[start : start + chunk])
        part |= measured_by(spec.metrics, logits, labels[start : start + chunk])
        found = {
            name: values if name not in found
            else torch.cat([found[name], values]) if name.startswith(END_TO_END) else found[name] + values
            for name, values in part.items()
        }  # fmt: skip
    return found


def reference(spec: StepSpec, value: torch.Tensor, head: Head | None, rows: Rows) -> Sums:
    """What is kept of the model as a reference, of some rows, in their order."""
    logits = whole_logits(value if head is None else head(value))
    return {f"{END_TO_END}reference": spec.objective.reference(logits, rows).double()}


def whole_logits(logits: torch.Tensor) -> torch.Tensor:
    """Where tensor parallelism has split logits over classes, all of them."""
    split: Any = logits
    found: torch.Tensor = split.full_tensor() if hasattr(logits, "placements") else logits
    return found


@contextmanager
def _evaluating(part: ModelPart | ShardedModelPart) -> Iterator[None]:
    """Modules without dropout meanwhile; sharded ones have their rows only again afterwards."""
    for module in part.modules:
        module.eval()
    try:
        yield
    finally:
        for module in part.modules:
            module.train()
        if part.is_sharded:
            part.reshard()  # type: ignore[union-attr]


def added_up(measured: Sequence[Measured]) -> Measured:
    """Of all micro-batches together, in their order: exact sums, rounded once, or what is put end to end."""
    names = sorted({name for each in measured for name in each})
    found: Measured = {}
    for name in names:
        values = [each[name] for each in measured if name in each]
        if name.startswith(END_TO_END):
            found[name] = [number for row in values for number in row]
        else:
            found[name] = [math.fsum(column) for column in zip(*values, strict=True)]
    return found


# ---------------------------------------------------------------------------------------- telling


def told_by_all(control: Any, row: np.ndarray) -> list[np.ndarray]:
    """Everyone's fp64 `row`s, by rank, of any length. Raises PeerLost."""
    size = control.world_size
    lengths = exchange(control, np.array([len(row)], dtype=np.int64), [1] * size).tolist()
    if size == 1:
        return [row]
    everyone = exchange(control, row.view(np.int64), lengths) if any(lengths) else np.empty(0, dtype=np.int64)
    bounds = np.cumsum([0, *lengths]).tolist()
    return [everyone[a:b].copy().view(np.float64) for a, b in itertools.pairwise(bounds)]


def _packed(measured: Mapping[int, Measured]) -> np.ndarray:
    """As one line of numbers: for each micro-batch its index and how many names; for each of these, its letters, how
    many numbers, and those."""
    line: list[float] = []
    for index, by_name in measured.items():
        line += [index, len(by_name)]
        for name, values in by_name.items():
            letters = name.encode()
            line += [len(letters), *letters, len(values), *values]
    return np.array(line, dtype=np.float64)


def _unpacked(line: np.ndarray) -> dict[int, Measured]:
    found: dict[int, Measured] = {}
    at = 0

    def take(count: int) -> list[float]:
        nonlocal at
        at += count
        return line[at - count : at].tolist()  # type: ignore[no-any-return]

    while at < len(line):
        index, names = map(int, take(2))
        measured = found[index] = {}
        for _ in range(names):
            name = bytes(map(int, take(int(take(1)[0])))).decode()
            measured[name] = take(int(take(1)[0]))
    return found


@torch.no_grad()
def evaluate_alone(
    model: nn.Module,
    body: str | None,
    spec: StepSpec,
    samples: Samples,
    device: torch.device,
    measured_of: Measure | None = None,
) -> Measured:
    """What is measured (`measured_of`) of a whole model, on `device`, that no rank trains; for its `body` see
    `strategies.model.head`. The same numbers as those of ranks, in any layout."""
    looked_at = measure if measured_of is None else measured_of
    stage, found = whole_model(model, body), []
    model.eval()
    for index in range(samples.num_micro_batches):
        (rows,) = spec.micro_batches_of(samples.batch(index), device)
        measured: list[Sums] = []

        def score(
            value: torch.Tensor, head: Head | None, rows: Rows = rows, into: list[Sums] = measured
        ) -> torch.Tensor:  # fmt: skip
            into.append(looked_at(spec, value, head, rows))
            return value.new_zeros(())

        with spec.autocast(device):
            stage(rows.tokens[:, :-1], rows.positions, score)
        found.append({name: values.tolist() for name, values in measured[0].items()})
    return added_up(found)
