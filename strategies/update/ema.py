"""An exponential mean of the weights (Polyak and Juditsky 1992; as in Tarvainen and Valpola 2017), kept beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.update.rule import UpdateRule

if TYPE_CHECKING:
    from strategies.update.round import Round

EMA = "update.ema"
"""The kind of state that it is."""


class WithEma(UpdateRule):
    """Any rule, with a mean of the weights that it leads to. After the first update the mean is those weights."""

    name = "ema"

    def __init__(self, inner: UpdateRule, decay: float) -> None:
        self._inner, self._decay = inner, decay
        self.progress, self.result = inner.progress, inner.result  # type: ignore[misc]

    def kinds(self) -> tuple[str, ...]:
        """See `UpdateRule`."""
        return (*self._inner.kinds(), EMA)

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
