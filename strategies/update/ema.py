"""An exponential mean of the weights (Polyak and Juditsky 1992; as in Tarvainen and Valpola 2017), kept beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from strategies.update.rule import UpdateRule

if TYPE_CHECKING:
    from strategies.gradient.work import GradientWork
    from strategies.layout.virtual import VirtualState
    from strategies.update.round import Round
    from strategies.update.setting import Setting

EMA = "update.ema"
"""The kind of state that it is."""


class WithEma(UpdateRule):
    """Any rule, with a mean of the weights that it leads to. After the first update the mean is those weights."""

    name = "ema"

    def __init__(self, inner: UpdateRule, decay: float) -> None:
        self._inner, self._decay = inner, decay
        self.progress, self.result = inner.progress, inner.result  # type: ignore[misc]
        self.virtual_replicas, self.computes_apart = inner.virtual_replicas, inner.computes_apart
        self.wire = inner.wire

    def kinds(self) -> tuple[str, ...]:
        """See `UpdateRule`."""
        return (*self._inner.kinds(), EMA)

    def virtual_states(self) -> Sequence[VirtualState]:
        """See `UpdateRule`."""
        return self._inner.virtual_states()

    def end_of(self, first: int, total: int) -> int:
        """See `UpdateRule`."""
        return self._inner.end_of(first, total)

    def is_apart(self, first: int) -> bool:
        """See `UpdateRule`."""
        return self._inner.is_apart(first)

    def updates_of(self, first: int, total: int) -> int:
        """See `UpdateRule`."""
        return self._inner.updates_of(first, total)

    def work(self, setting: Setting) -> GradientWork:
        """See `UpdateRule`."""
        return self._inner.work(setting)

    def prepare(self, step: Round) -> None:
        """See `UpdateRule`."""
        self._inner.prepare(step)

    def commit(self, step: Round, norm: float) -> None:
        """See `UpdateRule`."""
        is_first = step.state.updates == 0
        self._inner.commit(step, norm)
        for shard in step.state.arrangement.state_shards:
            mean = shard.kept[EMA]
            weights = shard.weights.to(mean.device)
            if is_first:
                mean.copy_(weights)
            else:
                mean.mul_(self._decay).add_(weights, alpha=1 - self._decay)
