"""A replica's share of a step when its model is cut into pipeline stages, on torch.distributed.pipelining.

The schedules and the exchange of activations are torch's. Ours is that the gradient of each virtual worker is set
apart: its micro-batches are neighbours in the schedule, and before each backward pass the collector is told which one
it is for. Sources of the schedules: docs/layouts.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from strategies.compat import not_to_itself
from strategies.gradient.compute import Enter, no_loss, prepare, routing_of, watching
from strategies.gradient.context import WorkContext
from strategies.gradient.forward import Chain, ForwardPasses
from strategies.gradient.routing import Routing
from strategies.gradient.sharded import MADE_UP, Collector
from strategies.gradient.stopwatch import Stretch
from strategies.layout.schedule import LOSS_WAITS, PipelineSchedule, chunks_of, parts_of
from strategies.model.anatomy import Activations
from strategies.model.head import Score
from strategies.model.model_part import ModelPart
from strategies.objective.rows import Rows

if TYPE_CHECKING:
    from strategies.model.fsdp import ShardedModelPart

_SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved-1f1b": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleZBVZeroBubble,
}


class PipelineGradients:
    """Computes this rank's stage of its replica. `losses` are known on the last stage only, `hashes` on all.

    More than 15 attributes: a stage, its schedule and what is known of the step under way.
    """

    def __init__(self, part: ModelPart | ShardedModelPart, collector: Collector, context: WorkContext) -> None:
        self.part = part
        self.collector = collector
        self.watch, self.spec, self.fetch, self.held = context.watch, context.spec, context.fetch, context.held
        layout, spec, place = context.layout, context.spec, context.place
        self.losses: dict[int, torch.Tensor] = {}
        self.hashes: dict[int, int] = {}
        self._rows: list[Rows] = []
        self.streams = prepare(part.blueprint, part.modules, spec)
        self.routing = routing_of(part, spec, context.router_exchange(part.blueprint.routers))
        self.check: Callable[[], None] = lambda: None
        numbers = parts_of(layout.schedule, layout.pipeline, len(layout.parts), place.stage)
        self.is_first = 0 in numbers
        self.is_last = len(layout.parts) - 1 in numbers
        group = context.fabric.group("pipeline")
        self._stages = []
        batch = (spec.micro_batch * spec.objective.sequences, self.fetch(0, 0).tokens.shape[1] - 1)
        sizes = part.blueprint.stages.activations(spec.autocast(part.device))
        for index, (number, module) in enumerate(zip(numbers, part.modules, strict=True)):
            stage = _Stage(self, index, module, number, len(layout.parts), part.device, group, sizes, batch)
            self._stages.append(stage)
        rounds = collector.num_rounds if collector.computes_all else len(self.held)
        schedule = PipelineSchedule(layout.schedule, layout.pipeline, chunks_of(layout.schedule))
        self.num_micro_batches = schedule.padded(rounds * spec.micro_batches)
        # A virtual worker that is not there at all, or in part, is made up of another's tokens.
        made_up = -(-self.num_micro_batches // spec.micro_batches) - len(self.held)
        self._numbers = (*self.held, *([0] * max(0, made_up)))
        kind = _SCHEDULES[layout.schedule]
        stages = self._stages if layout.schedule in ("interleaved-1f1b", "zero-bubble") else self._stages[0]
        self._passes = ForwardPasses(part, spec, no_loss, Chain(context, part.device, sizes))
        # Then logits would be kept, of several micro-batches or between the halves of a backward pass.
        self._waits = layout.schedule in LOSS_WAITS
        self._schedule = kind(stages, self.num_micro_batches, loss_fn=self._loss, scale_grads=False)

    def prepare_again(self) -> None:
        """To be called when other work may have computed with the part since."""
        self.streams = prepare(self.part.blueprint, self.part.modules, self.spec)
        if self.routing is not None:
            for module in self.part.modules:
                self.routing.install(module.module)

    def compute(self, step: int, *, enter: Enter, check: Callable[[], None]) -> None:
        """Runs the schedule once. Raises PeerLost, or what torch's collectives raise when a peer is gone."""
        enter("data", step)
        self.losses, self.hashes = {}, {}
        self._step, self.check = step, check
        batches = []
        for number, index in enumerate(self._numbers):
            batch = self.fetch(step, index)
            batches.append(batch)
            if number < len(self.held):
                self.hashes[index] = batch.digest
        self._weight = self.spec.divisor(batches[0])
        rows = [each for batch in batches for each in self.spec.micro_batches_of(batch, self.part.device)]
        self._rows = rows[: self.num_micro_batches]
        tokens = torch.cat([each.tokens for each in self._rows])
        # Torch 2.11 wants the strides that it has seen first.
        arguments = (tokens[:, :-1].contiguous(),) if self.is_first else ()
        more = {}
        if self.spec.document_mask:
            more["position_ids"] = torch.cat([each.positions for each in self._rows if each.positions is not None])
        enter("compute", step)
        if self.routing is not None:
            self._count_choices(step, self.routing)
        self.collector.start()
        # Torch cuts it into micro-batches; what counts of it is in the rows.
        target = tokens if self.is_last else None
        self._schedule.step(*arguments, target=target, return_outputs=False, **more)
        if self.routing is not None:
            for index, of_routers in self.routing.all_losses(self.held).items():
                if index in self.losses:
                    self.losses[index] += of_routers

    def _count_choices(self, step: int, routing: Routing) -> None:
        """Has the routers of all stages choose, before anything is computed backward; all replicas make as many passes,
        as in the schedule."""
        routing.discard()
        routing.begin(step)

        @contextmanager
        def enter(chunk: int) -> Iterator[None]:
            self.enter_forward(chunk)
            number, micro = self.locate(chunk)
            is_real = number < len(self.held)
            with self.busy_with(chunk), routing.count(self.held[number], micro) if is_real else nullcontext():
                yield

        self._passes.run(self._rows, enter)
        routing.settle(self.held)

    # ------------------------------------------------------------------------------------ what the stages ask

    def locate(self, chunk: int) -> tuple[int, int]:
        """(number of the virtual worker in this replica, micro-batch in it) of a chunk of the schedule."""
        return divmod(chunk, self.spec.micro_batches)

    def busy_with(self, chunk: int) -> Stretch:
        """The stretch of work that a pass of this chunk is."""
        number, _ = self.locate(chunk)
        return self.watch.on(self.held[number] if number < len(self.held) else MADE_UP)

    def watching(self, chunk: int) -> AbstractContextManager[None]:
        """The context of passes of this chunk, for routers."""
        number, micro = self.locate(chunk)
        return watching(self.routing, self.held[number], micro) if number < len(self.held) else nullcontext()

    def enter_forward(self, chunk: int) -> None:
        self.check()
        number, micro = self.locate(chunk)
        self._chunk = chunk
        self.streams.enter(self._step, self._numbers[number], micro)

    def score_of(self, chunk: int) -> Score:
        """What the last stage makes a loss of a chunk with."""
        rows = self._rows[chunk]
        return lambda value, head: self.spec.score(value, head, rows, self._weight, waits=self._waits)

    def _loss(self, loss: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """What the last stage gives is a loss already; here it is noted whose it is."""
        number, _ = self.locate(self._chunk)
        if number < len(self.held):
            index = self.held[number]
            if index not in self.losses:
                self.losses[index] = torch.zeros((), dtype=torch.float64, device=loss.device)
            self.losses[index] += loss.detach()
        return loss


class _Stage(PipelineStage):
    """A pipeline stage that tells whose micro-batch it is at."""

    def __init__(
        self,
        owner: PipelineGradients,
        index: int,
        module: Any,
        number: int,
        parts: int,
        device: torch.device,
        group: Any,
        sizes: Activations,
        batch: tuple[int, int],
    ) -> None:
        tokens = torch.empty(batch, dtype=torch.int64, device="meta")
        hidden = torch.empty((*batch, *sizes.hidden_size), dtype=sizes.hidden_dtype, device="meta", requires_grad=True)
        loss = torch.empty((), device="meta", requires_grad=True)
        super().__init__(  # type: ignore[no-untyped-call]
            module, number, parts, device, group=group,
            input_args=(tokens if number == 0 else hidden,),
            output_args=(loss if number == parts - 1 else hidden,),
        )  # fmt: skip
        self._owner = owner
        self._index = index
        # FSDP2 hands gradients out at the end of a whole backward pass, and layers that recompute would do it for each
        # half: then zero bubble keeps its order only.
        self._splits_backward = not owner.part.is_sharded and owner.spec.recompute.mode == "none"
        if self._splits_backward:
            module.hold_parameters()

    def _get_init_p2p_neighbors_ops(self) -> Any:
        return not_to_itself(super()._get_init_p2p_neighbors_ops(), self.group_rank)  # type: ignore[no-untyped-call]

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self._owner.enter_forward(fwd_chunk_id)
        if self.is_last:
            stage: Any = self.submod
            stage.score = self._owner.score_of(fwd_chunk_id)
        owner = self._owner
        with owner.busy_with(fwd_chunk_id), owner.watching(fwd_chunk_id), owner.spec.autocast(owner.part.device):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        backward = functools.partial(super().backward_one_chunk, bwd_chunk_id, loss)
        if full_backward or not self._splits_backward:
            self._collect(bwd_chunk_id, lambda: backward(True, last_backward))
        else:
            with self._owner.busy_with(bwd_chunk_id), self._owner.watching(bwd_chunk_id):
                backward(False, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        if self._splits_backward:
            backward = functools.partial(super().backward_weight_one_chunk, bwd_chunk_id, last_backward)
            self._collect(bwd_chunk_id, backward)

    def _collect(self, chunk: int, backward: Callable[[], None]) -> None:
        self._owner.check()
        number, micro = self._owner.locate(chunk)
        self._owner.collector.begin(number, micro, self._index)
        with self._owner.busy_with(chunk), self._owner.watching(chunk):
            backward()
        self._owner.collector.end(number, micro, self._index)
