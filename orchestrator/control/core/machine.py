"""What decides: a state machine for one run or service, built on the processes of this room."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Protocol

from orchestrator.control.core.workers import ProcessView, WorkerId

WantsRoom = Literal["no", "yes", "firmly"]
"""Whether work cannot go on because there has been no room for workers for long; "firmly", if those that have a place
hold something that would be lost if they gave their places back."""


class Machine(Protocol):
    """Events in, actions out; pure: no Ray, no clock, no I/O. Training's is
    `orchestrator.control.training.controller.Controller`."""

    def handle(self, event: Any, now: float) -> Sequence[Any]:
        """Takes one event that happened at `now`, in seconds by a clock that never goes back; the actions to carry out,
        in order. Events and actions are those of `orchestrator.control.core.protocol`, and the machine's own."""

    def snapshot(self) -> dict[str, Any]:
        """How things are, for those who look from outside: of JSON's types."""

    @property
    def is_over(self) -> bool:
        """Whether it has given `Finish`, and takes no more events."""

    @property
    def workers(self) -> Mapping[WorkerId, ProcessView]:
        """All that were ever asked for."""

    @property
    def fired_faults(self) -> Collection[int]:
        """The numbers of injected faults that are on record."""

    @property
    def wants_room(self) -> WantsRoom:
        """As of the last tick."""

    @property
    def gives_way_to(self) -> str:
        """Another run that is to have room before this one; "": none."""
