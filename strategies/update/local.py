"""Local steps: virtual replicas train by themselves, and now and then an outer optimizer takes what they have come to.

Local SGD (Stich 2019), DiLoCo (Douillard et al. 2023, arXiv:2311.08105) and Streaming DiLoCo (Douillard et al. 2025,
arXiv:2501.18512). Every replica has weights and moments of its own, and is a function of the job: of its own share of
the data and of the *outer weights* that it began with. Those are the weights of the run: what is evaluated and saved. A
round is some inner steps and what is exchanged with them; it is committed as a whole.

With `fragments` the blocks of the model, strided, are exchanged in turn, and a round has fewer inner steps. With
`overlap_steps` what a round has come to is exchanged beside the first inner steps of the next one, and mixed into the
weights of replicas when these are done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.layout.parallel import ParallelLayout
from strategies.layout.replicas import islands_of, replicas_at
from strategies.layout.space import Space
from strategies.layout.virtual import Place, VirtualState
from strategies.update.rule import SynchronousRule
from strategies.wire.format import FP32, WireFormat

if TYPE_CHECKING:
    import torch

    from strategies.gradient.work import GradientWork
    from strategies.update.round import Round
    from strategies.update.setting import Setting

MOMENTUM = "update.momentum"
"""The kind of state that the outer optimizer keeps."""
OWN_WEIGHTS = "weights"
"""The kind of a replica's state that its own weights are, where it goes on with them."""


@dataclass(frozen=True)
class LocalSettings:
    """See the module; `mix` is how much of its own weights a replica keeps in an exchange. The first `warmup_steps`
    steps are synchronous. `lr`, `momentum` and `nesterov` are the outer optimizer's."""

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


class LocalRule(SynchronousRule):
    """See the module. `moments` are the kinds of state that the inner optimizer keeps, each of the shape of a
    parameter."""

    name = "local"
    computes_apart = True

    def __init__(self, settings: LocalSettings, moments: Sequence[str]) -> None:
        self.settings = settings
        self.virtual_replicas = settings.replicas
        self.wire = settings.wire
        kinds = (*moments, *((OWN_WEIGHTS,) if settings.keeps_weights else ()))
        self.replicas = Replicas(settings.replicas, kinds)

    def kinds(self) -> tuple[str, ...]:
        """See `UpdateRule`."""
        return (MOMENTUM,) if self.settings.momentum else ()

    def virtual_states(self) -> Sequence[VirtualState]:
        """See `UpdateRule`."""
        return (self.replicas,) if self.replicas.kinds else ()

    def end_of(self, first: int, total: int) -> int:
        """See `UpdateRule`."""
        return self.settings.end_of(first, total)

    def work(self, setting: Setting) -> GradientWork:
        """See `UpdateRule`."""
        from strategies.update.local_work import LocalStepsWork

        return LocalStepsWork.where_placed(self, setting)

    def commit(self, step: Round, norm: float) -> None:
        """See `UpdateRule`."""
        if step.number < self.settings.warmup_steps:
            super().commit(step, norm)
            return
        total = step.spec.total_steps
        for fragment in self.settings.exchanged(step.number, total):
            ranges = self.settings.ranges_of(step.state.space, fragment)
            for shard in step.state.arrangement.state_shards:
                momentum = shard.kept.get(MOMENTUM)
                for start, stop in ranges:
                    for _, offset, length in shard.flat.locate(start, stop):
                        here = slice(offset, offset + length)
                        kept = None if momentum is None else momentum[here]
                        gradient = shard.gradient[here].to(shard.weights.device)
                        outer_step(self.settings, shard.weights[here], kept, gradient)

    def is_apart(self, first: int) -> bool:
        """See `UpdateRule`."""
        return first >= self.settings.warmup_steps

    def updates_of(self, first: int, total: int) -> int:
        """See `UpdateRule`."""
        return self.settings.end_of(first, total) - first


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
