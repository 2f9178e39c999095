"""The workers of a run: who is asked for, on its way, warm, draining, let go, ended.

What the roster does about them comes back as actions, for the caller to put among its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, Generic, TypeVar

from monitoring.events import (
    ABSENT,
    DrainNoticed,
    GpuFaulty,
    NodeSuspected,
    RequestsHeld,
    WorkerDied,
    WorkerKilled,
    WorkerPlaced,
    WorkerReady,
    WorkerReleased,
    WorkerRequested,
)
from orchestrator.control.core.config import PoolConfig
from orchestrator.control.core.demand import Demand
from orchestrator.control.core.protocol import (
    Died,
    DrainNotice,
    KillWorker,
    Placed,
    ProcessAction,
    ReleaseWorker,
    RequestWorker,
)
from orchestrator.control.core.workers import PastWorkers, ProcessView, WorkerId, WorkerState

V = TypeVar("V", bound=ProcessView)

MAX_PAUSE_S = 30.0
"""The longest time between two tries when workers die while they start."""
CROWDED_AFTER_S = 15.0
CROWDED_S = 60.0
"""A worker that was to avoid nodes and is not placed by then is asked for anywhere; so are others for a while."""
_TOO_MANY = "more workers than the job wants"


def _why_it_leaves(view: ProcessView) -> str:
    if view.draining:
        return "its node drains"
    return f"another took its place, as {'its device is faulty' if view.faulty else 'it was too slow'}"


@dataclass
class _Preference:
    """For other nodes than those whose devices are `suspects`, and some more; it waits where there was no room on
    others."""

    suspects: set[str] = field(default_factory=set)
    waits_until: float = 0.0

    def against(self, nodes: Collection[str], now: float) -> tuple[str, ...]:
        """The nodes to avoid now, if others have room."""
        return tuple(sorted({*nodes, *self.suspects})) if now >= self.waits_until else ()


class Roster(Generic[V]):
    """`new` makes the view of a worker that is asked for, of its name and the time. `workers` are all that were ever
    asked for, also those that are gone. How many are on their way, and who is to leave, is kept beside them, for
    questions that come with every message.

    More than 15 attributes, in more than 300 lines: those that come and those that go are counted in the same numbers.
    """

    def __init__(self, config: PoolConfig, past: PastWorkers, new: Callable[[WorkerId, float], V]) -> None:
        self.workers: dict[WorkerId, V] = {}
        self._alive: dict[WorkerId, V] = {}
        self._new = new
        self._coming = {WorkerState.REQUESTED: 0, WorkerState.STARTING: 0}
        self._leaving: set[WorkerId] = set()
        self.num_removed = 0
        """How many have gone since this controller began."""
        self._incarnations = dict(past.incarnations)
        self._draining = dict(past.draining)
        self._given_up = set(past.gone)
        self._evicting = dict.fromkeys(past.faulty, "") | past.evicting
        self._faulty = set(past.faulty)
        self._preference = _Preference(set(past.suspects))
        self._config = config
        self._start_failures = 0
        self._next_request_at = 0.0
        self._demand = Demand(config.scaling)
        self._are_held = False

    def living(self, worker: WorkerId) -> V | None:
        """A worker that counts; None when it is gone, or was never one of this run's."""
        return self._alive.get(worker)

    def alive(self) -> list[V]:
        return list(self._alive.values())

    @property
    def num_starting(self) -> int:
        """Those that are placed and warm up."""
        return self._coming[WorkerState.STARTING]

    @property
    def num_warm(self) -> int:
        """Those in a generation, and idle."""
        return len(self._alive) - sum(self._coming.values())

    @property
    def any_leaving(self) -> bool:
        """Whether anybody is to be replaced."""
        return bool(self._leaving)

    def idle(self) -> list[V]:
        return [view for view in self._alive.values() if view.state is WorkerState.IDLE]

    # ------------------------------------------------------------------------------------ they come

    def fill(
        self,
        wanted: int,
        members: Collection[WorkerId],
        now: float,
        *,
        needed: Callable[[], Collection[WorkerId]],
        may_leave: Callable[[V], bool],
        worth: Callable[[Sequence[V]], tuple[Any, ...]],
    ) -> list[ProcessAction]:
        """Asks for the workers that are missing and releases the units that are too many. Members are left alone, and
        so are those that are `needed`; of the others the units go first that are worth least: that are incomplete, the
        least far, of the least `worth`, the newest. Of the draining workers that are idle those go that `may_leave`."""
        actions = self._ask_again(now)
        units = self._units()
        leaving = {self._config.unit_of(view.worker) for view in self._alive.values() if view.leaving}
        staying = {unit: views for unit, views in units.items() if unit not in leaving}
        surplus = len(staying) - -(-wanted // self._config.unit)
        if surplus > 0:
            actions += self._release_units(staying, surplus, members, needed(), worth)
        if now >= self._next_request_at and (slots := self._missing_slots(units, staying, -surplus)):
            actions += self._request(slots, now, self._num_replacing(wanted, units, staying, len(slots)))
        if len(staying) < len(units):
            for view in self.idle():
                is_leaving = self._config.unit_of(view.worker) not in staying
                if is_leaving and view.worker not in members and view.alive and may_leave(view):
                    actions += self.release(view, _why_it_leaves(view))
        return actions

    def _ask_again(self, now: float) -> list[ProcessAction]:
        """Takes back requests that nothing would come of: those that no longer are for one that is too slow, which were
        not to be placed just anywhere; and those that were to avoid nodes, if other nodes have no room after all."""
        waiting = self._requested()
        slow = sum([view.evicting and not view.faulty for view in self._alive.values()])
        replacing = sorted((view for view in waiting if view.must_avoid), key=lambda view: view.worker)
        hopeless = [v for v in waiting if v.avoids and not v.must_avoid and now - v.requested_at > CROWDED_AFTER_S]
        if hopeless:
            self._preference.waits_until = now + CROWDED_S
        actions: list[ProcessAction] = []
        for view in (*replacing[slow:], *hopeless):
            actions += self.release(view, "it is asked for again, wherever there is room")
        late, told = self._demand.turn_to_next([view for view in waiting if view.alive], now)
        for view in late:
            actions += self.release(view, "its market has not met the request in time")
        return actions + told

    @property
    def is_short(self) -> bool:
        """Whether workers have found no room for long."""
        return self._demand.is_short

    def withdraw(self, reason: str) -> list[ProcessAction]:
        """Takes back the requests that nothing has come of yet."""
        return [action for view in self._requested() for action in self.release(view, reason)]

    def nodes_starting(self, now: float) -> None:
        """Nodes are on their way, which may be for workers that wait for room."""
        self._demand.coming(now)

    def tell_shortage(self, now: float) -> list[ProcessAction]:
        """What is to be said of workers that find no room."""
        return self._demand.tell(self._requested(), now)

    def _requested(self) -> list[V]:
        return [view for view in self._alive.values() if view.state is WorkerState.REQUESTED]

    def _num_replacing(self, wanted: int, units: dict[int, list[V]], staying: dict[int, list[V]], missing: int) -> int:
        """How many of the missing workers are to take the place of one that is too slow and works on meanwhile."""
        slow = sum(any(view.evicting and not view.faulty for view in views) for views in units.values())
        waiting = sum(any(v.must_avoid and v.state is WorkerState.REQUESTED for v in vs) for vs in staying.values())
        others = (len(staying) - waiting + slow) * self._config.unit
        return max(0, missing - max(0, wanted - others))

    def _units(self) -> dict[int, list[V]]:
        units: dict[int, list[V]] = {}
        unit_size = self._config.unit
        for view in self._alive.values():
            units.setdefault(view.worker.slot // unit_size, []).append(view)
        return units

    def _release_units(
        self,
        staying: dict[int, list[V]],
        surplus: int,
        members: Collection[WorkerId],
        needed: Collection[WorkerId],
        worth: Callable[[Sequence[V]], tuple[Any, ...]],
    ) -> list[ProcessAction]:
        order = list(WorkerState)

        def value(unit: int) -> tuple[Any, ...]:
            views = staying[unit]
            return (
                len(views) == self._config.unit,
                min(order.index(view.state) for view in views),
                *worth(views),
                -unit,
            )

        spare = [
            unit
            for unit, views in staying.items()
            if not any(view.worker in members or view.worker in needed for view in views)
        ]
        spare.sort(key=value)
        gone = spare[:surplus]
        actions = [action for unit in gone for view in staying[unit] for action in self.release(view, _TOO_MANY)]
        for unit in gone:
            del staying[unit]
        return actions

    def _missing_slots(self, units: dict[int, list[V]], staying: dict[int, list[V]], num_units: int) -> list[int]:
        """Of units that have lost a worker, and of `num_units` new ones."""
        unit_size = self._config.unit
        new = list(islice((unit for unit in count() if unit not in units), max(0, num_units)))
        wanted = sorted([*(unit for unit, views in staying.items() if len(views) < unit_size), *new])
        if not wanted:
            return []
        taken = {worker.slot for worker in self._alive}
        return [
            slot for unit in wanted for slot in range(unit * unit_size, (unit + 1) * unit_size) if slot not in taken
        ]

    def _request(self, slots: Sequence[int], now: float, num_replacing: int) -> list[ProcessAction]:
        """Asks for workers. The last `num_replacing` are for those that are too slow: where these are, or were, they
        would be of no use."""
        actions: list[ProcessAction] = []
        avoided = tuple(sorted(set(self._evicting.values()) - {""}))
        shunned = self._preference.against(avoided, now)
        market = self._demand.market(now)
        for number, slot in enumerate(slots):
            must = bool(avoided) and number >= len(slots) - num_replacing
            avoid = avoided if must else shunned
            worker = WorkerId(slot, self._incarnations.get(slot, -1) + 1)
            self._incarnations[slot] = worker.incarnation
            view = self._new(worker, now)
            view.avoids, view.must_avoid, view.market = bool(avoid), must, market
            self.add(view)
            requested = WorkerRequested(*worker, market=market or ABSENT)
            actions += [requested, RequestWorker(worker, avoid, must, market)]
        return actions

    def add(self, view: V) -> None:
        self.workers[view.worker] = self._alive[view.worker] = view
        view.draining_until = self._draining.get(view.worker)
        view.evicting, view.faulty = view.worker in self._evicting, view.worker in self._faulty
        self._note_leaving(view)
        if view.state in self._coming:
            self._coming[view.state] += 1

    def _note_leaving(self, view: V) -> None:
        if view.leaving and view.alive:
            self._leaving.add(view.worker)
        else:
            self._leaving.discard(view.worker)

    def suspect(self, node: str, reason: str) -> list[NodeSuspected]:
        """A device of this node has failed, or is not like others: other nodes are preferred from here on."""
        if not node or node in self._preference.suspects:
            return []
        self._preference.suspects.add(node)
        return [NodeSuspected(node=node, reason=reason)]

    def adopt(self, view: V) -> list[ProcessAction]:
        """Takes over a worker of an earlier controller, unless that one had given it up."""
        slot, incarnation = view.worker
        self._incarnations[slot] = max(self._incarnations.get(slot, -1), incarnation)
        if self.was_given_up(view.worker):
            return [KillWorker(view.worker, "an earlier controller had given it up")]
        self.add(view)
        return []

    def was_given_up(self, worker: WorkerId) -> bool:
        """Whether it was gone by the record of earlier controllers."""
        return worker in self._given_up

    def placed(self, event: Placed, now: float) -> list[ProcessAction]:
        """The cluster found room for a worker; it may say so twice."""
        view = self.workers.get(event.worker)
        if view is None or view.state is not WorkerState.REQUESTED:
            return []
        view.state, view.node, view.placed_at = WorkerState.STARTING, event.node, now
        self._coming[WorkerState.REQUESTED] -= 1
        self._coming[WorkerState.STARTING] += 1
        self._demand.placed()
        return [WorkerPlaced(*event.worker, node=event.node)]

    def ready(
        self, view: V, node: str, pid: int, now: float, *, lateness_s: float, facts: dict[str, Any]
    ) -> list[ProcessAction]:
        """A worker that was on its way is warm, on this node; `facts` go on record with that."""
        self._coming[view.state] -= 1
        view.state, view.node, view.last_heard, view.lateness_s = WorkerState.IDLE, node, now, lateness_s
        self._start_failures = 0
        start_s = round(now - view.requested_at, 3)
        return [WorkerReady(*view.worker, node=node, pid=pid, start_seconds=start_s, **facts)]

    def start_failed(self, detail: str, now: float) -> str | None:
        """A worker did not live to be ready: the next is asked for after a pause. What to give up with, when too many
        did not."""
        self._start_failures += 1
        self._next_request_at = now + min(MAX_PAUSE_S, 0.25 * 2 ** min(self._start_failures, 10))
        if self._start_failures < self._config.max_start_failures:
            return None
        return f"{self._start_failures} workers in a row died while starting: {detail}"

    # ------------------------------------------------------------------------------------ and go

    def notice(self, event: DrainNotice) -> list[V]:
        """The place of these workers goes away; those for whom that is news."""
        noticed = []
        for worker in event.workers:
            view = self.living(worker)
            if view is None:
                continue
            if not view.draining:
                noticed.append(view)
            view.draining_until = event.deadline
            self._note_leaving(view)
        return noticed

    def evict(self, worker: WorkerId) -> None:
        """It is too slow: another is to take its place, elsewhere."""
        view = self.living(worker)
        if view is not None:
            view.evicting = True
            self._evicting[worker] = view.node
            self._note_leaving(view)

    def retire(self, view: V, detail: str) -> list[GpuFaulty]:
        """Its device ought not to be used any more: another is to take its place, if there is a device for one. Nodes
        with such devices are to be avoided if others have room; its own it has itself."""
        view.evicting = view.faulty = True
        self._faulty.add(view.worker)
        self._evicting.setdefault(view.worker, "")
        self._note_leaving(view)
        return [GpuFaulty(*view.worker, node=view.node, action="retire", detail=detail)]

    def retire_unit(self, lost: V) -> list[GpuFaulty]:
        """A worker is lost with its device. Others of its unit keep a place for who comes after it, with that device in
        it: they are to leave it."""
        unit = self._config.unit_of(lost.worker)
        mates = [
            view for view in self._alive.values() if self._config.unit_of(view.worker) == unit and view is not lost
        ]
        return [
            told for mate in mates for told in self.retire(mate, f"worker {lost.worker.slot} has lost its device there")
        ]

    def keep_on(self, worker: WorkerId) -> None:
        """It is no longer too slow."""
        view = self.living(worker)
        if view is not None and not view.faulty:
            self._evicting.pop(worker, None)
            view.evicting = False
            self._note_leaving(view)

    def release(self, view: V, reason: str) -> list[ProcessAction]:
        """Lets go of a worker that is not needed."""
        self.remove(view)
        return [ReleaseWorker(view.worker, reason), WorkerReleased(*view.worker, reason=reason)]

    def kill(self, view: V, reason: str) -> list[ProcessAction]:
        """Ends a worker that cannot be trusted any more; what it may still say is not listened to."""
        self.remove(view)
        return [KillWorker(view.worker, reason), WorkerKilled(*view.worker, reason=reason)]

    def remove(self, view: V) -> None:
        """Forgets a worker that has left or was ended; it counts as removed once."""
        if self._alive.pop(view.worker, None) is not None:
            self.num_removed += 1
            if view.state in self._coming:
                self._coming[view.state] -= 1
        view.state = WorkerState.GONE
        self._leaving.discard(view.worker)

    # ------------------------------------------------------------------------------------ time

    def hold_requests(self, gap_s: float) -> list[RequestsHeld]:
        """For this long the cluster did not answer requests, which is no shortage of room. Told when it begins."""
        waiting = self._requested()
        for view in waiting:
            view.requested_at += gap_s
        self._demand.skip_gap(gap_s)
        was_held, self._are_held = self._are_held, bool(waiting)
        return [RequestsHeld(workers=sorted(view.worker.slot for view in waiting))] if waiting and not was_held else []

    def hold_no_more(self) -> None:
        """It answers."""
        self._are_held = False

    def skip_gap(self, gap_s: float, now: float) -> None:
        """Nobody could be heard for this long."""
        for view in self._alive.values():
            view.last_heard = max(view.last_heard, now)
            if view.placed_at is not None:
                view.placed_at += gap_s
            elif view.state is WorkerState.REQUESTED:
                view.requested_at += gap_s
        self._demand.skip_gap(gap_s)


def death_of(view: ProcessView, event: Died) -> WorkerDied:
    return WorkerDied(*view.worker, node=view.node, node_lost=event.node_lost, detail=event.detail)


def notice_of(view: ProcessView, event: DrainNotice) -> DrainNoticed:
    return DrainNoticed(*view.worker, node=view.node, reason=event.reason, deadline=event.deadline)
