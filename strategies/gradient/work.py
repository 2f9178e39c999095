"""How a rank makes its slice of the reduced gradient in a layout: what computes, and what reduces.

`work_for` is the one place where the kinds of layouts part ways; to a step they are all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from strategies.comm.fabric import Fabric
from strategies.gradient.coding import Coding
from strategies.gradient.compute import Enter, Fetch, LocalGradients, finish_queued
from strategies.gradient.context import WorkContext
from strategies.gradient.routing import RouterExchange
from strategies.gradient.sharded import Collector, RoundCollector, RoundGradients, ShardedCollector, TreeCollector
from strategies.gradient.spec import StepSpec
from strategies.gradient.stopwatch import Stopwatch
from strategies.gradient.tied import TiedGradients, TiedRounds, TiedShards
from strategies.layout.parallel import ParallelLayout
from strategies.model.model_part import ModelPart
from strategies.model.routers import Routers
from strategies.reduction.hierarchy import HierarchicalReducer
from strategies.reduction.reducer import Reducer, RoundReducer
from strategies.reduction.tree import Subtree
from strategies.reduction.tree_sum import Summing
from strategies.state.shard import StateShard
from strategies.state.training_state import Arrangement

if TYPE_CHECKING:
    from strategies.gradient.pipeline import PipelineGradients
    from strategies.model.fsdp import ShardedModelPart


class Computed(NamedTuple):
    """What a rank has computed of a step: `losses` are virtual workers' shares of the mean loss, known where the model
    ends, `hashes` those of their sample ids. `norms` are of the gradients of virtual replicas that train by themselves
    (NaN: not finite), by their numbers."""

    losses: dict[int, torch.Tensor]
    hashes: dict[int, int]
    norms: dict[int, float] = {}  # noqa: RUF012


class GradientWork(Protocol):
    """One rank's part of every round in a layout."""

    @property
    def local(self) -> LocalGradients | None:
        """What computes here, if one stage has the whole model and keeps what an interrupted step has come to."""

    def of_step(self, step: int) -> Computed:
        """What it has computed of a step of the round."""

    def prepare_again(self) -> None:
        """To be called when other work may have computed with the model since."""

    def refresh(self, enter: Callable[[str], None]) -> None:
        """Brings the weights that the model computes with up to date."""

    def run(self, step: int, enter: Enter, check: Callable[[], None]) -> None:
        """Computes the round that begins with this step, reduces, and leaves the reduced gradient of what this rank
        trains in `own.gradient`."""

    def inject_nan(self) -> None:
        """The next gradient is to be not finite (fault injection)."""

    def discard(self) -> None:
        """Forgets what is kept of the step."""


class IdleWork:
    """A spare's: it has none, but for a `router_exchange` in which all ranks take part."""

    def __init__(self, router_exchange: RouterExchange | None = None) -> None:
        self._router_exchange = router_exchange
        self.local = None

    def prepare_again(self) -> None:
        """Nothing computes here."""

    def of_step(self, step: int) -> Computed:
        return Computed({}, {})

    def refresh(self, enter: Callable[[str], None]) -> None:
        """Nothing computes here."""

    def run(self, step: int, enter: Enter, check: Callable[[], None]) -> None:
        """Only waits for the vote."""
        if self._router_exchange is not None:
            self._router_exchange.take_part()

    def inject_nan(self) -> None:
        """No gradient is computed here."""

    def discard(self) -> None:
        """Nothing is kept."""


class _Replicated:
    """Weights are whole on every rank of the data-parallel group; slices are reduced at once (ZeRO stages 0 and 1)."""

    def __init__(
        self, part: ModelPart, own: StateShard, reducer: Reducer, tied: TiedGradients, *, sharded: bool
    ) -> None:  # fmt: skip
        self.part = part
        self.own = own
        self.reducer = reducer
        self.tied = tied
        self.sharded = sharded
        self._is_nan_next = False
        self.summing = Summing()

    def refresh(self, enter: Callable[[str], None]) -> None:
        if self.sharded:
            enter("refresh")
            self.reducer.gather(self.own.weights, self.part.state_weights)
        elif self.part.state_weights is not self.own.weights:
            self.part.state_weights.copy_(self.own.weights)
        self.tied.send_weights()

    def inject_nan(self) -> None:
        self._is_nan_next = True

    def reduce(
        self, step: int, pieces: dict[Subtree, torch.Tensor], codes: dict[Subtree, torch.Tensor], enter: Enter,
        check: Callable[[], None],
    ) -> None:  # fmt: skip
        if self._is_nan_next:
            self._is_nan_next = False
            for node, piece in pieces.items():
                piece[0] = torch.nan
                if (found := self.summing.round(node, piece)) is not None:
                    codes[node] = found
        finish_queued(self.part.device, check)
        enter("reduce", step)
        self.reducer.begin(step)
        reduced = self.reducer.reduce({node: piece[: self.part.flat.size] for node, piece in pieces.items()}, codes)
        gradient = self.own.gradient
        if self.sharded:
            gradient.copy_(self.reducer.own_slice(reduced) if self.reducer.native else reduced)
            self.tied.add(pieces, gradient)
            return
        # What one replica has reduced are its pieces, which stay as they are.
        is_alone = self.reducer.layout.data == 1
        if not is_alone:
            self.tied.add(pieces, reduced)
        enter("gather", step)
        if self.reducer.native:
            gradient.copy_(reduced)
        else:
            self.reducer.gather_sum(reduced, gradient)
        if is_alone:
            self.tied.add(pieces, gradient)


class LocalWork(_Replicated):
    """A replica of one stage; what it has computed outlives an interrupted step."""

    def __init__(
        self,
        local: LocalGradients,
        part: ModelPart,
        own: StateShard,
        reducer: Reducer,
        tied: TiedGradients,
        held: tuple[int, ...],
        *,
        sharded: bool,
    ) -> None:
        super().__init__(part, own, reducer, tied, sharded=sharded)
        self.local: LocalGradients = local
        self.held = held

    def of_step(self, step: int) -> Computed:
        return Computed(self.local.losses, self.local.hashes)

    def prepare_again(self) -> None:
        self.local.prepare_again()

    def run(self, step: int, enter: Enter, check: Callable[[], None]) -> None:
        pieces = self.local.compute(step, self.held, self.reducer.layout.root, enter=enter, check=check)
        self.reduce(step, pieces, self.local.codes, enter, check)

    def discard(self) -> None:
        self.local.discard()


class PipelineWork(_Replicated):
    """A stage of a replica, with whole gradients."""

    def __init__(
        self, pipeline: PipelineGradients, collector: TreeCollector, part: ModelPart, own: StateShard,
        reducer: Reducer, tied: TiedGradients, *, sharded: bool,
    ) -> None:  # fmt: skip
        super().__init__(part, own, reducer, tied, sharded=sharded)
        self._pipeline = pipeline
        self._collector = collector

    local = None

    def of_step(self, step: int) -> Computed:
        return Computed(self._pipeline.losses, self._pipeline.hashes)

    def prepare_again(self) -> None:
        self._pipeline.prepare_again()

    def run(self, step: int, enter: Enter, check: Callable[[], None]) -> None:
        self._pipeline.compute(step, enter=enter, check=check)
        self.reduce(step, self._collector.pieces, self._collector.codes, enter, check)

    def discard(self) -> None:
        """Pieces belong to the collector, which starts anew with every step."""


class RoundWork:
    """Gradients are reduced while they are made, round by round (ZeRO stages 2 and 3)."""

    def __init__(
        self,
        gradients: RoundGradients | PipelineGradients,
        collector: Collector,
        own: StateShard,
        gather: Callable[[Callable[[str], None]], None],
        take: Callable[[torch.Tensor], object],
    ) -> None:
        self._gradients = gradients
        self._collector = collector
        self._own = own
        self._gather = gather
        self._take = take

    local = None

    def of_step(self, step: int) -> Computed:
        return Computed(self._gradients.losses, self._gradients.hashes)

    def prepare_again(self) -> None:
        """No rule computes with shards otherwise."""

    def refresh(self, enter: Callable[[str], None]) -> None:
        self._gather(enter)

    def run(self, step: int, enter: Enter, check: Callable[[], None]) -> None:
        self._gradients.compute(step, enter=enter, check=check)
        finish_queued(self._own.device, check)
        enter("reduce", step)
        self._take(self._own.gradient)

    def inject_nan(self) -> None:
        self._collector.inject_nan()

    def discard(self) -> None:
        """The collector starts anew with every step."""


def work_for(
    arrangement: Arrangement, layout: ParallelLayout, fabric: Fabric, spec: StepSpec, fetch: Fetch,
    watch: Stopwatch, kept: LocalGradients | None, routers: Routers | None,
) -> GradientWork:  # fmt: skip
    """This rank's work in `layout`, timed by `watch`. `kept` is what an earlier generation computed with the same part
    of the model, which has these `routers`."""
    place, part, own = layout.place(fabric.rank), arrangement.part, arrangement.own
    for shard in arrangement.state_shards:
        # A share of the gradient, and what is for others, is there in an update only, when activations are not.
        shard.keeps_gradient = shard is own and layout.effective_shard == "none"
    if place is None or part is None or own is None:
        return IdleWork(RouterExchange.where_needed(routers, spec, layout, fabric))
    context = WorkContext(layout, place, fabric, spec, fetch, watch)
    match layout.effective_shard:
        case "parameters":
            from strategies.model.fsdp import ShardedModelPart

            assert isinstance(part, ShardedModelPart)
            return _sharded_work(part, own, context)
        case "gradients":
            assert isinstance(part, ModelPart)
            return _round_work(part, own, context, Coding.where_asked(part, arrangement, context))
        case kind:
            assert isinstance(part, ModelPart)
            coding = Coding.where_asked(part, arrangement, context)
            return _replicated_work(part, own, context, kept, coding, sharded=kind == "optimizer")


def _replicated_work(
    part: ModelPart, own: StateShard, context: WorkContext, kept: LocalGradients | None, coding: Coding | None,
    *, sharded: bool,
) -> GradientWork:  # fmt: skip
    layout, spec, held = context.layout, context.spec, context.held
    reducer = _reducer_for(part, context) if coding is None else coding.reducer()
    tied, summing = TiedGradients(part, context), Summing() if coding is None else coding.summing
    if layout.pipeline == 1:
        if kept is not None and kept.part is part:
            local = kept
            local.prepare_again()
        else:
            local = LocalGradients(part, spec, context.fetch, context.watch)
        local.summing = summing
        if local.routing is not None:
            local.routing.exchange = context.router_exchange(part.blueprint.routers)
        if layout.tensor > 1:
            # What a tensor-parallel group has computed it must have computed together.
            local.discard()
        work = LocalWork(local, part, own, reducer, tied, held, sharded=sharded)
        work.summing = summing
        return work
    collector = TreeCollector(part, held, layout.root, spec.micro_batches, summing)
    from strategies.gradient.pipeline import PipelineGradients

    pipeline = PipelineGradients(part, collector, context)
    in_stages = PipelineWork(pipeline, collector, part, own, reducer, tied, sharded=sharded)
    in_stages.summing = summing
    return in_stages


def _reducer_for(part: ModelPart, context: WorkContext) -> Reducer:
    fabric, layout, native = context.fabric, context.layout, context.spec.native_reduction
    slices = part.blueprint.space.slices(part.flat, layout.data)
    if fabric.hierarchy is None or native:
        return Reducer(fabric.data_group, layout, part.flat.size, part.device, native, slices)
    return HierarchicalReducer(fabric.data_group, fabric.hierarchy, layout, part.flat.size, part.device, slices)


def _round_work(part: ModelPart, own: StateShard, context: WorkContext, coding: Coding | None) -> GradientWork:
    layout, group = context.layout, context.fabric.data_group
    sizes = part.blueprint.space.slices(part.flat, layout.data)
    slices, tied = Reducer(group, layout, part.flat.size, part.device, slices=sizes), TiedRounds(part, context)
    rounds = RoundReducer(group, layout, slices.slices, part.device) if coding is None else coding.round_reducer()
    collector = RoundCollector(part, rounds, tied, context, Summing() if coding is None else coding.summing)

    def gather(enter: Callable[[str], None]) -> None:
        enter("refresh")
        slices.gather(own.weights, part.state_weights)
        tied.send_weights()

    def take(gradient: torch.Tensor) -> None:
        gradient.copy_(rounds.total())
        tied.add(gradient)

    return RoundWork(_gradients(part, collector, context), collector, own, gather, take)


def _sharded_work(part: ShardedModelPart, own: StateShard, context: WorkContext) -> GradientWork:
    collector = ShardedCollector(part, context.layout, context.spec.micro_batches)
    tied = TiedShards(part, own, context)
    part.keep_in(own.weights, own.flat)

    def load(enter: Callable[[str], None]) -> None:
        part.load(own.weights, own.flat)
        tied.send_weights()

    def unload(gradient: torch.Tensor) -> None:
        part.unload(gradient, own.flat)
        tied.add()
        part.free_sums()

    return RoundWork(_gradients(part, collector, context), collector, own, load, unload)


def _gradients(
    part: ModelPart | ShardedModelPart, collector: Collector, context: WorkContext
) -> RoundGradients | PipelineGradients:
    if context.layout.pipeline == 1:
        return RoundGradients(part, collector, context)
    from strategies.gradient.pipeline import PipelineGradients

    return PipelineGradients(part, collector, context)


def import_for(*, tensor: int, pipeline: int, shard: str) -> None:
    """Imports what work in layouts of these degrees takes, of torch's. It takes a process seconds, which no generation
    should wait for, nor a worker that needs none of it."""
    if tensor > 1 or pipeline > 1 or shard == "parameters":
        import torch.distributed.device_mesh
        import torch.distributed.tensor.parallel  # noqa: F401
    if pipeline > 1:
        import strategies.gradient.pipeline
    if shard == "parameters":
        import strategies.model.fsdp  # noqa: F401
