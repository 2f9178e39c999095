"""How the gradients of a rank's part of the model are rounded before they are sent, in one layout."""

from __future__ import annotations

from itertools import accumulate, pairwise

from strategies.gradient.context import WorkContext
from strategies.model.model_part import ModelPart
from strategies.reduction.coded import CodedReducer, CodedRoundReducer, Residual, Rounding
from strategies.reduction.residuals import RESIDUAL, Residuals
from strategies.reduction.tree import Subtree
from strategies.state.training_state import Arrangement
from strategies.wire.blocks import Blocks
from strategies.wire.codecs import codec_of


class Coding:
    """`whole` rounds buffers [part.size] of gradients, as this rank computes them; `reducer` and `round_reducer` make
    what sums them up."""

    def __init__(self, part: ModelPart, arrangement: Arrangement, context: WorkContext) -> None:
        self._arrangement, self._context = arrangement, context
        wire, space = context.spec.wire, part.blueprint.space
        size = codec_of(wire).block
        self._device = part.device
        self._blocks = Blocks.of(space, part.flat, size)
        self._slices = space.slices(part.flat, context.layout.data)
        bounds = list(pairwise([0, *accumulate(self._slices)]))[context.place.data]
        self.whole = Rounding(wire, Blocks.of(space, part.flat, size, part.size), self._residual)
        self._own = Rounding(wire, self._blocks.cut(*bounds), self._residual)

    @classmethod
    def where_asked(cls, part: ModelPart, arrangement: Arrangement, context: WorkContext) -> Coding | None:
        """None where gradients are sent as they are."""
        return None if context.spec.wire.is_exact else cls(part, arrangement, context)

    def _residual(self, node: Subtree) -> Residual:
        states = self._arrangement.states
        assert states is not None
        residuals = next(state for state in states.states if isinstance(state, Residuals))
        shard = self._arrangement.made(residuals, residuals.index(node), self._context.place.tensor)
        return Residual(shard.now(RESIDUAL), shard.prepared(RESIDUAL))

    def reducer(self) -> CodedReducer:
        """For sums of whole gradients."""
        context = self._context
        return CodedReducer(
            context.fabric.data_group, context.layout, self._blocks, self._device, self._slices, self._own
        )  # fmt: skip

    def round_reducer(self) -> CodedRoundReducer:
        """For sums that are made round by round."""
        context = self._context
        return CodedRoundReducer(
            context.fabric.data_group, context.layout, self._blocks, self._slices, self._device, self._own
        )  # fmt: skip
