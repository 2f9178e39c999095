"""What a controller tells workers. An order is sent as it is, with the term of the controller that gives it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Self

from orchestrator.checkpoint.names import Save
from orchestrator.training.messages import Generation, WorkerId


class Order(ABC):
    """One order, for one worker or many."""

    @property
    @abstractmethod
    def recipients(self) -> tuple[WorkerId, ...]:
        """Those that are told."""

    def sent(self) -> Self:
        """As it goes to each of them."""
        return self


@dataclass(frozen=True)
class _ToEach(Order):
    """To `workers`, each of which is told nothing of the others: there may be thousands."""

    workers: tuple[WorkerId, ...]

    @property
    def recipients(self) -> tuple[WorkerId, ...]:
        return self.workers

    def sent(self) -> Self:
        return replace(self, workers=())


@dataclass(frozen=True)
class _ToOne(Order):
    worker: WorkerId

    @property
    def recipients(self) -> tuple[WorkerId, ...]:
        return (self.worker,)


@dataclass(frozen=True)
class StartGeneration(Order):
    """Take your place in this generation."""

    generation: Generation

    @property
    def recipients(self) -> tuple[WorkerId, ...]:
        return tuple(member.worker for member in self.generation.members)


@dataclass(frozen=True)
class Interrupt(_ToEach):
    """Break out of the generation, whatever collective you are in."""

    generation: int


@dataclass(frozen=True)
class Pause(_ToEach):
    """Agree, in the next vote, on leaving the generation at that step boundary."""

    generation: int


@dataclass(frozen=True)
class Deal(_ToEach):
    """The virtual workers of the generation are dealt anew; `assignment` is by replica."""

    generation: int
    number: int
    assignment: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class RequestSave(_ToEach):
    """Agree, in the next vote, on saving the state at that step boundary of the generation."""

    generation: int


@dataclass(frozen=True)
class SaveState(_ToEach):
    """Save the state together: all of these have all of it, and are in no generation."""

    save: Save

    def sent(self) -> Self:
        return self  # Each writes its share among them.


@dataclass(frozen=True)
class Finalize(_ToEach):
    """Tell the digest of your state."""


@dataclass(frozen=True)
class CommitCheckpoint(_ToOne):
    """Complete the checkpoint that others wrote the parts of: (rank, digest of its list of chunks)."""

    save: Save
    parts: tuple[tuple[int, str], ...]
    layout: dict[str, Any]


@dataclass(frozen=True)
class DiscardCheckpoint(_ToOne):
    """Remove what is left of an attempt."""

    save: Save


@dataclass(frozen=True)
class Leave(_ToOne):
    """End in good order: you are no longer needed."""
