"""What a restarted controller makes of the accounts its workers give."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from monitoring.events import WorkerKilled, WorkerReady
from orchestrator.control.core.detection import Failure
from orchestrator.control.core.protocol import KillWorker, Placed
from orchestrator.control.core.roster import Roster
from orchestrator.control.core.workers import WorkerId, WorkerState
from orchestrator.control.training.attendance import facts_of
from orchestrator.control.training.lifecycle import Lifecycle
from orchestrator.control.training.members import Members
from orchestrator.control.training.membership import Membership, initial_of
from orchestrator.control.training.protocol import TakeOver
from orchestrator.control.training.run import Run
from orchestrator.control.training.views import RunState, WorkerView
from orchestrator.training.messages import Generation, Left, Status
from orchestrator.training.orders import Interrupt


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
        whole=status.ready.whole_state(tensor),
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


class TakingOver:
    """Goes on with a run that an earlier controller began; `warm` are the workers that were ready by its record."""

    def __init__(self, run: Run, life: Lifecycle, members: Members, warm: Collection[WorkerId]) -> None:
        self._run = run
        self._life = life
        self._members = members
        self._warm = warm

    def take(self, event: TakeOver, last_members: Collection[WorkerId], now: float) -> None:
        """The workers' own accounts say which generation is the current one; `last_members` are those on record."""
        run, record = self._run, self._run.record
        run.waiting_since = now
        for status in event.workers:
            self._adopt(status, now)
        for placed in event.starting:
            self._run.out += self._run.roster.adopt(starting(placed, now))
        statuses = {s.ready.worker: s for s in event.workers if s.ready.worker in self._run.roster.workers}
        for status in statuses.values():
            self._life.take_reports(status.reports, now)
            self._life.take_evaluations(status.evaluations)
        intact = False
        if (current := newest_generation(statuses.values())) is not None:
            record.fired_faults |= set(current.fired_faults)
            if current.number >= record.last_generation:
                record.last_generation = current.number
                intact = self._retake(current, statuses, now)
            else:
                # It is over: there is a newer one on record, which nobody heard of.
                run.membership = Membership(current)
        members = run.membership.members
        for worker in sorted({*last_members} - statuses.keys() - members.keys()):
            # A member of a generation of which nobody is left, or which nobody heard of.
            self._run.out += record.incident("kill", not_found(worker), now, WorkerView(worker, requested_at=now))
        if not intact and statuses and record.last_generation >= 0:
            # Also those that seem to be out of it: an order of the predecessor may have reached them since they spoke.
            self._run.out.append(Interrupt(tuple(sorted(statuses)), record.last_generation))
            if not members and not record.incidents.unanswered():
                what = f"the controller was lost before anybody heard of generation {record.last_generation}"
                self._run.out += record.incident("controller", what, now)
        self._life.recall_saves([status.part for status in statuses.values() if status.part is not None], now)
        if run.stop is not None and self._run.state is RunState.RUNNING:
            self._life.pause()
        if self._run.state is RunState.WAITING:
            self._life.staffing.fill(now)
            self._life.try_form(now)
        else:
            self._life.conclude(now)
            self._life.staffing.fill(now)

    def _adopt(self, status: Status, now: float) -> None:
        """A worker that has become warm since the last controller's record ended is looked at here as it would have
        been there."""
        run, ready = self._run, status.ready
        is_known = ready.worker in self._warm or run.roster.was_given_up(ready.worker)
        refusal = None if is_known else run.alike.refusal(ready)
        if refusal is not None:
            run.out += [KillWorker(ready.worker, refusal), WorkerKilled(*ready.worker, reason=refusal)]
            run.out += run.roster.suspect(ready.node, refusal)
            return
        if not is_known:
            run.out.append(WorkerReady(*ready.worker, node=ready.node, pid=ready.pid, **facts_of(ready)))
        run.out += run.roster.adopt(view_of(status, run.config.tensor, now))

    def _retake(self, current: Generation, statuses: Mapping[WorkerId, Status], now: float) -> bool:
        """Goes on with the newest generation, or with what is left of it; whether it is intact."""
        found = retake(current, statuses, self._run.roster, now)
        first = statuses.get(current.members[0].worker)
        assignment = () if first is None or first.generation != current else first.assignment
        self._life.resume(found.membership, now, intact=found.intact, assignment=assignment)
        for left in found.lefts:
            self._members.take_leave(self._run.roster.workers[left.worker], left, now)
        for view in found.missing:
            self._life.handle_failure(lost_with_the_controller(view), now)
        if found.unaware and not self._run.record.incidents.unanswered():
            slots = ", ".join(str(view.worker.slot) for view in found.unaware)
            what = f"the controller was lost before worker {slots} heard of its generation"
            self._run.out += self._run.record.incident("controller", what, now)
        return found.intact
