"""The clock of a run: steady, whatever happens to the wall clock of a machine.

A run has one line of time, in seconds. It begins at the wall time of the run's start, and from there on it is counted
by monotonic clocks: the wall clock may be set meanwhile, in either direction, and no duration or order changes. Every
record has both: `clock` on that line, and `time` of the wall clock, for showing. Records of versions before this one
have `time` only, and that is taken for both.

A successor of a controller on the same machine, not started again in between, reads the same monotonic clock and goes
on with the line as if nothing had happened. Anybody else has only the wall clocks to tell how long it has been since
the last record: the line goes on there, and never back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from monitoring.events import ControllerBegan

DRIFT = 2e-4
"""How far two monotonic clocks may go apart, in seconds a second: more than NTP ever corrects."""


class Reading(NamedTuple):
    """What a process reads from its monotonic clock. Two that have the same `boot` read the same clock."""

    boot: str
    seconds: float


@cache
def this_boot() -> str:
    """Names the monotonic clock of this process: that of this boot of the machine, and of its time namespace; "": it
    cannot be told."""
    with suppress(OSError):
        found = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = ""
        with suppress(OSError):
            namespace = os.readlink("/proc/self/ns/time")
        return f"{found} {namespace}".strip()
    return ""


def reading() -> Reading:
    """Of this process, now."""
    return Reading(this_boot(), time.monotonic())


def wall_time_of(seconds: float) -> float:
    """What the wall clock would have said when the monotonic clock of this process read `seconds`."""
    return time.time() - time.monotonic() + seconds


def when(record: Mapping[str, Any]) -> float:
    """When something was recorded, on the run's line: for durations and order."""
    return float(record["clock"] if _has_clock(record) else record["time"])


def on_line(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its `time` on the run's line."""
    return {**record, "time": record["clock"]} if _has_clock(record) else dict(record)


def _has_clock(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("clock"), int | float)


class Line:
    """Follows a run's line of time through its records (of events.jsonl, or status.json), and tells its present."""

    def __init__(self) -> None:
        self._shift: float | None = None
        self._last: tuple[float, float] | None = None
        self._status_at: float | None = None
        self._heard: tuple[float, float] | None = None

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> Line:
        line = cls()
        for record in records:
            line.take(record)
        return line

    def take(self, record: Mapping[str, Any]) -> None:
        """Any record; those of kind "controller" say how the line is counted. A status.json that has changed since the
        last one was taken is of now, however the wall clocks of its writer and its reader differ."""
        if not isinstance(record.get("time"), int | float):
            return
        at = when(record)
        if self._last is None or at >= self._last[0]:
            self._last = at, float(record["time"])
        if "kind" not in record and at != self._status_at:
            self._heard = None if self._status_at is None else (at, time.monotonic())
            self._status_at = at
        if record.get("kind") == ControllerBegan.kind:
            is_ours = this_boot() != "" and record.get("boot") == this_boot()
            self._shift = float(record["clock_shift"]) if is_ours else None

    def now(self) -> float:
        """The present; the wall time where there is no record yet."""
        wall = time.time()
        if self._last is None:
            return wall
        last, wall_then = self._last
        if self._shift is not None:
            return max(last, time.monotonic() + self._shift)
        if self._heard is not None:
            at, heard = self._heard
            return max(last, at + time.monotonic() - heard)
        return last + max(0.0, wall - wall_then)


class RunClock:
    """The line as its controller counts it. `events` are on record; nothing is dated before `at_least`."""

    def __init__(self, events: Iterable[Mapping[str, Any]] = (), at_least: float = 0.0) -> None:
        self._shift = max(Line.of(events).now(), at_least) - time.monotonic()
        self._shifts: dict[tuple[Any, str], tuple[float, float]] = {}

    def now(self) -> float:
        """Seconds since the epoch, as of the wall clock when the run began; never goes back."""
        return time.monotonic() + self._shift

    def stamp(self, now: float) -> dict[str, float]:
        """The times of a record that is made `now`."""
        return {"time": time.time(), "clock": now}

    def anchor(self) -> dict[str, Any]:
        """What a record of kind "controller" says of this clock: which monotonic one counts it, and how many seconds it
        is ahead of that."""
        return {"boot": this_boot(), "clock_shift": self._shift}

    def shift_of(self, sender: Any, sent: Reading, arrived: float) -> float:
        """What to add to readings of a sender's clock to have them on this line, by a message that it sent at `sent`
        and that is here at `arrived`.

        Clocks of this boot are the same. Of another, the message that took the shortest tells best; how far the clocks
        may have gone apart since it came is allowed for.
        """
        if sent.boot and sent.boot == this_boot():
            return self._shift
        key, seen = (sender, sent.boot), arrived - sent.seconds
        if (known := self._shifts.get(key)) is not None:
            shift, at = known
            seen = min(seen, shift + DRIFT * max(0.0, arrived - at))
        self._shifts[key] = seen, arrived
        return seen
