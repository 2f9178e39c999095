"""What training's controller tells workers, beyond what any may (`orchestrator.control.core.orders`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from orchestrator.checkpoint.names import Save
from orchestrator.control.core.orders import Order, ToEach, ToOne
from orchestrator.control.core.workers import WorkerId
from orchestrator.training.messages import Generation


@dataclass(frozen=True)
class StartGeneration(Order):
    """Take your place in this generation."""

    generation: Generation

    @property
    def recipients(self) -> tuple[WorkerId, ...]:
        return tuple(member.worker for member in self.generation.members)


@dataclass(frozen=True)
class Interrupt(ToEach):
    """Break out of the generation, whatever collective you are in."""

    generation: int


@dataclass(frozen=True)
class Pause(ToEach):
    """Agree, in the next vote, on leaving the generation at that step boundary."""

    generation: int


@dataclass(frozen=True)
class Deal(ToEach):
    """The virtual workers of the generation are dealt anew; `assignment` is by replica."""

    generation: int
    number: int
    assignment: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class RequestSave(ToEach):
    """Agree, in the next vote, on saving the state at that step boundary of the generation."""

    generation: int


@dataclass(frozen=True)
class SaveState(ToEach):
    """Save the state together: all of these have all of it, and are in no generation."""

    save: Save

    def sent(self) -> Self:
        return self  # Each writes its share among them.


@dataclass(frozen=True)
class Finalize(ToEach):
    """Tell the digest of your state."""


@dataclass(frozen=True)
class CommitCheckpoint(ToOne):
    """Complete the checkpoint that others wrote the parts of: (rank, digest of its list of chunks)."""

    save: Save
    parts: tuple[tuple[int, str], ...]
    layout: dict[str, Any]


@dataclass(frozen=True)
class DiscardCheckpoint(ToOne):
    """Remove what is left of an attempt."""

    save: Save
