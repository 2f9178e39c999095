"""Committed steps, summed up: what a stretch of them spent its time on.

A step's seconds are divided by what its ranks told of it. Reading is the average rank's; what the average rank waits
for the slowest, which has most to compute and read, is straggler wait; the rest is training. Pure: records in and out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from monitoring.clock import when
from monitoring.events import RolledBack, RunStarted, StepsCommitted

PARTS = ("productive", "data_loading", "straggler_wait", "checkpoint_save", "evaluation", "other")
STRETCH_S = 10.0
"""How long a stretch may get, so that what a lost controller had not written down is little."""

_BUSY, _DATA = 0, 1
"""Places in a rank's account of a step (`ranks` of a record): seconds by virtual worker, seconds of reading."""


def divide(record: Mapping[str, Any]) -> dict[str, float]:
    """What one step's `seconds` were spent on: productive, data_loading and straggler_wait, which add up to them.

    An account may reach back to before the step was interrupted; no rank's counts for more than the step took.
    """
    seconds = float(record["seconds"])
    ranks: Sequence[Any] = record.get("ranks") or ()
    if not ranks:
        return {"productive": seconds, "data_loading": 0.0, "straggler_wait": 0.0}
    reading = [min(float(rank[_DATA]), seconds) for rank in ranks]
    work = [min(sum(rank[_BUSY]) + float(rank[_DATA]), seconds) for rank in ranks]
    loading = sum(reading) / len(reading)
    waiting = max(work) - sum(work) / len(work)
    return {
        "productive": max(0.0, seconds - loading - waiting), "data_loading": loading, "straggler_wait": waiting,
    }  # fmt: skip


class Stretches:
    """Makes the fields of `steps` events of the records of committed steps, in order.

    A stretch ends where the steps of its generation end, or when it is `STRETCH_S` long; one that goes on where another
    ended begins at its last commit, so that nothing between two steps is lost. `after` steps are summed up already.
    """

    def __init__(self, after: int = 0, max_seconds: float = STRETCH_S) -> None:
        self._next = after
        self._max_seconds = max_seconds
        self._generation: int | None = None
        self._ended = 0.0
        self._open: dict[str, Any] | None = None

    @classmethod
    def following(cls, event: Mapping[str, Any]) -> Stretches:
        """Goes on where the stretch of a `steps` event ended."""
        stretches = cls(event["last"] + 1)
        stretches._generation, stretches._ended = event["generation"], float(event["ended"])
        return stretches

    def add(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Takes the next step's record; the stretches that are complete."""
        if record["step"] < self._next:
            return []
        done: list[dict[str, Any]] = []
        if self._open is not None and record["generation"] != self._open["generation"]:
            done += self.flush()
        committed_at = float(record["committed_at"])
        if self._open is None:
            goes_on = record["generation"] == self._generation and record["step"] == self._next
            began = self._ended if goes_on else committed_at - float(record["seconds"])
            self._open = {
                "first": record["step"], "last": record["step"], "generation": record["generation"], "began": began,
                "ended": began, "seconds": dict.fromkeys(PARTS, 0.0), "tokens": 0,
            }  # fmt: skip
        stretch = self._open
        for part, seconds in divide(record).items():
            stretch["seconds"][part] += seconds
        stretch["seconds"]["checkpoint_save"] += float(record["phase_seconds"].get("save", 0.0))
        stretch["seconds"]["evaluation"] += float(record["phase_seconds"].get("evaluate", 0.0))
        stretch["last"], stretch["tokens"] = record["step"], stretch["tokens"] + int(record["tokens"])
        stretch["ended"] = max(committed_at, stretch["began"])
        self._next, self._generation, self._ended = record["step"] + 1, record["generation"], stretch["ended"]
        if stretch["ended"] - stretch["began"] >= self._max_seconds:
            done += self.flush()
        return done

    def flush(self) -> list[dict[str, Any]]:
        """The stretch that is open, if any; it ends here."""
        found, self._open = self.peek(), None
        return [] if found is None else [found]

    def peek(self) -> dict[str, Any] | None:
        """The open stretch as it would be."""
        if self._open is None:
            return None
        return self._open | {"seconds": _fill(self._open["seconds"], self._open["ended"] - self._open["began"])}

    def roll_back(self, committed: int) -> None:
        """Steps from `committed` on will come again."""
        self._next, self._generation = min(self._next, committed), None


def _fill(parts: Mapping[str, float], span: float) -> dict[str, float]:
    """The parts of `span`, which they add up to: what is missing is other, what is too much was counted twice."""
    known = {part: parts[part] for part in PARTS if part != "other"}
    total = sum(known.values())
    scale = min(1.0, span / total) if total > 0 else 0.0
    filled = {part: round(seconds * scale, 6) for part, seconds in known.items()}
    return filled | {"other": round(max(0.0, span - total * scale), 6)}


def lost(records: Iterable[Mapping[str, Any]], committed: int) -> dict[str, Any]:
    """The fields of a `rollback` event: the steps from `committed` on are taken off the record, and run again."""
    gone = [record for record in records if record["step"] >= committed]
    seconds = dict.fromkeys(("productive", "data_loading", "straggler_wait"), 0.0)
    for record in gone:
        for part, spent in divide(record).items():
            seconds[part] += spent
    kept = ("step", "seconds", "phase_seconds", "tokens", "skipped")
    return {
        "committed": committed,
        "steps": len(gone),
        "tokens": sum(int(record["tokens"]) for record in gone),
        "seconds": {part: round(spent, 6) for part, spent in seconds.items()},
        "lost": [{key: record[key] for key in kept if key in record} for record in gone],
    }


def uncovered(events: Iterable[Mapping[str, Any]], records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The fields of `steps` events of those committed steps that no event tells of yet: the end of a run that lost its
    controller, or that is under way. What was committed before the run began is another run's, which it was forked
    from."""
    stretches, began = Stretches(), None
    for event in events:
        if event["kind"] == RunStarted.kind and began is None:
            began = when(event)
        elif event["kind"] == StepsCommitted.kind:
            stretches = Stretches.following(event)
        elif event["kind"] == RolledBack.kind:
            stretches.roll_back(event["committed"])
    if began is None:
        return []
    own = [record for record in records if float(record["committed_at"]) >= began]
    found = [stretch for record in own for stretch in stretches.add(record)]
    return [*found, *stretches.flush()]


def as_done(rollbacks: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All steps in the order in which they were done, from what is on record now and what was taken off it: those of
    `rollback` events have fewer fields."""
    stood = list(records)
    parts = []
    for event in reversed(rollbacks):
        kept = [record for record in stood if record["step"] < event["committed"]]
        parts.append([record for record in stood if record["step"] >= event["committed"]])
        stood = [*kept, *event["lost"]]
    parts.append(stood)
    return [record for part in reversed(parts) for record in part]
