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

from collections.abc import Sequence
from typing import TYPE_CHECKING

from strategies.layout.virtual import VirtualState
from strategies.update.outer import MOMENTUM, OWN_WEIGHTS, LocalSettings, Replicas, outer_step
from strategies.update.rule import SynchronousRule

if TYPE_CHECKING:
    from strategies.gradient.work import GradientWork
    from strategies.update.round import Round
    from strategies.update.setting import Setting


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

        return LocalStepsWork.where_placed(self.settings, self.replicas, setting)

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
