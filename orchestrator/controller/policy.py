"""Decisions the state machine takes, as pure functions of what it knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.controller.views import WorkerView
from orchestrator.messages import WorkerId
from strategies.layout import deal

NEAR_S = 5.0
"""A worker whose place goes away in less is given no more work."""

PHASES = ("restore", "form", "data", "compute", "reduce", "gather", "vote", "commit")
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
    """The members that hold the others up: behind at least one other (or alone), in a phase of their own making.

    Empty when all are equally far or those behind are themselves inside a collective (a partition, not a culprit).
    """
    if not members:
        return []
    positions = [position for _, position, _ in members]
    if len(members) > 1 and min(positions) == max(positions):
        return []
    return [worker for worker, position, phase in members if position == min(positions) and not is_collective(phase)]


@dataclass(frozen=True)
class StateAtHand:
    """The newest state that living workers have: of how many steps, who holds it, and who can roll forward to it
    (holds the state of one step less, and the reduced gradient of the missing step)."""

    committed: int
    holders: frozenset[WorkerId]
    rolling: frozenset[WorkerId]

    @property
    def sources(self) -> frozenset[WorkerId]:
        return self.holders | self.rolling


def state_at_hand(idle: Sequence[WorkerView], recorded: int) -> StateAtHand | None:
    """The newest state among these workers; None when no state among them is whole.

    When the last holder of a step on record is gone, those that prepared it can still roll forward: after the vote the
    gradient they hold is the one that was applied. (What is not on record is simply run again.)
    """
    whole = [view for view in idle if not view.torn]
    if not whole:
        return None
    newest = max(view.committed for view in whole)
    top = [view for view in whole if view.committed == newest]
    if newest + 1 == recorded and any(view.prepared for view in top):
        return StateAtHand(recorded, frozenset(), frozenset(v.worker for v in top if v.prepared))
    if newest == 0:
        # Models built apart must agree to count as copies; one that has trained sets the standard.
        first = min(top, key=lambda view: (not view.has_trained, view.worker))
        return StateAtHand(0, frozenset(v.worker for v in top if v.initial == first.initial), frozenset())
    return StateAtHand(
        newest,
        frozenset(view.worker for view in top),
        frozenset(view.worker for view in whole if view.prepared and view.committed == newest - 1),
    )


@dataclass(frozen=True)
class Membership:
    """The members of the next generation in rank order, with the virtual workers each gets."""

    members: tuple[WorkerView, ...]
    assignment: tuple[tuple[int, ...], ...]


def usable(idle: Sequence[WorkerView], min_workers: int, now: float) -> list[WorkerView]:
    """The workers that can be given work: those that stay, and while they are too few also those that must leave later
    (the latest first)."""
    staying = [view for view in idle if not view.draining]
    leaving = [view for view in idle if view.draining_until is not None and view.draining_until - now >= NEAR_S]
    leaving.sort(key=lambda view: (-(view.draining_until or 0.0), view.worker))
    return staying + leaving[: max(0, min_workers - len(staying))]


def choose_members(
    idle: Sequence[WorkerView],
    sources: frozenset[WorkerId],
    target: int,
    virtual_workers: int,
    min_workers: int,
    now: float,
) -> Membership:
    """Who is in the next generation; `sources` have the state it starts from (empty: it comes from storage).

    Those with the state come first, then lower slots, up to `target`. When none of the chosen has it, up to two
    draining workers that do come along without work, to hand it over. Ranks are ordered by node, so that neighbours in
    the summation tree share one.
    """
    able = usable(idle, min_workers, now)
    able.sort(key=lambda view: (view.draining, view.worker not in sources, view.worker))
    chosen = able[: max(1, min(target, virtual_workers))]
    donors: list[WorkerView] = []
    if sources and not any(view.worker in sources for view in chosen):
        # Able or not, only draining workers can be left: a staying source would have been chosen.
        donors = sorted((v for v in idle if v.draining and v.worker in sources), key=lambda v: v.worker)[:2]
    members = sorted((*chosen, *donors), key=lambda v: (v.node, v.worker))
    idlers = {view.worker for view in donors}
    speeds = [0.0 if view.worker in idlers else 1.0 for view in members]
    return Membership(tuple(members), deal(virtual_workers, speeds))


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
