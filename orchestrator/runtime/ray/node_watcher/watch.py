"""The loop: looks at the sources, and drains this node once for each notice that says something new."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from orchestrator.notices.notice import Notice, Source
from orchestrator.runtime.ray.nodes import GcsError, HeadNodeError, NodeError

log = logging.getLogger(__name__)

UNKNOWN_DEADLINE_S = 60.0
"""How long a machine is taken to last when its notice does not say."""
_RETRY_S = 1.0
_LEAST_TRYING_S = 10.0
"""A machine that answers past its deadline can still be drained."""
_MAX_BACKOFF_S = 10.0
"""Of a source that does not answer. Not longer, as the shortest notices are of 30 s."""

Drain = Callable[[str, float], str]
"""Drains this node for a reason until a time (seconds since the epoch), and says what it drained. Raises GcsError or
NodeError."""


class _Standing:
    """A notice that stands, and what became of it. Its deadline is the earliest that was told of it, by the clock that
    says `now`: it is `left_s` from there."""

    def __init__(self, notice: Notice, now: float, left_s: float) -> None:
        self.notice = notice
        self.deadline = now + left_s
        self.seen_at = now
        self.is_settled = False
        self.trouble = ""


class _Watched:
    """A source with what is known of it: its standing notices by key, and how often it failed in a row."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.standing: dict[str, _Standing] = {}
        self.failures = 0
        self.trouble = ""
        self.due = 0.0


class Watcher:
    """See the module. A notice is acted on when its deadline is at most `lead_s` away, as draining a node days before
    it goes would waste it; one that is only possible is acted on when `early` is set.

    Sources and Ray tell and are told deadlines in wall time (`wall`). They are counted by a `clock` that nobody sets.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        drain: Drain,
        *,
        poll_s: float,
        lead_s: float,
        early: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._watched = [_Watched(source) for source in sources]
        self._drain = drain
        self._poll_s = poll_s
        self._lead_s = lead_s
        self._early = early
        self._clock = clock
        self._wall = wall

    def run(self, stopped: threading.Event) -> None:
        """Watches until `stopped`."""
        while not stopped.wait(self.tick()):
            pass

    def tick(self) -> float:
        """One look at every source that is due; returns how many seconds later the next is."""
        for watched in self._watched:
            if watched.due <= self._clock():
                self._look(watched)
        for watched in self._watched:
            for standing in watched.standing.values():
                if not standing.is_settled:
                    self._act(watched.source.name, standing)
        now = self._clock()
        wait_s = min((watched.due - now for watched in self._watched), default=self._poll_s)
        if any(s.trouble and not s.is_settled for watched in self._watched for s in watched.standing.values()):
            wait_s = min(wait_s, _RETRY_S)
        return max(wait_s, 0.05)

    def _look(self, watched: _Watched) -> None:
        now = self._clock()
        name = watched.source.name
        try:
            wall = self._wall()
            notices = watched.source.poll(wall)
        except Exception as error:  # A source may be anybody's; none of them ends the watch.
            watched.failures += 1
            watched.due = now + min(self._poll_s * 2.0**watched.failures, max(self._poll_s, _MAX_BACKOFF_S))
            trouble = f"{type(error).__name__}: {error}"
            if trouble != watched.trouble:
                log.warning("%s: %s; asking again", name, trouble)
            watched.trouble = trouble
            return
        if watched.failures:
            log.info("%s: answers again, after %d failed polls", name, watched.failures)
        watched.failures, watched.trouble, watched.due = 0, "", now + self._poll_s
        found = {notice.key: notice for notice in notices}
        for key in watched.standing.keys() - found.keys():
            gone = watched.standing.pop(key)
            drained = "; a Ray drain cannot be withdrawn, so the node stays drained" if gone.is_settled else ""
            log.info("%s: withdrawn: %s%s", name, gone.notice.reason, drained)
        for key, notice in found.items():
            left_s = UNKNOWN_DEADLINE_S if notice.deadline is None else notice.deadline - wall
            if key not in watched.standing:
                watched.standing[key] = _Standing(notice, now, left_s)
                self._announce(name, watched.standing[key], now)
            elif notice.deadline is not None:
                watched.standing[key].deadline = min(watched.standing[key].deadline, now + left_s)

    def _announce(self, name: str, standing: _Standing, now: float) -> None:
        left_s = standing.deadline - now
        when = f"in {left_s:.0f} s" if standing.notice.deadline is not None else "at an unknown time"
        if standing.notice.possible and not self._early:
            then = "; only possible, so the node goes on (--early would drain it)"
        elif left_s > self._lead_s:
            then = f"; the node is drained {self._lead_s:.0f} s before"
        else:
            then = ""
        log.warning("%s: notice: %s, %s%s", name, standing.notice.reason, when, then)

    def _act(self, name: str, standing: _Standing) -> None:
        now = self._clock()
        if (standing.notice.possible and not self._early) or standing.deadline - now > self._lead_s:
            return
        try:
            drained = self._drain(f"{name}: {standing.notice.reason}", self._wall() + standing.deadline - now)
        except HeadNodeError as error:
            standing.is_settled = True
            log.error("%s: %s", name, error)
        except (GcsError, NodeError) as error:
            if str(error) != standing.trouble:
                log.error("%s: not drained: %s; trying again until the deadline", name, error)
            standing.trouble = str(error)
            if now >= max(standing.deadline, standing.seen_at + _LEAST_TRYING_S):
                standing.is_settled = True
                log.error("%s: given up at the deadline: %s", name, standing.notice.reason)
        else:
            standing.is_settled = True
            log.warning("%s: %s", name, drained)
