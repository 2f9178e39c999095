"""How the gradients of a rank's part of the model are compressed before they are sent, in one layout."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TypeVar

from strategies.gradient.context import WorkContext
from strategies.layout.virtual import VirtualState
from strategies.model.model_part import ModelPart
from strategies.model.randomness import stream_key
from strategies.reduction.coded import CodedReducer, CodedRoundReducer, Residual, Rounding
from strategies.reduction.power import LeavesApart, PowerReducer, matrices_of
from strategies.reduction.reducer import Reducer
from strategies.reduction.residuals import FACTOR, RESIDUAL, Factors, Residuals
from strategies.reduction.tree import Subtree
from strategies.reduction.tree_sum import Summing
from strategies.state.training_state import Arrangement
from strategies.wire.blocks import Blocks
from strategies.wire.codecs import codec_of

State = TypeVar("State", bound=VirtualState)


class Coding:
    """`summing` says how this rank sums up what it computes, in buffers [part.size]; `reducer` and `round_reducer` make
    what sums that up with others'."""

    def __init__(self, part: ModelPart, arrangement: Arrangement, context: WorkContext) -> None:
        self._part, self._arrangement, self._context = part, arrangement, context
        self._wire, self._space = context.spec.wire, part.blueprint.space
        self._slices = self._space.slices(part.flat, context.layout.data)
        self.summing: Summing = LeavesApart()
        if self._wire.name == "power_sgd":
            return
        size = codec_of(self._wire).block
        self._blocks = Blocks.of(self._space, part.flat, size)
        start, stop = list(pairwise([0, *accumulate(self._slices)]))[context.place.data]
        self.summing = Rounding(self._wire, Blocks.of(self._space, part.flat, size, part.size), self._residual)
        self._own = Rounding(self._wire, self._blocks.cut(start, stop), self._residual)

    @classmethod
    def where_asked(cls, part: ModelPart, arrangement: Arrangement, context: WorkContext) -> Coding | None:
        """None where gradients are sent as they are."""
        return None if context.spec.wire.is_exact else cls(part, arrangement, context)

    def _state(self, kind: type[State]) -> State:
        states = self._arrangement.states
        assert states is not None
        return next(state for state in states.states if isinstance(state, kind))

    def _residual(self, node: Subtree) -> Residual:
        residuals = self._state(Residuals)
        shard = self._arrangement.made(residuals, residuals.index(node), self._context.place.tensor)
        is_put = shard.has_prepared((RESIDUAL,))
        return Residual(shard.now(RESIDUAL), shard.prepared(RESIDUAL), is_put)

    def _factor(self) -> Residual:
        shard = self._arrangement.made(self._state(Factors), 0, self._context.place.tensor)
        return Residual(shard.now(FACTOR), shard.prepared(FACTOR))

    def reducer(self) -> Reducer:
        """For sums of whole gradients."""
        context, part = self._context, self._part
        group, layout, spec = context.fabric.data_group, context.layout, context.spec
        if self._wire.name != "power_sgd":
            return CodedReducer(group, layout, self._blocks, part.device, self._slices, self._own)
        matrices = matrices_of(
            self._space, part.flat, self._wire.rank, lambda name: stream_key(spec.seed, "power", name)
        )  # fmt: skip
        return PowerReducer(
            group, layout, part.flat, matrices, self._wire.rank, part.device, self._slices, self._factor,
            self._residual if self._wire.feedback else None, spec.schedule.warmup_steps,
        )  # fmt: skip

    def round_reducer(self) -> CodedRoundReducer:
        """For sums that are made round by round."""
        group, layout = self._context.fabric.data_group, self._context.layout
        return CodedRoundReducer(group, layout, self._blocks, self._slices, self._part.device, self._own)
