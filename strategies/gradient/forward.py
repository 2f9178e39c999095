"""Forward passes that nothing follows: micro-batches through all stages of a replica, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from strategies.gradient.context import WorkContext
from strategies.gradient.spec import StepSpec
from strategies.layout.schedule import parts_of
from strategies.model.anatomy import Activations
from strategies.model.head import Score
from strategies.model.model_part import ModelPart
from strategies.objective.rows import Rows

if TYPE_CHECKING:
    from strategies.model.fsdp import ShardedModelPart

_MOST_UNDER_WAY = 8
"""Hidden states that are kept until they have arrived."""


class Chain:
    """The parts of a model in one replica, and how hidden states get from each to the next."""

    def __init__(self, context: WorkContext, device: torch.device, sizes: Activations) -> None:
        layout, place = context.layout, context.place
        self._world = context.fabric.world
        self._device, self._sizes = device, sizes
        self.last = len(layout.parts) - 1
        self.own = parts_of(layout.schedule, layout.pipeline, len(layout.parts), place.stage)
        self._ranks = {
            part: layout.rank_of(place.data, stage, place.tensor)
            for stage in range(layout.pipeline)
            for part in parts_of(layout.schedule, layout.pipeline, len(layout.parts), stage)
        }
        self._under_way: list[tuple[Any, torch.Tensor]] = []

    def take(self, part: int, shape: tuple[int, int]) -> torch.Tensor:
        """The hidden states [*shape, width] that the part before gave. Raises PeerLost."""
        sizes = self._sizes
        hidden = torch.empty((*shape, *sizes.hidden_size), dtype=sizes.hidden_dtype, device=self._device)
        for work in self._world.start_together([("recv", hidden, self._ranks[part - 1])]):
            self._world.finish(work, "hidden states")
        return hidden

    def is_next_here(self, part: int) -> bool:
        """Whether the part after this one is on this rank."""
        return part + 1 in self.own

    def hand_on(self, part: int, hidden: torch.Tensor) -> None:
        """Starts sending what a part gave to the next. Raises PeerLost."""
        hidden = hidden.contiguous()
        works = self._world.start_together([("send", hidden, self._ranks[part + 1])])
        self._under_way += [(work, hidden) for work in works]
        while len(self._under_way) > _MOST_UNDER_WAY:
            self._finish_first()

    def finish(self) -> None:
        """Until all that was handed on has arrived. Raises PeerLost."""
        while self._under_way:
            self._finish_first()

    def _finish_first(self) -> None:
        work, _ = self._under_way.pop(0)
        self._world.finish(work, "hidden states")


class ForwardPasses:
    """Of one rank's part of the model, in a `chain`."""

    def __init__(self, part: ModelPart | ShardedModelPart, spec: StepSpec, score: Score, chain: Chain) -> None:
        self._part, self._spec, self._score, self._chain = part, spec, score, chain

    @torch.no_grad()
    def run(self, micro_batches: Iterable[Rows], enter: Callable[[int], AbstractContextManager[Any]]) -> None:
        """One after another, each in the context that `enter` gives of its number; what the model ends in is for the
        score. All ranks of a replica make the same passes. Raises PeerLost."""
        for number, rows in enumerate(micro_batches):
            with enter(number), self._spec.autocast(rows.tokens.device):
                self._through(rows)
        self._chain.finish()

    def _through(self, rows: Rows) -> None:
        chain = self._chain
        tokens = value = rows.tokens[:, :-1]
        for number, module in zip(chain.own, self._part.modules, strict=True):
            if number > 0 and number - 1 not in chain.own:
                value = chain.take(number, (tokens.shape[0], tokens.shape[1]))
            value = module(value, rows.positions, self._score)
            if number != chain.last and not chain.is_next_here(number):
                chain.hand_on(number, value)
