"""What a restarted controller makes of the accounts its workers give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator.control.core.detection import Failure
from orchestrator.control.core.protocol import Placed
from orchestrator.control.core.roster import Roster
from orchestrator.control.core.workers import WorkerId, WorkerState
from orchestrator.control.training.membership import Membership, initial_of
from orchestrator.control.training.views import WorkerView
from orchestrator.training.messages import Generation, Left, Status
from strategies.layout.statemap import whole


def view_of(status: Status, tensor: int, now: float) -> WorkerView:
    """A worker by its own account."""
    worker, generation = status.ready.worker, status.generation
    view = WorkerView(
        worker,
        requested_at=now,
        state=WorkerState.IDLE,
        node=status.ready.node,
        ready=status.ready,
        committed=status.committed,
        prepared=status.prepared,
        has_trained=generation is not None and (status.joined or status.committed > 0),
        held=status.held,
        whole=whole(status.ready.elements, tensor),
        initial=status.ready.initial,
        last_heard=now,
        lateness_s=status.ready.lateness_s,
    )
    if generation is not None and status.joined and generation.committed == 0:
        view.initial = initial_of(generation)
    return view


def starting(placed: Placed, now: float) -> WorkerView:
    """A worker that an earlier controller had asked for, and that is not warm yet."""
    return WorkerView(placed.worker, requested_at=now, state=WorkerState.STARTING, node=placed.node, placed_at=now)


def newest_generation(statuses: Iterable[Status]) -> Generation | None:
    """The newest generation that any of them heard of."""
    generations = [status.generation for status in statuses if status.generation is not None]
    return max(generations, key=lambda generation: generation.number, default=None)


@dataclass(frozen=True)
class Retaken:
    """The members of the newest generation, by their own accounts.

    `lefts` is what those say that have left it since, `missing` are those that nobody found, `unaware` those that never
    heard of it. `intact` says that it may go on.
    """

    membership: Membership
    lefts: tuple[Left, ...]
    missing: tuple[WorkerView, ...]
    unaware: tuple[WorkerView, ...]
    intact: bool


def retake(current: Generation, statuses: Mapping[WorkerId, Status], roster: Roster[WorkerView], now: float) -> Retaken:
    """Takes the members of the newest generation for what they say they are; the missing get a place on the roster."""
    members, lefts, missing, unaware = [], [], [], []
    for member in current.members:
        found = statuses.get(member.worker)
        if found is None and roster.was_given_up(member.worker):
            # The predecessor dealt with it.
            continue
        if found is None:
            lost = WorkerView(member.worker, requested_at=now, node=member.node, last_heard=now)
            roster.add(lost)
            missing.append(lost)
        view = roster.workers[member.worker]
        members.append(view)
        if found is not None and (found.generation is None or found.generation.number < current.number):
            view.left = Left(
                member.worker, current.number, "peer", found.committed, found.held, prepared=found.prepared
            )
            unaware.append(view)
            continue
        view.state, view.joined = WorkerState.MEMBER, found is not None and found.joined
        if found is not None and found.left is not None:
            lefts.append(found.left)
    whole = len(members) == len(current.members) and not missing and not unaware
    intact = whole and all(left.cause in ("pause", "complete") for left in lefts)
    return Retaken(Membership(current, members, now), tuple(lefts), tuple(missing), tuple(unaware), intact)


def not_found(worker: WorkerId) -> str:
    return f"worker {worker.slot} was not found by the restarted controller"


def lost_with_the_controller(view: WorkerView) -> Failure[WorkerView]:
    """A member that nobody found. In case it lives and is out of reach it is ended."""
    return Failure("kill", not_found(view.worker), view, kill="it was not found by the restarted controller")
