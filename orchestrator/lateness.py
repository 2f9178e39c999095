"""How late this process is: what it sees of a machine that is busy with other things.

Deadlines are made for a machine that does at once what is asked of it. On a loaded one a thread that wants to wake in
50 ms wakes a second later, and a message that takes a millisecond takes seconds; a process that judges others by
deadlines measures that, and grants it. A process that is stopped, or hangs, tells nothing of the kind: it is found in
the time configured for a machine that is not busy.
"""

from __future__ import annotations

import threading
import time
from collections import deque

WINDOW_S = 10.0
"""How long an observation counts."""
LOOK_S = 0.2
"""How often a process that watches itself wants to wake. Each time takes Python's lock, so not more often."""


class Lateness:
    """Observations of the last `WINDOW_S` seconds; from any thread."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()
        self._lock = threading.Lock()
        self._over = threading.Event()

    def note(self, late_s: float, now: float | None = None) -> None:
        """Something came `late_s` seconds later than it would have on an idle machine."""
        at, late_s = time.monotonic() if now is None else now, max(0.0, late_s)
        with self._lock:
            while self._seen and self._seen[-1][1] <= late_s:
                self._seen.pop()  # It counts for no longer than this one, and for less.
            self._seen.append((at, late_s))

    def recent_s(self, now: float | None = None) -> float:
        """The worst that was noted lately; 0 when nothing was."""
        since = (time.monotonic() if now is None else now) - WINDOW_S
        with self._lock:
            while self._seen and self._seen[0][0] < since:
                self._seen.popleft()
            return self._seen[0][1] if self._seen else 0.0

    def watch(self) -> None:
        """Looks for itself how late a thread of this process wakes, until `close`."""
        threading.Thread(target=self._look, name="lateness", daemon=True).start()

    def close(self) -> None:
        self._over.set()

    def _look(self) -> None:
        before = time.monotonic()
        while not self._over.wait(LOOK_S):
            now = time.monotonic()
            self.note(now - before - LOOK_S, now)
            before = now
