"""Layouts by number of workers: what the job's chooser answers, asked once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from orchestrator.control.core.workers import WorkerId
from orchestrator.control.training.views import ControllerConfig, WorkerView
from orchestrator.errors import PlanError
from orchestrator.models.costs import ModelCosts
from orchestrator.planning.balance import best_parts
from orchestrator.planning.choose import NoLayoutFits
from orchestrator.training.messages import Generation
from strategies.layout.parallel import ParallelLayout
from strategies.layout.replicas import share_out


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
        self._cuts: dict[tuple[str, int, int], tuple[tuple[int, int], ...]] = {}
        self._answers: dict[tuple[int, bool, int, int], _Answer] = {}
        self._known: dict[ParallelLayout, int] = {}
        self._current_key = -1

    def trains(self, generation: Generation) -> None:
        """A generation trains; its spares are no part of what others are compared with."""
        self.current = _plain(generation.layout)
        # A layout of thousands of ranks takes long to compare, and every question is about the current one.
        self._current_key = self._known.setdefault(self.current, len(self._known))
        placed = generation.members[: generation.layout.num_placed]
        self.seats = {member.worker: rank for rank, member in enumerate(placed)}

    def seat(self, units: list[tuple[WorkerView, ...]], layout: ParallelLayout) -> list[tuple[WorkerView, ...]]:
        """Units in the order of their ranks. In a layout like the one before each keeps its place, where it has most of
        its part of the state and what it has computed of the step, and which stages may be cut for; the others fill the
        gaps, in the order given."""
        if self.current is None or _shape(layout) != _shape(self.current):
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
        """The layout for at most this many of these workers; None when there is none."""
        views = list(views)
        layout = self._ask(workers, views).layout
        if layout is None or (parts := self._cuts.get(_key(layout))) is None:
            return layout
        cut, costs = replace(layout, parts=parts), self.costs(views)
        fits = costs is not None and self.config.chooser.fits(cut, costs, memory_of(views))
        return cut if fits else layout

    def costs(self, views: Iterable[WorkerView]) -> ModelCosts | None:
        """What the model costs block by block, if any of these workers was asked to say."""
        for view in views:
            if (ready := view.ready) is not None and ready.costs is not None:
                return ready.costs
        return None

    def recut(
        self, layout: ParallelLayout, views: Sequence[WorkerView], rates: Sequence[float]
    ) -> ParallelLayout | None:
        """The layout with its pipeline cut for ranks of these rates (see `orchestrator.planning.balance`); None when
        that is the cut there is, or would not fit in memory."""
        costs = self.costs(views)
        if layout.pipeline == 1 or costs is None:
            return None
        found = replace(layout, parts=best_parts(layout, costs, rates))
        fits = found.parts != layout.parts and self.config.chooser.fits(found, costs, memory_of(views))
        return found if fits else None

    def cut_like(self, layout: ParallelLayout) -> None:
        """From here on pipelines of as many parts are cut like this one."""
        self._cuts[_key(layout)] = layout.parts

    def refusal(self, workers: int, views: Iterable[WorkerView]) -> str | None:
        """Why there is no layout for this many workers like these, nor for any other number that the job allows."""
        return self._ask(workers, views).refusal

    def ranks(self, workers: int, views: Iterable[WorkerView]) -> int:
        """How many of a number of workers would have work."""
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
        views = list(views)
        costs, memory_bytes = self.costs(views), memory_of(views)
        question = (workers, costs is not None, memory_bytes, self._current_key)
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


def _plain(layout: ParallelLayout) -> ParallelLayout:
    """The layout without what says nothing about who has which part of the state."""
    return replace(layout, spares=0, assignment=share_out(layout.virtual_workers, layout.data, layout.virtual_replicas))


def _shape(layout: ParallelLayout) -> tuple[object, ...]:
    """What says which seats there are; where a model is cut does not."""
    degrees = (layout.data, layout.tensor, layout.pipeline, layout.shard, layout.schedule)
    return *degrees, layout.virtual_workers, len(layout.parts)


def _key(layout: ParallelLayout) -> tuple[str, int, int]:
    return layout.schedule, layout.pipeline, len(layout.parts)


def memory_of(views: Iterable[WorkerView]) -> int:
    """What each of these has at the least, in bytes; 0 when that is not known."""
    # Few sizes for many workers: they are compared once each.
    return min({view.ready.memory_bytes for view in views if view.ready is not None} - {0}, default=0)
