"""An update rule in one file: each step applies the gradient of the step before it, so that a step could begin before
the last one has been reduced. Step n reads the weights of n - 1 updates, by the job file: as reproducible as any."""

from __future__ import annotations

from strategies.state.shard import StateShard
from strategies.update.rule import SynchronousRule

PENDING = "update.pending"


class Delayed(SynchronousRule):
    name = "delayed"

    def kinds(self) -> tuple[str, ...]:
        return (PENDING,)

    def update(self, shard: StateShard, lr: float) -> None:
        pending = shard.kept[PENDING]
        newest = shard.gradient.clone()
        shard.gradient.copy_(pending)
        pending.copy_(newest)
        shard.apply(lr)


DELAYED = Delayed()
