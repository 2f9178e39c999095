"""What everything else asks of an update rule: when and how reduced gradients become the next weights. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from strategies.state.shard import StateShard
    from strategies.update.round import Round


class UpdateRule(ABC):
    """One rule, by the `name` that a job file has for it (`strategy.update`).

    `progress` says how far a run is: with "lockstep" all ranks are at one step, which is committed by all or by none;
    with a "vector" each replica counts its own. `result` says of what the result is a function: of the "job" file, or
    of what is on record of the run, from which it is "replayable".
    """

    name: ClassVar[str]
    progress: ClassVar[Literal["lockstep", "vector"]] = "lockstep"
    result: ClassVar[Literal["job", "replayable"]] = "job"

    def kinds(self) -> tuple[str, ...]:
        """The names, beginning with "update.", of the fp32 tensors that it keeps for each parameter, of its shape,
        beside the weights and what the optimizer keeps. At step 0 they are zero. They are moved, mirrored, saved and
        digested with the state, and found in `StateShard.kept`."""
        return ()

    @abstractmethod
    def prepare(self, step: Round) -> None:
        """Computes this rank's share of a step and reduces: the gradient of everything that is trained here is then in
        place (`StateShard.gradient`), also where it is mirrored. Collective; nothing that counts is changed.

        Raises PeerLost, and ModelChanged when the model has changed what it keeps.
        """

    @abstractmethod
    def commit(self, step: Round, norm: float) -> None:
        """Makes the prepared step count, after all have voted for it. `norm` is the global norm of the gradient; where
        it is not finite, the step is skipped and this is not called. Local: it cannot fail for want of a peer, and
        gives the same bits wherever an element is trained or mirrored."""


class SynchronousRule(UpdateRule):
    """Every step reads the weights of the step before it and ends with an update of all of them."""

    def prepare(self, step: Round) -> None:
        step.compute()
        step.mirror()

    def commit(self, step: Round, norm: float) -> None:
        clip_norm = step.spec.clip_norm
        for shard in step.state.arrangement.state_shards:
            if clip_norm is not None and norm > clip_norm:
                shard.gradient.mul_(clip_norm / norm)
            self.update(shard, step.lr)

    def update(self, shard: StateShard, lr: float) -> None:
        """The update of one shard, from its reduced and clipped gradient; elementwise."""
        shard.apply(lr)


class Synchronous(SynchronousRule):
    """The gradient of a step is applied at its end, by the optimizer of the job."""

    name = "synchronous"


SYNCHRONOUS = Synchronous()
RULES: dict[str, UpdateRule] = {rule.name: rule for rule in (SYNCHRONOUS,)}
"""Those that come with this package."""
