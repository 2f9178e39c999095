"""What a controller tells workers. An order is sent as it is, with the term of the controller that gives it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

from orchestrator.control.core.workers import WorkerId


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
class ToEach(Order):
    """To `workers`, each of which is told nothing of the others: there may be thousands."""

    workers: tuple[WorkerId, ...]

    @property
    def recipients(self) -> tuple[WorkerId, ...]:
        return self.workers

    def sent(self) -> Self:
        return replace(self, workers=())


@dataclass(frozen=True)
class ToOne(Order):
    """To one worker."""

    worker: WorkerId

    @property
    def recipients(self) -> tuple[WorkerId, ...]:
        return (self.worker,)


@dataclass(frozen=True)
class Leave(ToOne):
    """End in good order: you are no longer needed."""
