"""What everything else asks of an update rule: when and how reduced gradients become the next weights. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from strategies.wire.format import FP32, WireFormat

if TYPE_CHECKING:
    from strategies.gradient.work import GradientWork
    from strategies.layout.virtual import VirtualState
    from strategies.state.shard import StateShard
    from strategies.update.round import Round
    from strategies.update.setting import Setting


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

    virtual_replicas: int = 0
    """Groups of virtual workers that train by themselves, and that layouts must keep together
    (`strategies.layout.replicas`)."""
    wire: WireFormat = FP32
    """How what it exchanges beside gradients is sent."""
    computes_apart: bool = False
    """Whether what is computed with is never the memory of the weights that are trained."""

    def virtual_states(self) -> Sequence[VirtualState]:
        """What virtual things have for themselves: kept like `kinds`, but not by all who train a part of the model."""
        return ()

    def end_of(self, first: int, total: int) -> int:
        """The step after the last of the round that begins with step `first`, of `total` steps in all. A round is
        committed as a whole."""
        return first + 1

    def is_apart(self, first: int) -> bool:
        """Whether virtual replicas train by themselves in the round that begins with step `first`."""
        return False

    def updates_of(self, first: int, total: int) -> int:
        """How many updates of an optimizer the round that begins with step `first` counts as."""
        return 1

    def work(self, setting: Setting) -> GradientWork:
        """What this rank does in a round."""
        return setting.plain()

    @abstractmethod
    def prepare(self, step: Round) -> None:
        """Computes this rank's share of a round and reduces: the gradient of everything that is trained here is then in
        place (`StateShard.gradient`), also where it is mirrored. Collective; nothing that counts is changed.

        Raises PeerLost, and ModelChanged when the model has changed what it keeps.
        """

    @abstractmethod
    def commit(self, step: Round, norm: float) -> None:
        """Makes the prepared round count, after all have voted for it. `norm` is the global norm of the gradient; where
        it is not finite, the round is skipped and this is not called. Local: it cannot fail for want of a peer, and
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
