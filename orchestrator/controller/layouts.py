"""Layouts for so many workers: what the job's chooser answers, asked once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from orchestrator.controller.views import ControllerConfig, WorkerView
from orchestrator.messages import Generation, WorkerId
from orchestrator.planning.choose import NoLayoutFits
from orchestrator.planning.units import PlanError
from strategies.layout import ParallelLayout


class _Answer(NamedTuple):
    """A layout, or None and how many workers would be enough for one (None: not known), or why no number is."""

    layout: ParallelLayout | None = None
    enough: int | None = None
    refusal: str | None = None


class Layouts:
    """`current` is the layout that trains, or was the last to train, and `seats` says which rank each worker had in it
    (spares have none)."""

    def __init__(self, config: ControllerConfig) -> None:
        self.config = config
        self.current: ParallelLayout | None = None
        self.seats: dict[WorkerId, int] = {}
        self._answers: dict[tuple[int, bool, int, ParallelLayout | None], _Answer] = {}

    def trains(self, generation: Generation) -> None:
        """A generation trains; its spares are no part of what others are compared with."""
        self.current = replace(generation.layout, spares=0)
        placed = generation.members[: generation.layout.num_placed]
        self.seats = {member.worker: rank for rank, member in enumerate(placed)}

    def seat(self, units: list[tuple[WorkerView, ...]], layout: ParallelLayout) -> list[tuple[WorkerView, ...]]:
        """Units in the order of their ranks. In a layout like the one before each keeps its place, where it has its
        part of the state and what it has computed of the step; the others fill the gaps, in the order given."""
        if self.current is None or replace(layout, spares=0) != self.current:
            return units
        kept: dict[int, tuple[WorkerView, ...]] = {}
        for unit in units:
            ranks = [self.seats.get(view.worker, -1) for view in unit]
            if ranks[0] >= 0 and ranks == list(range(ranks[0], ranks[0] + len(unit))):
                kept[ranks[0] // len(unit)] = unit
        seated = {unit[0].worker for unit in kept.values()}
        others = iter([unit for unit in units if unit[0].worker not in seated])
        return [kept[number] if number in kept else next(others) for number in range(len(units))]

    def choose(self, workers: int, views: Iterable[WorkerView]) -> ParallelLayout | None:
        """The layout for at most so many of these workers; None when there is none."""
        return self._ask(workers, views).layout

    def refusal(self, workers: int, views: Iterable[WorkerView]) -> str | None:
        """Why there is no layout for so many workers like these, nor for any other number that the job allows."""
        return self._ask(workers, views).refusal

    def ranks(self, workers: int, views: Iterable[WorkerView]) -> int:
        """How many of so many workers would have work."""
        layout = self.choose(workers, views)
        return 0 if layout is None else layout.num_placed

    def fewest(self, workers: int, views: Iterable[WorkerView]) -> int:
        """The fewest workers like these, but at least `workers`, that there is a layout for; `workers` when no number
        the job allows is enough."""
        like, config = list(views), self.config
        count = workers
        while count <= config.max_workers:
            answer = self._ask(count, like)
            if answer.layout is not None:
                return count
            if answer.refusal is not None:
                break
            enough = -(-(answer.enough or 0) // config.tensor) * config.tensor
            count = max(enough, count + config.tensor)
        return workers

    def _ask(self, workers: int, views: Iterable[WorkerView]) -> _Answer:
        ready = [view.ready for view in views if view.ready is not None]
        costs = next((each.costs for each in ready if each.costs is not None), None)
        memory_bytes = min((each.memory_bytes for each in ready if each.memory_bytes), default=0)
        question = (workers, costs is not None, memory_bytes, self.current)
        if question not in self._answers:
            try:
                answer = _Answer(self.config.chooser.choose(workers, costs, memory_bytes, self.current))
            except NoLayoutFits as error:
                answer = _Answer(enough=error.fits_from, refusal=None if error.fits_from else str(error))
            except PlanError as error:
                answer = _Answer(refusal=str(error))
            if len(self._answers) > 10_000:
                self._answers.clear()
            self._answers[question] = answer
        return self._answers[question]
