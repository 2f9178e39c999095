"""Gradients that are sharded while they are made: one virtual worker of every replica at a time, in rounds.

A collector is told which micro-batch of which round a backward pass is for, and takes what it leaves. All replicas go
through the same rounds in the same order; one that has fewer virtual workers than another takes part with nothing to
add (or, where the collectives are inside the model, with made-up work whose result nobody looks at).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Protocol

import torch

from strategies.gradient.compute import Enter, choose, loss_of_part, prepare, routing_of, watching
from strategies.gradient.context import WorkContext
from strategies.gradient.routing import Routing
from strategies.gradient.tied import TiedRounds
from strategies.layout.parallel import ParallelLayout
from strategies.model.model_part import ModelPart
from strategies.objective.rows import Rows
from strategies.reduction.reducer import RoundReducer
from strategies.reduction.tree import Subtree
from strategies.reduction.tree_sum import Summing

if TYPE_CHECKING:
    from strategies.model.fsdp import ShardedModelPart

MADE_UP = -1
"""Stands for a virtual worker where work is made up."""


class Collector(Protocol):
    """Takes the gradients of the backward passes of this replica, part by part of the model it has.

    `number` counts the replica's virtual workers, `module` its model parts. `num_rounds` is how many every replica
    must go through; with `computes_all` also those that it has no virtual worker for.
    """

    num_rounds: int
    computes_all: bool

    def start(self) -> None:
        """A step begins."""

    def begin(self, number: int, micro: int, module: int) -> None:
        """The next backward pass is for this micro-batch."""

    def end(self, number: int, micro: int, module: int) -> None:
        """It is done."""

    def inject_nan(self) -> None:
        """The next gradient is to be not finite (fault injection)."""


class _Buffered:
    """Gradients [size] of the virtual workers under way; micro-batches add up in order. `_take` is given each when all
    of it is there, and its buffer with it."""

    def __init__(self, part: ModelPart, micro_batches: int) -> None:
        self._part = part
        self._micro_batches = micro_batches
        self._open: dict[int, torch.Tensor] = {}
        self._bound: dict[int, int] = {}
        self._done: dict[tuple[int, int], int] = {}
        self._pool: list[torch.Tensor] = []
        self._is_nan_next = False

    def start(self) -> None:
        self._pool += self._open.values()
        self._open, self._bound, self._done = {}, {}, {}
        self._part.release_gradients()

    def begin(self, number: int, micro: int, module: int) -> None:
        assert self._done.get((number, module), 0) == micro, "micro-batches must be summed in order"
        if self._bound.get(module) == number:
            return
        if number not in self._open:
            buffer = self._pool.pop() if self._pool else self._part.new_gradient()
            self._open[number] = buffer.zero_()
        self._part.accumulate_into(self._open[number], module)
        self._bound[module] = number

    def end(self, number: int, micro: int, module: int) -> None:
        self._done[number, module] = micro + 1
        modules = range(len(self._part.modules))
        if any(self._done.get((number, each), 0) < self._micro_batches for each in modules):
            return
        gradient = self._open.pop(number)
        if self._is_nan_next:
            gradient[:1] = torch.nan
            self._is_nan_next = False
        self._take(number, gradient)

    def inject_nan(self) -> None:
        self._is_nan_next = True

    def _take(self, number: int, gradient: torch.Tensor) -> None:
        raise NotImplementedError


class TreeCollector(_Buffered):
    """Keeps whole gradients, summed along the tree as far as this replica can; `pieces` are for a Reducer."""

    computes_all = False

    def __init__(
        self, part: ModelPart, held: Sequence[int], root: Subtree, micro_batches: int, summing: Summing
    ) -> None:  # fmt: skip
        super().__init__(part, micro_batches)
        self.num_rounds = len(held)
        self._held = tuple(held)
        self._sums = summing.start(root, self._pool)

    def start(self) -> None:
        super().start()
        self._sums.clear()

    def _take(self, number: int, gradient: torch.Tensor) -> None:
        if number < len(self._held):
            self._sums.add((self._held[number], self._held[number] + 1), gradient)
        else:
            self._pool.append(gradient)

    @property
    def pieces(self) -> dict[Subtree, torch.Tensor]:
        """The sums [size] of the largest whole subtrees; to be read, not written."""
        return dict(self._sums.pieces)

    @property
    def codes(self) -> dict[Subtree, torch.Tensor]:
        """Of those, where they were rounded."""
        return self._sums.codes


class RoundCollector(_Buffered):
    """Hands every finished virtual worker's gradient to its owners (ZeRO stage 2)."""

    def __init__(
        self, part: ModelPart, reducer: RoundReducer, tied: TiedRounds, context: WorkContext,
        summing: Summing,
    ) -> None:  # fmt: skip
        super().__init__(part, context.spec.micro_batches)
        self._held, self._summing = context.held, summing
        self._tied = tied
        self.num_rounds = reducer.num_rounds
        self.computes_all = context.layout.pipeline > 1
        self._reducer = reducer
        self._empty = torch.empty(0, device=part.device)

    def start(self) -> None:
        super().start()
        self._reducer.begin()
        self._tied.begin()

    def _take(self, number: int, gradient: torch.Tensor) -> None:
        if number < self.num_rounds:
            codes = None
            if number < len(self._held):
                codes = self._summing.round((self._held[number], self._held[number] + 1), gradient)
            with self._reducer.groups.traffic.of("gradients"):
                self._reducer.add(number, gradient[: self._part.flat.size], codes)
                self._tied.add_round(number, gradient)
        self._pool.append(gradient)

    def skip(self, number: int) -> None:
        """A round that this replica has no virtual worker for."""
        with self._reducer.groups.traffic.of("gradients"):
            self._reducer.add(number, self._empty)
            self._tied.add_round(number, self._empty)


class ShardedCollector:
    """Tells the groups of a rank's model parts whose gradients they are given."""

    computes_all = True

    def __init__(self, part: ShardedModelPart, layout: ParallelLayout, micro_batches: int) -> None:
        self.num_rounds = max(len(held) for held in layout.assignment)
        self._part = part
        self._layout = layout
        self._micro_batches = micro_batches

    def start(self) -> None:
        for groups in self._part.groups:
            for group in groups:
                group.start(self._layout.root)

    def begin(self, number: int, micro: int, module: int) -> None:
        dealt = enumerate(self._layout.assignment)
        workers = [(replica, held[number]) for replica, held in dealt if number < len(held)]
        for group in self._part.groups[module]:
            group.expect(workers, is_last=micro + 1 == self._micro_batches)

    def end(self, number: int, micro: int, module: int) -> None:
        """The groups have taken it."""
        self._part.backward_is_over(module)

    def inject_nan(self) -> None:
        first = next((group for groups in self._part.groups for group in groups if group.entries), None)
        if first is not None:
            first.is_nan_next = True


class RoundGradients:
    """Computes a replica's share of a step round by round, where the replica has one pipeline stage.

    `losses` and `hashes` as in `LocalGradients`.
    """

    def __init__(self, part: ModelPart | ShardedModelPart, collector: Collector, context: WorkContext) -> None:
        self.part = part
        self.collector = collector
        self.watch, self.spec, self.fetch, self.held = context.watch, context.spec, context.fetch, context.held
        self.losses: dict[int, torch.Tensor] = {}
        self.hashes: dict[int, int] = {}
        self.streams = prepare(part.blueprint, part.modules, self.spec)
        self.routing = routing_of(part, self.spec, context.router_exchange(part.blueprint.routers))
        self._loss = loss_of_part(part, self.spec)

    def compute(self, step: int, *, enter: Enter, check: Callable[[], None]) -> None:
        """Runs all rounds of a step. Raises PeerLost."""
        self.losses, self.hashes = {}, {}
        if self.routing is not None:
            self._count_choices(step, self.routing, enter, check)
        self.collector.start()
        for number in range(self.collector.num_rounds):
            enter("data", step)
            if number >= len(self.held) and not self.collector.computes_all:
                enter("compute", step)
                assert isinstance(self.collector, RoundCollector)
                self.collector.skip(number)
                continue
            is_real = number < len(self.held)
            index = self.held[number] if is_real else 0
            batch = self.fetch(step, index)
            micro_batches, weight = self.spec.micro_batches_of(batch, self.part.device), self.spec.divisor(batch)
            enter("compute", step)
            total = torch.zeros((), dtype=torch.float64, device=self.part.device)
            for micro, rows in enumerate(micro_batches):
                check()
                # Nobody looks at made-up work.
                watched = watching(self.routing, index, micro) if is_real else nullcontext()
                with self.watch.on(index if is_real else MADE_UP), watched:
                    self.streams.enter(step, index, micro)
                    loss = self._loss(rows if is_real else self._made_up(rows), weight)
                    self.collector.begin(number, micro, 0)
                    loss.backward()  # type: ignore[no-untyped-call]
                    self.collector.end(number, micro, 0)
                    total += loss.detach()
            if is_real:
                if self.routing is not None:
                    total += self.routing.all_losses([index])[index]
                self.losses[index], self.hashes[index] = total, batch.digest

    def _count_choices(self, step: int, routing: Routing, enter: Enter, check: Callable[[], None]) -> None:
        """See `LocalGradients`: all replicas make as many passes where they compute together."""
        routing.discard()
        routing.begin(step)
        if not routing.counts_first:
            return
        for number in range(self.collector.num_rounds if self.collector.computes_all else len(self.held)):
            is_real = number < len(self.held)
            index = self.held[number] if is_real else 0
            enter("data", step)
            micro_batches = self.spec.micro_batches_of(self.fetch(step, index), self.part.device)
            enter("compute", step)
            for micro, rows in enumerate(micro_batches):
                check()
                self.streams.enter(step, index, micro)
                counting = routing.count(index, micro) if is_real else nullcontext()
                with self.watch.on(index if is_real else MADE_UP), counting, torch.no_grad():
                    choose(self.part.modules[0], rows if is_real else self._made_up(rows), self.spec)
        routing.settle(self.held)

    def _made_up(self, rows: Rows) -> Rows:
        """One token is enough for a model to take part, if it takes rows of any length, as those of transformers do."""
        config = getattr(self.part.blueprint.model, "config", None)
        return self.spec.objective.made_up(rows) if hasattr(config, "model_type") else rows
