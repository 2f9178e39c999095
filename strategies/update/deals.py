"""Deals of the virtual workers to replicas: offered at any time, taken up when all know of them. No torch."""

from __future__ import annotations

from typing import NamedTuple

Assignment = tuple[tuple[int, ...], ...]
"""The virtual workers of each replica."""


class NumberedAssignment(NamedTuple):
    """Numbers are unique for a deal, and grow; 0 is that of the generation itself."""

    number: int
    assignment: Assignment


NONE = NumberedAssignment(0, ())


class Deals:
    """What one rank knows of the deals of its generation. `number` is that of the deal in force."""

    def __init__(self) -> None:
        self.number = 0
        self._offered = self._voted = self._agreed = NONE

    def offer(self, number: int, assignment: Assignment) -> None:
        """A newer deal. From any thread."""
        if number > self._offered.number:
            self._offered = NumberedAssignment(number, assignment)

    def vote(self) -> int:
        """The number of the newest that this rank knows, which it tells; another may come while the vote is on."""
        self._voted = self._offered
        return self._voted.number

    def agreed(self, number: int) -> None:
        """All ranks know deal `number` to be the newest; 0: they do not."""
        if number == self._voted.number > self.number:
            self._agreed = self._voted

    def take_up(self) -> Assignment | None:
        """The deal that all agreed on, in force from now on; None when there is no new one."""
        if self._agreed.number <= self.number:
            return None
        self.number = self._agreed.number
        return self._agreed.assignment

    def newest(self, current: Assignment) -> Assignment:
        """Of the deal in force, which is `current`, or of a newer one that has been offered."""
        return self._offered.assignment if self._offered.number > self.number else current
