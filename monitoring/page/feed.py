"""Reads a run's files as they grow, and gives a view what is new in them. Knows nothing of the web."""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from monitoring.follow import Tail
from monitoring.goodput import read_ledger
from monitoring.outside import Unreadable, open_regular, parse, read_json
from monitoring.page.view import View
from monitoring.records import MAX_LINE_BYTES, passed_over_text, read_records, records_from
from monitoring.shapes import SMALL_FILES

log = logging.getLogger(__name__)
ACCOUNT_S = 10.0
"""Where status.json does not say where the time goes, all records are read for it, at most once in this time."""


class StepFile:
    """metrics.jsonl as it grows and is cut by roll-backs.

    A roll-back replaces the file by one that has the same first bytes, and steps may follow at once. So of every step
    its place and its time are kept, and how far the file is still the one that was read is found by bisection.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places = array("q")
        self._times = array("d")
        self._first = 0
        self._end = 0
        self._seen: tuple[int, int, int] | None = None
        self.passed_over: Counter[str] = Counter()

    def new(self) -> tuple[int | None, Iterator[dict[str, Any]]]:
        """From which step on the record was cut since last asked (None: it was not), and the steps since."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None, iter(())
        seen = (found.st_size, found.st_ino, found.st_mtime_ns)
        if seen == self._seen:
            return None, iter(())
        self._seen = seen
        cut: int | None = None
        same = self._same()
        if same < len(self._places):
            cut = self.rewind(self._first + same)
        return cut, self._read()

    def rewind(self, step: int) -> int:
        """Goes back, so that `step` is the next one that is read."""
        count = min(max(0, step - self._first), len(self._places))
        if count < len(self._places):
            self._end = self._places[count]
            del self._places[count:], self._times[count:]
        return self._first + count

    def _same(self) -> int:
        """How many of the steps that were read are still there."""
        low, high = 0, len(self._places)
        if high and self._is_there(high - 1):
            return high
        while low < high:
            middle = (low + high) // 2
            if self._is_there(middle):
                low = middle + 1
            else:
                high = middle
        return low

    def _is_there(self, index: int) -> bool:
        try:
            with open_regular(self._path) as file:
                file.seek(self._places[index])
                record = parse(file.readline(MAX_LINE_BYTES))
            return (record["step"], record["committed_at"]) == (self._first + index, self._times[index])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _read(self) -> Iterator[dict[str, Any]]:
        for end, record in records_from(self._path, self._end):
            place, self._end = self._end, end
            if record is None:
                self.passed_over[self._path.name] += 1
                continue
            try:
                step, at = int(record["step"]), float(record["committed_at"])
            except (ValueError, KeyError, TypeError):
                continue
            if not self._places:
                self._first = step
            elif step != self._first + len(self._places):
                continue
            self._places.append(place)
            self._times.append(at)
            yield record
        if self._seen is not None and self._end < self._seen[0]:
            self._seen = None  # Half a line: look again.


class Feed:
    """Keeps a `View` of one run directory up to date."""

    def __init__(self, run_dir: Path) -> None:
        self._dir = run_dir
        self._events = Tail(run_dir / "events.jsonl")
        self._steps = StepFile(run_dir / "metrics.jsonl")
        self._job_read = False
        self._account_at: float | None = None
        self._account_due = False
        self._told: set[str] = set()
        self.view = View(run_dir.name)

    def poll(self, now: float) -> None:
        """Takes in what was recorded since; `now` in seconds since the epoch."""
        try:
            self._poll(now)
        except Unreadable as error:
            self._damaged("records", str(error).replace(str(self._dir), "").lstrip("/"))

    def _poll(self, now: float) -> None:
        view = self.view
        if not self._job_read and (job := self._json("job.resolved.json")) is not None:
            self._job_read = True
            self._take("job.resolved.json", partial(view.on_job, job))
        for event in self._events.new():
            self._take("events.jsonl", partial(view.on_event, event))
            self._account_due = True
        cut, steps = self._steps.new()
        if cut is not None:
            # Buckets of several steps are made anew from their first step on.
            self._steps.rewind(view.cut(cut))
        for record in steps:
            self._take("metrics.jsonl", partial(view.on_step, record))
        for lines in (self._events.passed_over, self._steps.passed_over):
            for name, text in zip(sorted(lines), passed_over_text(lines), strict=True):
                self._damaged(name, text)
        status = self._json("status.json")
        self._take("status.json", partial(view.on_status, status, now))
        if status is None or not view.status.is_live(now):
            self._account(now)

    def _take(self, what: str, take: Callable[[], None]) -> None:
        """Shows a record; one of another version, which lacks what this one needs, does not keep the others away."""
        try:
            take()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            if what not in self._told:
                self._told.add(what)
                log.warning("%s of %s cannot be shown in full: %r", what, self._dir, error)

    def _damaged(self, name: str, text: str) -> None:
        """Says once, to those who look and in the log, that something of a file could not be read."""
        if name not in self._told:
            self._told.add(name)
            log.warning("%s: %s", self._dir, text)
        self.view.on_damage(name, text)

    def _account(self, now: float) -> None:
        """Where the time of an ended or older run went."""
        if not self._account_due or (self._account_at is not None and abs(now - self._account_at) < ACCOUNT_S):
            return
        self._account_at, self._account_due = now, False
        with suppress(KeyError, TypeError, ValueError):  # Records of another version.
            ledger = read_ledger(read_records(self._dir / "events.jsonl"), read_records(self._dir / "metrics.jsonl"))
            self.view.on_goodput(ledger.account().as_dict())

    def _json(self, name: str) -> dict[str, Any] | None:
        try:
            return dict(read_json(self._dir / name, SMALL_FILES[name]))
        except FileNotFoundError:
            return None
        except Unreadable as error:
            # Its place is not told to those who look at the page.
            self._damaged(name, str(error).replace(str(self._dir), "").lstrip("/"))
            return None
