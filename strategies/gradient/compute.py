"""What one rank computes of a step: the gradients of its virtual workers, summed along the tree as far as it can.

Nothing of it depends on other ranks, and what a virtual worker computes is a function of (job, step, virtual worker).
So a step that is interrupted, because another rank was lost, is continued by the next generation, not begun again:
finished subtrees, and the micro-batches of one that was under way, are kept for as long as their step is not committed
and this rank still holds them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch

from strategies.gradient.router_loss import RouterLoss
from strategies.gradient.routing import RouterExchange, Routing
from strategies.gradient.spec import StepSpec, first_pass
from strategies.gradient.stopwatch import Stopwatch
from strategies.model.blueprint import Blueprint
from strategies.model.head import Head
from strategies.model.joined import join_inputs
from strategies.model.model_part import ModelPart
from strategies.model.randomness import Streams
from strategies.model.recompute import recompute
from strategies.model.stage import Stage
from strategies.objective.batch import Batch
from strategies.objective.rows import Rows
from strategies.reduction.tree import Subtree
from strategies.reduction.tree_sum import Summing, TreeSum

if TYPE_CHECKING:
    from strategies.model.fsdp import ShardedModelPart

Fetch = Callable[[int, int], Batch]
"""(step, virtual worker) -> what it computes."""
Enter = Callable[[str, int], None]
"""Called with (phase, step) at the start of a phase; what it raises interrupts the work."""


def finish_queued(device: torch.device, check: Callable[[], None]) -> None:
    """Waits for what is queued on a device, at the end of a phase in which nobody else is waited for: else what comes
    next would seem to take that long, and who is still computing would be taken for stuck there. Exchanges of a model
    that is split are among it: `check` raises when they will not end."""
    if device.type != "cuda":
        return
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    while not done.query():
        check()
        time.sleep(0.0002)
    torch.cuda.synchronize(device)


def prepare(blueprint: Blueprint, modules: Sequence[Stage], spec: StepSpec) -> Streams:
    """Has the layers of model parts recompute what the job says, and take gradients as in every layout. Their random
    numbers: by layer, and after the last, where the model draws any."""
    streams = Streams(spec.seed)
    for module in modules:
        recompute(enumerate(module.layers), spec.recompute, draws=blueprint.draws)
    if not (blueprint.stages.are_stated or spec.compile):
        for module in modules:
            for layer in blueprint.blocks(module.module):
                join_inputs(layer)
    if blueprint.draws:
        for module in modules:
            for number, layer in blueprint.numbered_layers(module):
                streams.install(layer, number)
            if module.cut.is_last and blueprint.numbered_layers(blueprint.model):
                streams.install_behind(module.layers[-1], module.cut.num_layers)
    return streams


def routing_of(
    part: ModelPart | ShardedModelPart, spec: StepSpec, exchange: RouterExchange | None = None
) -> Routing | None:
    """Watches the routers of a model part; None where they add nothing to the loss."""
    loss = RouterLoss.of(part.blueprint.routers, spec.router_loss, spec.micro_batches)
    if loss is None:
        return None
    routing = Routing(loss, exchange)
    for module in part.modules:
        routing.install(module.module)
    return routing


def watching(routing: Routing | None, virtual_worker: int, micro_batch: int) -> AbstractContextManager[None]:
    """The context of passes of this micro-batch, forward and backward."""
    return nullcontext() if routing is None else routing.train(virtual_worker, micro_batch)


def no_loss(value: torch.Tensor, head: Head | None) -> torch.Tensor:
    """A score for passes whose result nobody wants: the head is not computed."""
    return value.new_zeros(())


def choose(model: Stage, rows: Rows, spec: StepSpec) -> None:
    """A forward pass for what its routers choose."""
    with spec.autocast(rows.tokens.device):
        model(rows.tokens[:, :-1], rows.positions, no_loss)


class _UnderWay(NamedTuple):
    """A virtual worker of which the first `micro_batches` are in `gradient` and `loss`."""

    virtual_worker: int
    micro_batches: int
    gradient: torch.Tensor
    loss: torch.Tensor


def loss_of_part(
    part: ModelPart | ShardedModelPart, spec: StepSpec
) -> Callable[[Rows, float | torch.Tensor], torch.Tensor]:
    """What gives the loss of a micro-batch, where one stage has the whole model: compiled if the job says so, in every
    layout, as that decides what the kernels are."""

    def loss(rows: Rows, weight: float | torch.Tensor) -> torch.Tensor:
        return spec.loss(part.modules[0], rows, weight)

    return torch.compile(loss) if spec.compile else loss


class LocalGradients:
    """Computes and keeps a replica's share of one step, where the replica has one pipeline stage.

    `losses` (its share of the step's mean) and `hashes` (of the sample ids) are by virtual worker.
    """

    def __init__(self, part: ModelPart, spec: StepSpec, fetch: Fetch, watch: Stopwatch | None = None) -> None:
        self.part = part
        self.watch = Stopwatch(part.device) if watch is None else watch
        self.spec = spec
        self.fetch = fetch
        self.losses: dict[int, torch.Tensor] = {}
        self.hashes: dict[int, int] = {}
        self.streams = prepare(part.blueprint, part.modules, spec)
        self.routing = routing_of(part, spec)
        self.summing = Summing()
        """How they are summed in this layout."""
        self._pool: list[torch.Tensor] = []
        self._sums: TreeSum | None = None
        self._step: int | None = None
        self._under_way: _UnderWay | None = None
        self._loss = loss_of_part(part, spec)

    def compute(
        self, step: int, held: Sequence[int], root: Subtree, *, enter: Enter, check: Callable[[], None]
    ) -> dict[Subtree, torch.Tensor]:
        """The gradients [size] of `held`, as one sum per node of their cover of the tree under `root`; to be read, not
        written.

        `enter` is called at the start of the phases "data" and "compute" of every virtual worker, `check` before every
        micro-batch. What they raise interrupts the work, which the next call for the same step continues.
        """
        if self._sums is not None and step == self._step:
            self._drop_others(held)
        if step != self._step or self._sums is None or not self.summing.go_on(self._sums):
            self.discard()
            self._step, self._sums = step, self.summing.start(root, self._pool)
        missing = [index for index in held if index not in self.losses]
        if not missing:
            enter("data", step)
            enter("compute", step)
        if self.routing is not None:
            self._count_choices(step, held, self.routing, enter, check)
        for index in missing:
            gradient = self._virtual_worker(step, index, enter, check)
            self._sums.add((index, index + 1), gradient)
        return dict(self._sums.pieces)

    @property
    def codes(self) -> dict[Subtree, torch.Tensor]:
        """Of the sums that `compute` gave, where they were rounded."""
        return {} if self._sums is None else self._sums.codes

    def discard(self) -> None:
        """Forgets all that is kept; the buffers are used again."""
        if self._sums is not None:
            self._sums.clear()
        if self._under_way is not None:
            self._pool.append(self._under_way.gradient)
        if self.routing is not None:
            self.routing.discard()
        self.losses, self.hashes = {}, {}
        self._step = self._under_way = self._sums = None

    def prepare_again(self) -> None:
        """To be called when another kind of work may have computed with the part since: its layers take their random
        numbers from here again, and its routers are watched."""
        self.streams = prepare(self.part.blueprint, self.part.modules, self.spec)
        if self.routing is not None:
            for module in self.part.modules:
                self.routing.install(module.module)

    def warm_up(self) -> None:
        """Tries the model out before it is needed.

        The first pass of a process is slow (kernels are chosen, memory is mapped, code is compiled); a standby that
        has done it joins at full speed.

        Raises ValueError for a model that cannot compute the job's first micro-batch, or that changes its persistent
        buffers; `strategies.trial.trial` has tried it before that.
        """
        before = {name: tensor.clone() for name, tensor in self.part.blueprint.buffers.items()}
        self.try_out()
        for name, tensor in self.part.blueprint.buffers.items():
            if not torch.equal(tensor, before[name]):
                raise ValueError(
                    f"the model changes its buffer {name!r} in a forward pass: each rank would have its own, and the "
                    "result would depend on which rank saw which data. Compute it from the input, or make it a trained "
                    "parameter; persistent=False is no way around it"
                )

    def try_out(self) -> torch.Tensor:
        """The gradient [size] of a forward and backward pass over the job's first micro-batch, which changes nothing;
        it lasts until the next one is computed."""
        batch = self.fetch(0, 0)
        rows = self.spec.micro_batches_of(batch, self.part.device)[0]
        scratch = self._pool.pop() if self._pool else self.part.new_gradient()
        self.part.accumulate_into(scratch.zero_())
        self.streams.enter(0, 0, 0)
        with first_pass(self.part.blueprint.model, rows.tokens.shape[1] - 1, self.part.blueprint.tensor):
            self._loss(rows, self.spec.divisor(batch)).backward()  # type: ignore[no-untyped-call]
        self.part.release_gradients()
        self._pool.append(scratch)
        return scratch

    def _drop_others(self, held: Sequence[int]) -> None:
        """Drops sums that contain a virtual worker which another rank holds now."""
        wanted = frozenset(held)
        assert self._sums is not None
        for node in [node for node in self._sums.pieces if not wanted.issuperset(range(*node))]:
            self._pool.append(self._sums.pieces.pop(node))
            for index in range(*node):
                del self.losses[index], self.hashes[index]
        if self._under_way is not None and self._under_way.virtual_worker not in wanted:
            self._pool.append(self._under_way.gradient)
            self._under_way = None

    def _virtual_worker(self, step: int, index: int, enter: Enter, check: Callable[[], None]) -> torch.Tensor:
        """The gradient [size] of one virtual worker, summed in micro-batch order."""
        enter("data", step)
        batch = self.fetch(step, index)
        micro_batches, weight = self.spec.micro_batches_of(batch, self.part.device), self.spec.divisor(batch)
        enter("compute", step)
        done, gradient, total = self._begin(index)
        self.part.accumulate_into(gradient)
        for micro, rows in enumerate(micro_batches):
            if micro < done:
                continue
            try:
                check()
            except BaseException:
                self._under_way = _UnderWay(index, micro, gradient, total)
                raise
            with self.watch.on(index), watching(self.routing, index, micro):
                self.streams.enter(step, index, micro)
                loss = self._loss(rows, weight)
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        if self.routing is not None:
            total += self.routing.all_losses([index])[index]
        self.losses[index], self.hashes[index] = total, batch.digest
        return gradient

    def _count_choices(
        self, step: int, held: Sequence[int], routing: Routing, enter: Enter, check: Callable[[], None]
    ) -> None:
        """Has routers choose, of all that is held, before anything is computed backward, where that has to be."""
        routing.begin(step)
        if not routing.counts_first:
            return
        for index in held:
            if routing.is_counted(index):
                continue
            enter("data", step)
            micro_batches = self.spec.micro_batches_of(self.fetch(step, index), self.part.device)
            enter("compute", step)
            for micro, rows in enumerate(micro_batches):
                check()
                self.streams.enter(step, index, micro)
                with self.watch.on(index), routing.count(index, micro), torch.no_grad():
                    choose(self.part.modules[0], rows, self.spec)
        routing.settle(held)

    def _begin(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        """How many micro-batches of a virtual worker are done, the gradient [size] and the loss they sum to."""
        if self._under_way is not None and self._under_way.virtual_worker == index:
            _, done, gradient, total = self._under_way
            self._under_way = None
            return done, gradient, total
        gradient = self._pool.pop() if self._pool else self.part.new_gradient()
        gradient.zero_()
        return 0, gradient, torch.zeros((), dtype=torch.float64, device=self.part.device)
