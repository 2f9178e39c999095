"""Who should train: when to form a generation, with whom, and when to change it. Pure functions of what is known."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.controller.views import ControllerConfig, WorkerState, WorkerView

NEAR_S = 5.0
"""A worker whose place goes away in less is given no more work."""


def usable(idle: Sequence[WorkerView], min_workers: int, now: float) -> list[WorkerView]:
    """The workers that can be given work: those that stay, and while they are too few also those that must leave later
    (the latest first)."""
    staying = [view for view in idle if not view.draining]
    leaving = [view for view in idle if view.draining_until is not None and view.draining_until - now >= NEAR_S]
    leaving.sort(key=lambda view: (-(view.draining_until or 0.0), view.worker))
    return staying + leaving[: max(0, min_workers - len(staying))]


def time_to_form(
    alive: Sequence[WorkerView], target: int, waited_s: float, config: ControllerConfig, now: float
) -> bool:
    """Whether enough workers are warm and none that is worth waiting for is on its way."""
    idle = [view for view in alive if view.state is WorkerState.IDLE]
    able = usable(idle, config.min_workers, now)
    if len(able) < config.min_workers:
        return False
    if any(view.has_trained for view in idle) or len(able) >= target:
        return True
    # Nothing waits for these workers yet; those already placed are worth the seconds they need to warm up.
    soon = {WorkerState.STARTING}
    if waited_s < config.placement_grace_s:
        soon.add(WorkerState.REQUESTED)
    return not any(view.state in soon for view in alive)


def wanted_change(
    members: Sequence[WorkerView], idle: Sequence[WorkerView], target: int, min_workers: int, now: float
) -> tuple[str, str] | None:
    """Whether a running generation should give way to another: (kind, cause), or None.

    Draining members leave at once when enough others remain, or as far as others stand by; what is needed to keep
    going works on until a replacement is there or its deadline is near.
    """
    draining = [view for view in members if view.draining]
    spare = [view for view in idle if not view.draining]
    staying = len(members) - len(draining)
    if draining:
        near = any((view.draining_until or now) - now < NEAR_S for view in draining)
        if staying >= min_workers or spare or near:
            slots = ", ".join(str(view.worker.slot) for view in draining)
            return "drain", f"worker {slots} must leave"
        return None
    if staying > target:
        return "shrink", f"{staying} workers, {target} wanted"
    if staying < target and spare:
        joining = spare[: target - staying]
        slots = ", ".join(str(view.worker.slot) for view in joining)
        return "grow", f"worker {slots} joins"
    return None
