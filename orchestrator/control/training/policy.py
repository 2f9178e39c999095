"""Who should train: when to form a generation, with whom, and when to change it. Pure functions of what is known.

Workers are counted one by one and used in whole units; see `ControllerConfig.unit_of`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from orchestrator.control.core.workers import WorkerId, WorkerState
from orchestrator.control.training.layouts import Layouts
from orchestrator.control.training.views import ControllerConfig, WorkerView

NEAR_S = 5.0
"""A worker whose place goes away in less is given no more work."""

Unit = tuple[WorkerView, ...]
"""The workers of one tensor-parallel group, in order of their slots."""


def whole_units(views: Iterable[WorkerView], config: ControllerConfig) -> list[Unit]:
    """The units of which every worker is among these."""
    if config.tensor == 1:
        return [(view,) for view in views]
    slots: dict[int, dict[int, WorkerView]] = {}
    for view in sorted(views, key=lambda view: view.worker):
        slots.setdefault(config.unit_of(view.worker), {})[view.worker.slot] = view
    return [tuple(unit[slot] for slot in sorted(unit)) for unit in slots.values() if len(unit) == config.tensor]


def staying_units(views: Iterable[WorkerView], config: ControllerConfig) -> list[Unit]:
    views = list(views)
    units = whole_units(views, config)
    # Mostly nobody leaves, and with thousands of workers a look at every unit takes long.
    if not any(view.leaving for view in views):
        return units
    return [unit for unit in units if not any(view.leaving for view in unit)]


def usable(idle: Sequence[WorkerView], least: int, config: ControllerConfig, now: float) -> list[Unit]:
    """The units that can be given work: those that stay, and while they have fewer than the `least` workers also those
    that must leave later (the latest first). Those that are too slow stay for as long as nobody is there instead."""
    staying, leaving = whole_units(idle, config), []
    if any(view.draining for view in idle):
        leaving = [unit for unit in staying if any(view.draining for view in unit)]
        staying = [unit for unit in staying if not any(view.draining for view in unit)]
    if any(view.evicting for view in idle):
        staying.sort(key=lambda unit: any(view.evicting for view in unit))
    until = {unit[0].worker: min(v.draining_until for v in unit if v.draining_until is not None) for unit in leaving}
    leaving = [unit for unit in leaving if until[unit[0].worker] - now >= NEAR_S]
    leaving.sort(key=lambda unit: (-until[unit[0].worker], unit[0].worker))
    missing = -(-least // config.tensor) - len(staying)
    return staying + leaving[: max(0, missing)]


def time_to_form(
    alive: Sequence[WorkerView], target: int, least: int, waited_s: float, config: ControllerConfig, now: float
) -> bool:
    """Whether enough workers are warm and none that is worth waiting for is on its way."""
    idle = [view for view in alive if view.state is WorkerState.IDLE]
    able = len(usable(idle, least, config, now)) * config.tensor
    if able < least:
        return False
    if any(view.has_trained for view in idle) or able >= target:
        return True
    # Nothing waits for these workers yet; those already placed are worth the seconds they need to warm up.
    soon = {WorkerState.STARTING}
    if waited_s < config.placement_grace_s:
        soon.add(WorkerState.REQUESTED)
    return not any(view.state in soon for view in alive)


def wanted_change(
    members: Sequence[WorkerView],
    spares: Collection[WorkerId],
    idle: Sequence[WorkerView],
    target: int,
    layouts: Layouts,
    now: float,
) -> tuple[str, str] | None:
    """Whether a running generation should give way to another: (kind, cause), or None. `spares` are those of its
    members that have no part in the work.

    Draining members leave at once when enough others remain, or as far as others stand by; what is needed to keep
    going works on until a replacement is there or its deadline is near. Who would have no work is no reason to change.
    """
    config = layouts.config
    draining = [view for view in members if view.draining]
    fresh = [view for unit in staying_units(idle, config) for view in unit]
    working = [view for view in members if view.worker not in spares]
    staying = [view for unit in staying_units(working, config) for view in unit]
    if draining and _may_leave(draining, staying, fresh, working, target, layouts, now):
        return "drain", f"worker {_slots(draining)} must leave"
    if spares:
        return "handover", f"worker {_slots([view for view in members if view.worker in spares])} has handed over"
    if draining:
        return None
    slow = [view for view in working if view.evicting]
    if len(staying) + len(slow) > target:
        return "shrink", f"{len(staying) + len(slow)} workers, {target} wanted"
    joining = layouts.ranks(min(target, len(staying) + len(fresh)), [*staying, *fresh]) - len(staying)
    if fresh and joining > 0 and slow:
        why = "whose device is faulty" if any(view.faulty for view in slow) else "which is too slow"
        return "evict", f"worker {_slots(fresh[:joining])} takes the place of worker {_slots(slow)}, {why}"
    if fresh and joining > 0:
        return "grow", f"worker {_slots(fresh[:joining])} joins"
    return None


def _may_leave(
    draining: Sequence[WorkerView],
    staying: Sequence[WorkerView],
    fresh: Sequence[WorkerView],
    working: Sequence[WorkerView],
    target: int,
    layouts: Layouts,
    now: float,
) -> bool:
    """Whether draining members can be done without, or some of them at least, or have to be."""
    like = [*staying, *fresh]
    enough = layouts.fewest(layouts.config.least, like)
    if len(staying) >= enough or any((view.draining_until or now) - now < NEAR_S for view in draining):
        return True
    needed = layouts.ranks(min(max(enough, len(like)), max(enough, target)), like) - len(like)
    return bool(fresh) and needed < len(working) - len(staying)


def _slots(views: Iterable[WorkerView]) -> str:
    return ", ".join(str(view.worker.slot) for view in views)
