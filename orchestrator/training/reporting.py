"""What a worker says to its controller: in order, until it is heard, with heartbeats in between.

How messages travel is not its business: `report` delivers one and returns the reply, or raises.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.control.core.protocol import FaultFired
from orchestrator.lateness import Lateness
from orchestrator.training.messages import Heartbeat, Reply

log = logging.getLogger(__name__)

PAUSE_S = 0.1
"""Before a message that was not heard is said again."""


@dataclass(frozen=True)
class Rhythm:
    """How often a heartbeat is sent, and after how long without an answer nobody is left to work for."""

    interval_s: float
    lease_s: float


class Reporter:
    """The reporting thread. `heartbeat` is made when one is due, unless the worker `is_spoken_for`, which is asked with
    the seconds since the last answer. `heed` is given every reply and says whether all is over; `on_orphaned` is called
    once when the lease has run out."""

    def __init__(
        self,
        report: Callable[[Any], Reply | None],
        rhythm: Rhythm,
        lateness: Lateness,
        *,
        heartbeat: Callable[[], Heartbeat],
        is_spoken_for: Callable[[float], bool],
        heed: Callable[[Reply], bool],
        on_orphaned: Callable[[], None],
    ) -> None:
        self._report = report
        self._rhythm = rhythm
        self._lateness = lateness
        self._heartbeat = heartbeat
        self._is_spoken_for = is_spoken_for
        self._heed = heed
        self._on_orphaned = on_orphaned
        self._outbox: deque[tuple[Any, threading.Event]] = deque()
        self._wake = threading.Condition()
        self._is_over = False

    def start(self) -> None:
        threading.Thread(target=self._loop, name="reporting", daemon=True).start()

    def send(self, message: Any) -> threading.Event:
        """Queues a message; the event is set once the controller has it. From any thread."""
        heard = threading.Event()
        with self._wake:
            self._outbox.append((message, heard))
            self._wake.notify_all()
        return heard

    def end(self) -> None:
        """Nothing more is said. From any thread."""
        self._is_over = True
        with self._wake:
            self._wake.notify_all()

    def _loop(self) -> None:
        answered = time.monotonic()
        next_heartbeat, term = 0.0, -1
        while not self._is_over:
            with self._wake:
                if not self._outbox:
                    self._wake.wait(timeout=max(0.0, next_heartbeat - time.monotonic()))
                    if next_heartbeat:
                        self._lateness.note(time.monotonic() - next_heartbeat)
                entry = self._outbox[0] if self._outbox else None
            if entry is None and self._is_spoken_for(time.monotonic() - answered):
                next_heartbeat = time.monotonic() + self._rhythm.interval_s
                continue
            message = entry[0] if entry is not None else self._heartbeat()
            asked = time.monotonic()
            reply = self._tell(message)
            now = time.monotonic()
            if reply is not None:
                answered = now
                # One that begins answers late however quiet the machine is, and a fault when it is on record.
                if reply.term == term and not isinstance(message, FaultFired):
                    self._lateness.note(now - asked, now)
                term = reply.term
                self._is_over = self._heed(reply) or self._is_over
                if entry is not None:
                    self._outbox.popleft()
                    entry[1].set()
            else:
                time.sleep(min(PAUSE_S, self._rhythm.interval_s))
            if entry is None:
                next_heartbeat = now + self._rhythm.interval_s
            if now - answered > self._rhythm.lease_s:
                self._is_over = True
                self._on_orphaned()

    def _tell(self, message: Any) -> Reply | None:
        try:
            return self._report(message)
        except Exception as error:
            # The controller may be restarting; whatever was not heard is said again.
            log.debug("report failed: %s", error)
            return None


def resident_bytes() -> int:
    """This process's memory; 0 where that cannot be read."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096
    return 0
