"""The goodput ledger: a run's wall time, divided without gap or overlap into training and what kept it from training.

A pure fold over events.jsonl, after the badput types of Google's ml-goodput-measurement. What happens inside stretches
of committed steps is told by their `steps` events ([stretches](stretches.py)); the gaps between them are divided at the
events that fall into them. docs/monitoring.md says what counts as what.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from monitoring.clock import when
from monitoring.events import (
    ControllerBegan,
    GenerationFormed,
    GenerationRunning,
    RunFinished,
    RunStarted,
    StepsCommitted,
    StopRequested,
    Waiting,
    WorkerDied,
    WorkerKilled,
    WorkerPlaced,
    WorkerReady,
    WorkerReleased,
)
from monitoring.stretches import uncovered

REASONS = (
    "initialisation", "training_preparation", "data_loading", "checkpoint_save", "checkpoint_restore", "wasted_steps",
    "detection", "recovery", "resize", "waiting_for_resources", "straggler_wait", "rebalance", "interrupted",
    "evaluation", "finalisation", "other",
)  # fmt: skip
"""Why time was not spent training."""

VOLUNTARY = frozenset({"grow", "shrink", "drain", "rebalance", "evict"})
"""Kinds of incidents that are no failures: everybody leaves at a step boundary, so that no step is interrupted."""

_TELLING = frozenset(
    {
        RunStarted.kind,
        ControllerBegan.kind,
        WorkerPlaced.kind,
        WorkerReady.kind,
        WorkerDied.kind,
        WorkerKilled.kind,
        WorkerReleased.kind,
        Waiting.kind,
        GenerationFormed.kind,
        GenerationRunning.kind,
        StopRequested.kind,
        RunFinished.kind,
    }
)
"""Kinds of events at which a gap between steps may be divided."""

_PENDING = "pending"
"""A step may be under way; whether it comes to anything is not known yet."""


@dataclass(frozen=True)
class GoodputAccount:
    """Seconds; `productive_seconds` and `badput_seconds` (by reason) add up to `wall_seconds`."""

    wall_seconds: float
    productive_seconds: float
    badput_seconds: dict[str, float]

    @property
    def ratio(self) -> float:
        """The share of the wall time that was training."""
        return self.productive_seconds / self.wall_seconds if self.wall_seconds > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "wall_seconds": round(self.wall_seconds, 4),
            "productive_seconds": round(self.productive_seconds, 4),
            "badput_seconds": {reason: round(seconds, 4) for reason, seconds in self.badput_seconds.items()},
        }


@dataclass
class _Incident:
    event: Mapping[str, Any]
    at: float
    detected: float
    spent: dict[str, float] = field(default_factory=dict)
    recovery: Mapping[str, Any] | None = None

    @property
    def is_voluntary(self) -> bool:
        return self.event["incident"] in VOLUNTARY


@dataclass
class _Situation:
    """What the events up to some instant say of it."""

    needed: int = 1
    total_steps: int | None = None
    placed: set[tuple[int, int]] = field(default_factory=set)
    session: str | None = None
    is_down: bool = False
    has_stepped: bool = False
    is_waiting: bool = False
    is_restoring: bool = False
    has_formed: bool = False
    """A generation was formed since the gap began, or none has trained yet and one was."""
    is_stepping: bool = False
    """That generation is complete: its first step is under way."""
    is_ending: bool = False
    is_over: bool = False

    def copy(self) -> _Situation:
        return replace(self, placed=set(self.placed))

    def take(self, event: Mapping[str, Any]) -> None:
        match event["kind"]:
            case RunStarted.kind:
                self.needed = int(event.get("min_workers", self.needed))
                self.total_steps = event.get("steps", self.total_steps)
            case "down":
                self.is_down, self.is_ending = True, False
            case ControllerBegan.kind:
                if self.session not in (None, event["session"]):
                    # Another session begins: everything is set up again.
                    self.placed, self.has_stepped, self.has_formed, self.is_stepping = set(), False, False, False
                    self.is_waiting = self.is_restoring = self.is_ending = False
                self.session, self.is_down, self.is_over = event["session"], False, False
            case WorkerPlaced.kind | WorkerReady.kind:
                self.placed.add((event["worker"], event["incarnation"]))
            case WorkerDied.kind | WorkerKilled.kind | WorkerReleased.kind:
                self.placed.discard((event["worker"], event["incarnation"]))
            case Waiting.kind:
                self.is_waiting, self.needed = True, int(event["needed"])
            case GenerationFormed.kind:
                self.is_waiting, self.has_formed, self.is_stepping = False, True, False
                self.is_restoring = event.get("restore") is not None
                self.is_ending = self.is_ending or bool(event.get("collect"))
            case GenerationRunning.kind:
                self.is_restoring, self.is_stepping = False, True
            case StopRequested.kind:
                self.is_ending = True
            case RunFinished.kind:
                self.is_over = True

    @property
    def lacks_places(self) -> bool:
        return len(self.placed) < self.needed


@dataclass(frozen=True)
class _Piece:
    start: float
    stop: float
    reason: str
    incident: _Incident | None = None


class Ledger:
    """Takes the events of a run in their order, and tells at any time what its wall time went into."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._until = 0.0
        """Everything before is settled."""
        self._last = 0.0
        self._finished: float | None = None
        self._session: str | None = None
        self._totals = dict.fromkeys(("productive", *REASONS), 0.0)
        self._situation = _Situation()
        self._marks: list[Mapping[str, Any]] = []
        self._open: list[_Incident] = []
        """Incidents of the gap that is to come; a generation answers them."""
        self._all: list[_Incident] = []
        self._segments: list[tuple[float, float, str]] = []

    # ------------------------------------------------------------------------------------ taking events

    def add(self, event: Mapping[str, Any]) -> None:
        """Takes the next record of events.jsonl."""
        kind = event["kind"]
        if kind == "steps":
            if self._began is not None:
                self._settle(float(event["began"]))
                self._train(event)
            return
        at = when(event)
        if kind == "controller":
            if self._session not in (None, event["session"]):
                ended = max(self._last, self._until) if self._finished is None else self._finished
                self._marks.append({"kind": "down", "time": ended})
                self._finished = None
            self._session = event["session"]
        if kind == "run_started" and self._began is None:
            self._began = self._until = at
        self._last = max(self._last, at)
        if kind == "run_finished":
            self._finished = at
        elif kind == "rollback":
            self._waste(event)
        elif kind == "recovery":
            self._recovered(event)
        elif kind == "incident":
            began = float(event["at"])
            incident = _Incident(event, began, max(at, began + float(event["detect_seconds"])))
            self._open.append(incident)
            self._all.append(incident)
        if kind in _TELLING:
            self._marks.append(event)

    def _train(self, event: Mapping[str, Any]) -> None:
        """Takes a stretch of steps; what of it overlaps with the one before (clocks differ) counts once."""
        began, ended = max(float(event["began"]), self._until), float(event["ended"])
        whole = float(event["ended"]) - float(event["began"])
        share = max(0.0, ended - began) / whole if whole > 0 else 0.0
        for part, seconds in event["seconds"].items():
            self._totals[part if part in self._totals else "other"] += seconds * share
        if ended > began:
            # What rounding left over.
            self._totals["other"] += (ended - began) - sum(event["seconds"].values()) * share
            self._segments.append((began, ended, "steps"))
        self._until = max(self._until, ended)
        self._last = max(self._last, ended)
        self._situation.has_stepped, self._situation.has_formed, self._situation.is_stepping = True, False, False
        total = self._situation.total_steps
        self._situation.is_ending = total is not None and event["last"] + 1 >= total

    def _waste(self, event: Mapping[str, Any]) -> None:
        """Steps that are run again were for nothing."""
        wasted = 0.0
        for part, seconds in event["seconds"].items():
            name = part if part in self._totals else "other"
            moved = min(float(seconds), self._totals[name])
            self._totals[name] -= moved
            wasted += moved
        self._totals["wasted_steps"] += wasted
        self._situation.is_ending = False
        failures = [incident for incident in self._all if not incident.is_voluntary] or self._all
        if failures:
            spent = failures[-1].spent
            spent["wasted_steps"] = spent.get("wasted_steps", 0.0) + wasted

    def _recovered(self, event: Mapping[str, Any]) -> None:
        for incident in reversed(self._all):
            same = ("incident", "worker", "at")
            if incident.recovery is None and all(incident.event[key] == event[key] for key in same):
                incident.recovery = event
                return

    # ------------------------------------------------------------------------------------ gaps

    def _settle(self, until: float) -> None:
        """Divides the gap from what is settled to `until`, where training goes on."""
        # Without a gap there is nothing to divide, and yet what happened before has been.
        until = max(until, self._until)
        pieces, situation = self._divide(self._until, until, is_open=False)
        for piece in pieces:
            self._book(piece)
        self._until = until
        passed = [mark for mark in self._marks if when(mark) <= until]
        self._marks = [mark for mark in self._marks if when(mark) > until]
        self._situation = situation
        if any(mark["kind"] == GenerationFormed.kind for mark in passed):
            self._open = [incident for incident in self._open if incident.detected > until]

    def _book(self, piece: _Piece) -> None:
        seconds = piece.stop - piece.start
        self._totals[piece.reason] += seconds
        self._segments.append((piece.start, piece.stop, piece.reason))
        if piece.incident is not None:
            spent = piece.incident.spent
            spent[piece.reason] = spent.get(piece.reason, 0.0) + seconds

    def _divide(self, start: float, stop: float, *, is_open: bool) -> tuple[list[_Piece], _Situation]:
        """The pieces of a gap, and the situation at its end. In an open gap nobody knows yet how it ends."""
        situation = self._situation.copy()
        marks = sorted((mark for mark in self._marks if when(mark) <= stop), key=when)
        incidents = [incident for incident in self._open if incident.at <= stop]
        cuts = {start, stop}
        for at in [
            *(when(mark) for mark in marks),
            *(i.at for i in incidents),
            *(i.detected for i in incidents),
        ]:
            cuts.add(min(max(at, start), stop))
        ordered, taken = sorted(cuts), 0
        pieces: list[_Piece] = []
        for here, there in itertools.pairwise(ordered):
            while taken < len(marks) and when(marks[taken]) <= here:
                situation.take(marks[taken])
                taken += 1
            reason, incident = _reason(situation, incidents, here, is_open)
            if pieces and pieces[-1].reason == reason and pieces[-1].incident is incident:
                pieces[-1] = _Piece(pieces[-1].start, there, reason, incident)
            else:
                pieces.append(_Piece(here, there, reason, incident))
        for mark in marks[taken:]:
            situation.take(mark)
        return pieces, situation

    # ------------------------------------------------------------------------------------ telling

    def account(self, now: float | None = None, partial: Mapping[str, Any] | None = None) -> GoodputAccount:
        """Up to `now`; without it up to the end of the run, or to what is last known of it. `partial` is the stretch of
        steps that is under way. A step that is under way counts as training until something says otherwise."""
        totals = self.settled(now, partial)
        totals["productive"] += totals.pop(_PENDING)
        return GoodputAccount(
            sum(totals.values()), totals["productive"], {reason: max(0.0, totals[reason]) for reason in REASONS}
        )

    def settled(self, now: float | None = None, partial: Mapping[str, Any] | None = None) -> dict[str, float]:
        """Seconds by "productive" and reason, and apart as "pending" what may still turn out to be either."""
        if self._began is None:
            return dict.fromkeys((_PENDING, *self._totals), 0.0)
        view = self if partial is None else self._with(partial)
        return view._sum(view._end(now))

    def _end(self, now: float | None) -> float:
        end = self._finished if self._finished is not None else self._last if now is None else now
        return max(end, self._until)

    def _sum(self, end: float) -> dict[str, float]:
        totals = {_PENDING: 0.0, **self._totals}
        pieces, _ = self._divide(self._until, end, is_open=self._finished is None)
        for piece in pieces:
            totals[piece.reason] += piece.stop - piece.start
        return totals

    def _with(self, partial: Mapping[str, Any]) -> Ledger:
        """What this one will be when the stretch that is under way is told of."""
        other = Ledger()
        other.__dict__.update(
            {
                **self.__dict__, "_totals": dict(self._totals), "_situation": self._situation.copy(),
                "_marks": list(self._marks), "_open": [_copy(i) for i in self._open], "_all": [], "_segments": [],
            }
        )  # fmt: skip
        other.add({"kind": "steps", **partial})
        return other

    def segments(self, now: float | None = None) -> list[tuple[float, float, str]]:
        """(start, stop, reason) in the order of time, in seconds since the epoch; "steps" are stretches of steps."""
        if self._began is None:
            return []
        pieces, _ = self._divide(self._until, self._end(now), is_open=self._finished is None)
        rest = [(p.start, p.stop, "steps" if p.reason == _PENDING else p.reason) for p in pieces]
        return [segment for segment in [*self._segments, *rest] if segment[1] > segment[0]]

    def incidents(self, now: float | None = None) -> list[dict[str, Any]]:
        """Each incident with what it cost, by reason. `stall_seconds` is None while the run has not recovered."""
        spent = {id(incident): dict(incident.spent) for incident in self._all}
        if self._began is not None:
            pieces, _ = self._divide(self._until, self._end(now), is_open=self._finished is None)
            for piece in pieces:
                if piece.incident is not None:
                    costs = spent[id(piece.incident)]
                    costs[piece.reason] = costs.get(piece.reason, 0.0) + piece.stop - piece.start
        return [_told(incident, spent[id(incident)]) for incident in self._all]


def _copy(incident: _Incident) -> _Incident:
    return _Incident(incident.event, incident.at, incident.detected)


def _told(incident: _Incident, spent: Mapping[str, float]) -> dict[str, Any]:
    event, recovery = incident.event, incident.recovery
    return {
        "incident": event["incident"],
        "worker": event["worker"],
        "cause": event["cause"],
        "step": event["step"] if recovery is None else recovery["step"],
        "at": event["at"],
        "detect_seconds": event["detect_seconds"],
        "stall_seconds": None if recovery is None else recovery["stall_seconds"],
        "steps_lost": 0 if recovery is None else recovery["steps_lost"],
        "seconds": {reason: round(spent[reason], 4) for reason in REASONS if spent.get(reason)},
        "total_seconds": round(sum(spent.values()), 4),
    }


def _reason(now: _Situation, incidents: Sequence[_Incident], at: float, is_open: bool) -> tuple[str, _Incident | None]:
    """Why no step was committed in the piece of a gap that begins `at`, and which incident is to blame."""
    if now.is_down:
        return "interrupted", None
    if now.is_over or now.is_ending:
        return "finalisation", None
    if is_open and now.is_stepping and not any(at < incident.at for incident in incidents if not incident.is_voluntary):
        return _PENDING, None
    if not now.has_stepped:
        if now.is_restoring:
            return "checkpoint_restore", None
        if now.has_formed:
            return "training_preparation", None
        return ("waiting_for_resources" if now.lacks_places else "initialisation"), None
    failures = [incident for incident in incidents if not incident.is_voluntary]
    for incident in failures:
        if incident.at <= at < incident.detected:
            return "detection", incident
    found = [incident for incident in failures if incident.detected <= at]
    agreed = [incident for incident in incidents if incident.is_voluntary and incident.detected <= at]
    is_computing = not now.is_waiting and (now.is_stepping or not (now.has_formed or agreed))
    coming = min((incident for incident in incidents if incident.at > at), key=lambda each: each.at, default=None)
    if coming is not None and not coming.is_voluntary and not found and is_computing:
        return "wasted_steps", coming
    answering = found[-1] if found else agreed[-1] if agreed else None
    if now.is_restoring:
        return "checkpoint_restore", answering
    if now.is_waiting and now.lacks_places:
        return "waiting_for_resources", answering
    if found:
        return "recovery", found[-1]
    if is_open and not now.has_formed and not now.is_waiting:
        return _PENDING, None
    if agreed:
        return ("rebalance" if agreed[-1].event["incident"] == "rebalance" else "resize"), agreed[-1]
    return (_PENDING if is_open and not now.is_waiting else "other"), None


def read_ledger(events: Iterable[Mapping[str, Any]], steps: Iterable[Mapping[str, Any]] = ()) -> Ledger:
    """The ledger of a run from its events; `steps` (metrics.jsonl) tell of those that no event sums up yet."""
    told = list(events)
    ledger = Ledger()
    rest = [{"kind": StepsCommitted.kind, "time": each["ended"], **each} for each in uncovered(told, steps)]
    # The end of a run was recorded after its last steps, no matter who sums these up.
    ends = [n for n, event in enumerate(told) if event["kind"] == RunFinished.kind]
    tail = ends[-1] if ends and ends[-1] == len(told) - 1 else len(told)
    for event in [*told[:tail], *rest, *told[tail:]]:
        ledger.add(event)
    return ledger
