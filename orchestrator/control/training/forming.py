"""Forming a generation: who takes the state there is from where it is, with which place in which layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from monitoring.events import ABSENT, GenerationFormed
from orchestrator.control.training import policy
from orchestrator.control.training.layouts import Layouts
from orchestrator.control.training.state import Origin, all_of, pick_holders
from orchestrator.control.training.views import WorkerView
from orchestrator.evaluation.judge import NOT_YET, Judgement
from orchestrator.training.messages import Generation, Member
from strategies.layout.parallel import ParallelLayout
from strategies.layout.statemap import NOTHING, Spans, subtract


@dataclass(frozen=True)
class Ranks:
    """The members of the next generation in rank order, spares last, their layout, and how many workers that could have
    been given work are left without."""

    members: tuple[WorkerView, ...]
    layout: ParallelLayout
    num_idle: int = 0


def choose_ranks(
    idle: Sequence[WorkerView],
    origin: Origin,
    target: int,
    layouts: Layouts,
    now: float,
    deal: Callable[[ParallelLayout, Sequence[WorkerView]], ParallelLayout] = lambda layout, views: layout,
) -> Ranks | None:
    """Who is in the next generation, which starts from `origin`; None when there is no layout for these.

    Units with state come first, then those of lower slots, as many as the layout for up to `target` workers has ranks
    for. Who has state that none of the chosen has comes along without work, to hand it over. Ranks are ordered by zone
    and node, so that neighbours in a pipeline, and in the summation tree, share one; but where the layout stays the
    same, so do they. `deal` deals work to those chosen, by what is known of their speeds.
    """
    config = layouts.config
    able = policy.usable(idle, layouts.fewest(config.least, idle), config, now)
    able.sort(
        key=lambda unit: (
            any(view.draining for view in unit),
            any(view.evicting for view in unit),
            not any(view.worker in origin.held for view in unit),
            unit[0].worker,
        )
    )
    most = max(target, layouts.fewest(target, idle))
    candidates = [view for unit in able for view in unit][:most]
    layout = layouts.choose(len(candidates), candidates)
    if layout is None:
        return None
    units = [tuple(unit) for unit in able[: layout.num_placed // config.tensor]]
    units.sort(key=lambda unit: (*_place(unit[0]), unit[0].worker))
    chosen = [view for unit in layouts.seat(units, layout) for view in unit]
    spares = _bring_along(idle, chosen, origin)
    num_idle = sum(len(unit) for unit in able) - len(chosen)
    return Ranks((*chosen, *spares), replace(deal(layout, chosen), spares=len(spares)), num_idle)


def _bring_along(idle: Sequence[WorkerView], chosen: Sequence[WorkerView], origin: Origin) -> list[WorkerView]:
    """Few of the others with all the state that the chosen have not; if there are such, a second holder for each part
    of it, because this generation may lose the first."""
    wanted = _missing(chosen, origin)
    if not wanted:
        return []
    names = {view.worker for view in chosen}
    others = {view.worker: view for view in idle if view.worker in origin.held and view.worker not in names}
    first = pick_holders(wanted, origin.held, others)
    second = pick_holders(wanted, origin.held, others.keys() - first)
    return sorted((others[worker] for worker in (*first, *second)), key=lambda view: (*_place(view), view.worker))


def _missing(chosen: Sequence[WorkerView], origin: Origin) -> Spans:
    names = {view.worker for view in chosen}
    if origin.held.keys() <= names:
        return NOTHING  # Mostly all that hold anything are chosen.
    return subtract(origin.everything, all_of(origin.held.get(worker, NOTHING) for worker in names))


def collect_ranks(idle: Sequence[WorkerView], origin: Origin, virtual_workers: int) -> Ranks:
    """All that hold a part of the final state; the first, which is given all of it, stays if any does."""
    holders = [view for view in idle if view.worker in origin.held]
    holders.sort(key=lambda view: (view.draining, *_place(view), view.worker))
    everything = tuple(range(virtual_workers))
    return Ranks(tuple(holders), ParallelLayout(data=1, assignment=(everything,), spares=len(holders) - 1))


def make_generation(
    number: int,
    term: int,
    cause: str,
    origin: Origin,
    ranks: Ranks,
    fired_faults: Iterable[int],
    *,
    collect: bool = False,
    judged: Judgement = NOT_YET,
) -> Generation:
    """What every member is told."""
    workers = [view.worker for view in ranks.members]
    return Generation(
        number=number,
        term=term,
        committed=origin.committed,
        cause=cause,
        members=tuple(_member(view) for view in ranks.members),
        layout=ranks.layout,
        held=tuple(origin.held.get(worker, NOTHING) for worker in workers),
        roll_forward=tuple(rank for rank, worker in enumerate(workers) if worker in origin.rolling),
        norm=origin.norm,
        restore=origin.restore,
        fired_faults=tuple(sorted(fired_faults)),
        collect=collect,
        judged=judged,
    )


def formed(generation: Generation, origin: Origin, num_idle: int, steps_lost: int) -> GenerationFormed:
    """What the event log says of a generation; `steps_lost` is how far it begins before the end of the record."""
    layout = generation.layout
    described: dict[str, Any] = dict(layout.describe())
    if layout.pipeline > 1:
        described["stages"] = [[start, stop] for start, stop in layout.parts]
    return GenerationFormed(
        generation=generation.number,
        start_step=generation.committed,
        cause=generation.cause,
        workers=[
            {"worker": m.worker.slot, "incarnation": m.worker.incarnation, "node": m.node, "pid": m.pid}
            for m in generation.members
        ],
        layout=described,
        dealt=[len(held) for held in layout.assignment],
        restore=generation.restore,
        source=origin.source(steps_lost),
        steps_lost=steps_lost,
        idle=num_idle or ABSENT,
        spares=layout.spares if layout.spares and not generation.collect else ABSENT,
        collect=True if generation.collect else ABSENT,
    )


def _member(view: WorkerView) -> Member:
    ready = view.ready
    assert ready is not None
    return Member(view.worker, ready.node, ready.pid, ready.host, ready.store_port, ready.zone)


def _place(view: WorkerView) -> tuple[str, str]:
    return ("" if view.ready is None else view.ready.zone, view.node)
