"""What an update rule works with: one step on one rank, in one layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from strategies.comm.fabric import Fabric
from strategies.comm.groups import Message
from strategies.gradient.spec import StepSpec
from strategies.gradient.work import GradientWork
from strategies.state.training_state import TrainingState


@dataclass(frozen=True)
class Round:
    """`enter(phase, step)` is called at the start of a phase, `check` after the model has computed."""

    number: int
    state: TrainingState
    spec: StepSpec
    fabric: Fabric
    work: GradientWork
    enter: Callable[[str, int], None]
    check: Callable[[], None]
    is_nan: Callable[[int], bool] = lambda step: False
    """Whether the gradient of a step is to be not finite (fault injection); asked once."""

    @property
    def lr(self) -> float:
        """The learning rate of this step."""
        return self.spec.base_lr * self.spec.schedule.factor(self.number)

    def compute(self) -> None:
        """Computes this rank's share of the round and reduces, along the fixed tree. Raises PeerLost, ModelChanged."""
        if self.is_nan(self.number):
            self.work.inject_nan()
        self.work.run(self.number, self.enter, self.fabric.look)
        self.check()

    def mirror(self) -> None:
        """Sends reduced gradients to those that mirror them. Raises PeerLost."""
        arrangement = self.state.arrangement
        if not any(s.mirrors for s in arrangement.shards) and not any(p.mirrors for p in arrangement.virtual_parts):
            return
        self.enter("gather", self.number)
        rank, world = self.fabric.rank, self.fabric.world
        own, mirrors = arrangement.own, arrangement.mirrors
        messages: list[Message] = []
        for shard in arrangement.shards:
            if shard.owner == rank and own is not None:
                messages += [("send", own.gradient, mirror) for mirror in shard.mirrors]
            elif rank in shard.mirrors:
                messages.append(("recv", mirrors[shard.owner].gradient, shard.owner))
        for part in arrangement.virtual_parts:
            sender = part.makers[0]
            if rank == sender:
                made = arrangement.virtual[part]
                messages += [("send", made.to_send(kind), mirror) for kind in made.kinds() for mirror in part.mirrors]
            elif rank in part.mirrors:
                copy = arrangement.virtual[part]
                messages += [("recv", copy.prepared(kind), sender) for kind in copy.kinds()]
        with self.fabric.traffic.of("copies"):
            for work in world.start_together(messages):
                world.finish(work, "state copies")
