"""The book a run's controller keeps: events with their times, and between them, in `steps` events, what committed steps
came to, so that the goodput ledger can be made of events alone. Pure: its owner writes down what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from monitoring.events import GenerationFormed, RolledBack, RunEvent, RunFinished, StepsCommitted
from monitoring.goodput import GoodputAccount, read_ledger
from monitoring.stretches import Stretches, lost, uncovered

Record = dict[str, Any]

_ENDS_A_STRETCH = GenerationFormed, RolledBack, RunFinished


def _wall_only(now: float) -> Record:
    return {"time": now}


class EventBook:
    """`events` and `steps` are on record already; every method returns the records to write, in order. `stamp`
    makes of a time on the run's line the fields that say when an event was recorded."""

    def __init__(
        self,
        events: Iterable[Mapping[str, Any]] = (),
        steps: Iterable[Mapping[str, Any]] = (),
        stamp: Callable[[float], Record] = _wall_only,
    ) -> None:
        self._stamp = stamp
        past, committed = list(events), list(steps)
        self.ledger = read_ledger(past)
        self._stretches = Stretches(max((record["step"] + 1 for record in committed), default=0))
        self._missing = uncovered(past, committed)

    def catch_up(self, now: float) -> list[Record]:
        """What a predecessor that was lost had not summed up."""
        missing, self._missing = self._missing, []
        return [self._enter(StepsCommitted(**stretch), now) for stretch in missing]

    def record(self, event: RunEvent, now: float) -> list[Record]:
        """Something happened. Its own record is the last."""
        before = self._flush(now) if isinstance(event, _ENDS_A_STRETCH) else []
        return [*before, self._enter(event, now)]

    def step(self, record: Mapping[str, Any], now: float) -> list[Record]:
        """A step was committed."""
        return [self._enter(StepsCommitted(**stretch), now) for stretch in self._stretches.add(record)]

    def roll_back(self, committed: int, records: Iterable[Mapping[str, Any]], now: float) -> list[Record]:
        """The steps from `committed` on, of those on record, will be run again."""
        events = self.record(RolledBack(**lost(records, committed)), now)
        self._stretches.roll_back(committed)
        return events

    def account(self, now: float | None = None) -> GoodputAccount:
        """What the wall time went into so far."""
        return self.ledger.account(now, self._stretches.peek())

    def settled(self, now: float) -> dict[str, float]:
        """The same in parts, with what is not known yet apart; see `Ledger.settled`."""
        return self.ledger.settled(now, self._stretches.peek())

    def _flush(self, now: float) -> list[Record]:
        return [self._enter(StepsCommitted(**stretch), now) for stretch in self._stretches.flush()]

    def _enter(self, event: RunEvent, now: float) -> Record:
        record = event.record(self._stamp(now))
        self.ledger.add(record)
        return record
