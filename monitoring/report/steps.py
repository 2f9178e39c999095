"""A long series of steps in few points: what a chart can show, with every extreme kept.

Steps are gathered in buckets of a power of two of them; of each, the steps with the least and the greatest loss and
throughput stay. Buckets double when there are too many points, from the extremes alone, so that nothing else is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

MAX_POINTS = 1500


class Point(NamedTuple):
    """A step in a chart: its number, seconds since the run began, loss (None: not finite), tokens/s, generation."""

    step: int
    at: float
    loss: float | None
    tokens_per_second: float
    generation: int


def extremes(points: Sequence[Point]) -> list[Point]:
    """The points of least and greatest loss and throughput, in step order; a loss that is not finite is the greatest
    of all."""

    def loss(point: Point) -> float:
        return math.inf if point.loss is None else point.loss

    if len(points) <= 2:
        return list(points)
    chosen = {min(points, key=loss), max(points, key=loss)}
    chosen |= {min(points, key=lambda p: p.tokens_per_second), max(points, key=lambda p: p.tokens_per_second)}
    return sorted(chosen, key=lambda p: p.step)


class StepSeries:
    """At most `max_points` points of a run, growing at the end, cut by roll-backs."""

    def __init__(self, max_points: int = MAX_POINTS) -> None:
        self.width = 1
        """Steps in a bucket."""
        self._max = max_points
        self._buckets: list[tuple[int, list[Point]]] = []
        self._count = 0
        self._changed: int | None = None

    def add(self, point: Point) -> None:
        """Takes the next step; steps come in order."""
        index = point.step // self.width
        if self._buckets and self._buckets[-1][0] == index:
            was = self._buckets[-1][1]
            kept = extremes([*was, point])
            self._buckets[-1] = (index, kept)
            self._count += len(kept) - len(was)
        else:
            self._buckets.append((index, [point]))
            self._count += 1
        self._touch(index * self.width)
        while self._count > self._max:
            self._widen()

    def cut(self, step: int) -> int:
        """Forgets the steps from `step` on, and with them those before it in the same bucket.

        Returns from which step on they have to be added again, which is at most `step`.
        """
        first = step // self.width * self.width
        while self._buckets and self._buckets[-1][0] * self.width >= first:
            self._count -= len(self._buckets.pop()[1])
        self._touch(first)
        return first

    def points(self, first: int = 0) -> list[Point]:
        """Those of step `first` and later."""
        found: list[list[Point]] = []
        for index, points in reversed(self._buckets):
            if (index + 1) * self.width <= first:
                break
            found.append([point for point in points if point.step >= first])
        return [point for points in reversed(found) for point in points]

    def take_changed(self) -> int | None:
        """From which step on points differ from when this was last asked; None: none do."""
        changed, self._changed = self._changed, None
        return changed

    def _touch(self, step: int) -> None:
        self._changed = step if self._changed is None else min(step, self._changed)

    def _widen(self) -> None:
        self.width *= 2
        merged: list[tuple[int, list[Point]]] = []
        for index, points in self._buckets:
            if merged and merged[-1][0] == index // 2:
                merged[-1][1].extend(points)
            else:
                merged.append((index // 2, list(points)))
        self._buckets = [(index, extremes(points)) for index, points in merged]
        self._count = sum(len(points) for _, points in self._buckets)
        self._touch(0)
