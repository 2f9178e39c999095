"""What virtual replicas that train by themselves exchange, and when; the outer optimizer; what they keep. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.layout.parallel import ParallelLayout
from strategies.layout.replicas import islands_of, replicas_at
from strategies.layout.space import Space
from strategies.layout.virtual import Place, VirtualState
from strategies.wire.format import FP32, WireFormat

if TYPE_CHECKING:
    import torch

MOMENTUM = "update.momentum"
"""The kind of state that the outer optimizer keeps."""
OWN_WEIGHTS = "weights"
"""The kind of a replica's state that its own weights are, where it goes on with them."""


@dataclass(frozen=True)
class LocalSettings:
    """See `strategies.update.local`; `mix` is how much of its own weights a replica keeps in an exchange. The first
    `warmup_steps` steps are synchronous. `lr`, `momentum` and `nesterov` are the outer optimizer's."""

    replicas: int
    inner_steps: int
    warmup_steps: int = 0
    lr: float = 0.7
    momentum: float = 0.9
    nesterov: bool = True
    fragments: int = 1
    overlap_steps: int = 0
    mix: float = 0.0
    wire: WireFormat = FP32

    @property
    def round_steps(self) -> int:
        """Inner steps of a round."""
        return self.inner_steps // self.fragments

    @property
    def keeps_weights(self) -> bool:
        """Whether a replica goes on with weights of its own after a round, and not with the outer ones."""
        return self.fragments > 1 or self.overlap_steps > 0 or self.mix > 0

    @property
    def averages(self) -> bool:
        """Whether the outer weights are simply the mean of those of the replicas, which then are what is exchanged: it
        is that to the last bit."""
        return (self.lr, self.momentum) == (1.0, 0.0) and not self.keeps_weights and self.wire.is_exact

    def end_of(self, first: int, total: int) -> int:
        """See `UpdateRule.end_of`."""
        if first < self.warmup_steps:
            return first + 1
        return min(first + self.round_steps, total) if total else first + self.round_steps

    def exchanged(self, first: int, total: int) -> tuple[int, ...]:
        """The fragments that are exchanged in the round that begins with step `first`: one, or in the last round all.
        With an overlap it is the one that was due at the end of the round before."""
        number = (first - self.warmup_steps) // self.round_steps
        if total and self.end_of(first, total) >= total:
            return tuple(range(self.fragments))
        if self.overlap_steps:
            number -= 1
        return (number % self.fragments,) if number >= 0 else ()

    def overlaps(self, first: int, total: int) -> bool:
        """Whether what is exchanged in a round is so beside its first steps: of the last one it is the end."""
        return self.overlap_steps > 0 and not (total and self.end_of(first, total) >= total)

    def ranges_of(self, space: Space, fragment: int) -> list[tuple[int, int]]:
        """The ranges of the state that a fragment is: every so many blocks of the model."""
        blocks = {slot.block for slot in space.slots}
        mine = [(block, block + 1) for block in blocks if block % self.fragments == fragment]
        return space.ranges_of(mine if self.fragments > 1 else None)


class Replicas(VirtualState):
    """What each virtual replica has for itself between two rounds: what its optimizer keeps, and its weights where it
    goes on with them. All ranks of its island have it, each of its part of the model."""

    name = "replica"

    def places(self, layout: ParallelLayout, space: Space) -> Iterator[Place]:
        for number in range(self.number):
            island = next(each for each in islands_of(layout) if number in replicas_at(layout, each[0]))
            for stage in range(layout.pipeline):
                ranges = tuple(space.ranges_of(layout.blocks_of(stage)))
                for tensor in range(layout.tensor):
                    makers = tuple(layout.rank_of(data, stage, tensor) for data in island)
                    yield Place(number, tensor, ranges, makers)


def outer_step(
    settings: LocalSettings, weights: torch.Tensor, momentum: torch.Tensor | None, gradient: torch.Tensor
) -> None:  # fmt: skip
    """One update of the outer `weights` [n] and their `momentum` in place, from the mean `gradient` over replicas: of
    the outer weights less a replica's own; or the mean of the weights themselves, where that is all there is to it."""
    if settings.averages:
        weights.copy_(gradient)
        return
    step = gradient
    if momentum is not None:
        momentum.mul_(settings.momentum).add_(gradient)
        step = gradient.add(momentum, alpha=settings.momentum) if settings.nesterov else momentum
    weights.sub_(step, alpha=settings.lr)
