"""Decisions the state machine takes, as pure functions of what it knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.controller.views import WorkerState, WorkerView
from orchestrator.messages import WorkerId
from strategies.layout import deal

PHASES = ("form", "data", "compute", "reduce", "gather", "vote", "commit")
_COLLECTIVE = frozenset({"form", "reduce", "gather", "vote"})


def phase_index(phase: str) -> int:
    """How far into a step a phase is; -1 for what is not a phase of a step."""
    return PHASES.index(phase) if phase in PHASES else -1


def is_collective(phase: str) -> bool:
    """Whether a rank in this phase may be waiting for others, through no fault of its own."""
    return phase in _COLLECTIVE


def progress_limit_s(configured_s: float, step_seconds: Sequence[float]) -> float:
    """How long nothing may move before somebody is taken to be stuck, in seconds.

    Twenty median steps once the run knows its pace, at least 5 s and at most what the job file says.
    """
    if len(step_seconds) < 5:
        return configured_s
    recent = sorted(step_seconds[-100:])
    return min(configured_s, max(5.0, 20 * recent[len(recent) // 2]))


def furthest_behind(members: Sequence[tuple[WorkerId, tuple[int, int], str]]) -> list[WorkerId]:
    """The members that hold the others up: behind at least one other, and in a phase of their own making.

    Empty when all are equally far or those behind are themselves inside a collective (a partition, not a culprit).
    """
    if not members:
        return []
    positions = [position for _, position, _ in members]
    if min(positions) == max(positions) and len(members) > 1:
        return [w for w, _, phase in members if not is_collective(phase)] if len(members) == 1 else []
    return [worker for worker, position, phase in members if position == min(positions) and not is_collective(phase)]


@dataclass(frozen=True)
class Membership:
    """The members of the next generation in rank order, with the virtual workers each gets."""

    members: tuple[WorkerView, ...]
    assignment: tuple[tuple[int, ...], ...]


def choose_members(idle: Sequence[WorkerView], target: int, virtual_workers: int) -> Membership:
    """Who is in the next generation.

    Those that hold the newest state come first, then lower slots, up to `target`; draining workers only when nobody
    else holds the newest state, and then without work, to hand it over. Ranks are ordered by node, so that neighbours
    in the summation tree share one.
    """
    newest = max((v.committed for v in idle if v.has_trained), default=0)

    def holds(view: WorkerView) -> bool:
        return newest == 0 or (view.has_trained and view.committed == newest)

    staying = sorted((v for v in idle if not v.draining), key=lambda v: (not holds(v), v.worker))
    chosen = staying[: max(1, min(target, virtual_workers))]
    donors: list[WorkerView] = []
    if not any(holds(view) for view in chosen):
        donors = sorted((v for v in idle if v.draining and holds(v)), key=lambda v: v.worker)[:2]
    members = sorted((*chosen, *donors), key=lambda v: (v.node, v.worker))
    speeds = [0.0 if view.draining else 1.0 for view in members]
    return Membership(tuple(members), deal(virtual_workers, speeds))


def wanted_change(
    members: Sequence[WorkerView], idle: Sequence[WorkerView], target: int, min_workers: int, now: float
) -> tuple[str, str] | None:
    """Whether a running generation should give way to another: (kind, cause), or None.

    Draining members leave at once when enough others remain or stand by; otherwise they work on until a replacement is
    there or their deadline is near.
    """
    draining = [view for view in members if view.draining]
    spare = [view for view in idle if not view.draining and view.state is WorkerState.IDLE]
    staying = len(members) - len(draining)
    if draining:
        near = min(view.draining_until or now for view in draining) - now < 5.0
        if staying + len(spare) >= min_workers or near:
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
