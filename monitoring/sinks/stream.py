"""The one stream that all sinks get: what each step came to, what happened, and where steps are done again.

Where a run goes back to a checkpoint, its metrics.jsonl is cut and grows again; a follower may look only when
the new lines are there already. A step done again is known by its new time of commit.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monitoring.evaluations import numbers_in
from monitoring.events import (
    CheckpointFailed,
    CheckpointInvalid,
    ControllerRestarted,
    DrainNoticed,
    Evaluated,
    Evicted,
    GaveWay,
    GenerationFormed,
    IncidentOpened,
    Recovered,
    RolledBack,
    Shortage,
    SkewFound,
    SkewOver,
)
from monitoring.follow import Tail, describe_event
from monitoring.outside import read_json
from monitoring.records import records_from
from monitoring.shapes import STATUS

Json = dict[str, Any]

TOLD = frozenset(
    {
        IncidentOpened.kind,
        Recovered.kind,
        RolledBack.kind,
        CheckpointFailed.kind,
        CheckpointInvalid.kind,
        SkewFound.kind,
        SkewOver.kind,
        Evicted.kind,
        ControllerRestarted.kind,
        DrainNoticed.kind,
        Shortage.kind,
        GaveWay.kind,
    }
)
"""Kinds of events that are told as text."""


@dataclass(frozen=True)
class Scalars:
    """Numbers of one committed step; `at` in seconds since the epoch. With `of_evaluation` they are those of an
    evaluation after that many steps, which stay right when steps are done again."""

    step: int
    at: float
    values: dict[str, float]
    of_evaluation: bool = False


@dataclass(frozen=True)
class Note:
    """Something that happened when this many steps were committed."""

    step: int
    at: float
    kind: str
    text: str


@dataclass(frozen=True)
class Happened:
    """An event as it is on record, for sinks that want those of its kind."""

    at: float
    record: Json


@dataclass(frozen=True)
class Redone:
    """Steps from `step` on do not count any more: they are done again."""

    step: int


Item = Scalars | Note | Happened | Redone


@dataclass
class Position:
    """How far a stream was read, for another process to go on from there."""

    committed_at: float = -math.inf
    step: int = 0
    """The step after the last one that was given."""
    events: int = 0

    def as_dict(self) -> Json:
        at = self.committed_at
        return {"committed_at": at if math.isfinite(at) else None, "step": self.step, "events": self.events}

    @classmethod
    def read(cls, content: Json) -> Position:
        at = content.get("committed_at")
        return cls(-math.inf if at is None else float(at), int(content.get("step", 0)), int(content.get("events", 0)))


@dataclass
class Stream:
    """Gives what is new in a run directory since last asked, beginning at `position`; events of the kinds in `wants`
    whole, too."""

    run_dir: Path
    position: Position = field(default_factory=Position)
    wants: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self._events = Tail(self.run_dir / "events.jsonl")
        self._to_skip = self.position.events
        self._given_until = self.position.committed_at
        # Steps in order, and when each was committed: a step's number is what a file says, and costs no memory.
        self._known, self._times = array("q"), array("d")
        self._inode, self._offset = -1, 0
        self._world: dict[int, int] = {}

    def new(self) -> list[Item]:
        """New items: of events and of steps, each in their order, and what came first first."""
        items: list[Item] = _by_time(list(self._new_notes()), list(self._new_steps()))
        newest = next((item for item in reversed(items) if isinstance(item, Scalars) and not item.of_evaluation), None)
        if newest is not None and (goodput := self._goodput()) is not None:
            newest.values["goodput"] = goodput
        return items

    def _new_notes(self) -> Iterator[Item]:
        for event in self._events.new():
            if event["kind"] == GenerationFormed.kind:
                self._world[event["generation"]] = len(event["workers"])
            if self._to_skip:
                self._to_skip -= 1
                continue
            self.position.events += 1
            if event["kind"] in self.wants:
                yield Happened(event["time"], event)
            if event["kind"] == Evaluated.kind:
                numbers = {f"evaluation/{name}": value for name, value in numbers_in(event["metrics"]).items()}
                yield Scalars(int(event["step"]), event["time"], numbers, of_evaluation=True)
            if event["kind"] in TOLD and (text := _described(event)) is not None:
                step = event.get("step")
                yield Note(self.position.step if step is None else int(step), event["time"], event["kind"], text)

    def _new_steps(self) -> Iterator[Item]:
        for record in self._records():
            step, at = int(record["step"]), float(record["committed_at"])
            place = bisect_left(self._known, step)
            if place < len(self._known) and self._known[place] == step and self._times[place] == at:
                continue  # read again, because the file was cut
            del self._known[place:], self._times[place:]
            self._known.append(step)
            self._times.append(at)
            if at <= self._given_until:
                continue  # given before, in another process
            if step < self.position.step:
                yield Redone(step)
            self.position.step, self.position.committed_at = step + 1, at
            yield Scalars(step, at, self._values(record))

    def _records(self) -> Iterator[Json]:
        """Lines that are new; after a cut, all of them."""
        path = self.run_dir / "metrics.jsonl"
        try:
            found = path.stat()
            if found.st_ino != self._inode or found.st_size < self._offset:
                self._inode, self._offset = found.st_ino, 0
        except FileNotFoundError:
            return
        for end, record in records_from(path, self._offset):
            self._offset = end
            if record is not None:
                yield record

    def _values(self, record: Json) -> dict[str, float]:
        """What is not finite is null on record, and left out here."""
        seconds = record["seconds"]
        values = {
            "loss": record["loss"],
            "grad_norm": record["grad_norm"],
            "learning_rate": record["lr"],
            "tokens_per_second": record["tokens"] / seconds if seconds else None,
            "step_seconds": seconds,
            "world_size": self._world.get(record["generation"]),
        }
        return {name: float(value) for name, value in values.items() if value is not None}

    def _goodput(self) -> float | None:
        try:
            account = read_json(self.run_dir / "status.json", STATUS)["goodput"]
            return float(account["productive_seconds"] / account["wall_seconds"])
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
            return None  # not known yet


def _by_time(notes: list[Item], steps: list[Item]) -> list[Item]:
    merged: list[Item] = []
    waiting = iter(notes)
    note = next(waiting, None)
    for place, item in enumerate(steps):
        # That steps are done again is told with the first of them.
        at = next((each.at for each in steps[place:] if not isinstance(each, Redone)), math.inf)
        while note is not None and not isinstance(note, Redone) and note.at < at:
            merged.append(note)
            note = next(waiting, None)
        merged.append(item)
    return [*merged, *([] if note is None else [note]), *waiting]


def _described(event: Json) -> str | None:
    return describe_event(event)
