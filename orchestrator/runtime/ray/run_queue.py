"""Runs that cannot train for want of room take turns on a cluster.

Two that start on a cluster which is full, or cannot grow, could each hold what the other lacks, and wait for ever. So
those that have been short of room for long tell one another, and what they need, in the cluster's key-value store. One
of them has its turn: the others give back the places that it could use, unless state would be lost with them. A run
that has not got enough by the end of its turn goes to the end of the queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from monitoring.outside import json_text, parse
from orchestrator.runtime.ray import compat
from orchestrator.runtime.ray.resource_request import Need

SILENCE_S = 30.0
"""Who has said nothing for this long has ended without a word."""
TELL_S = 5.0
"""How often a run says that it still waits."""
NAMESPACE = b"orchestrator"
PREFIX = "waiting/"


@dataclass(frozen=True)
class Wish:
    """That a run waits for room, since when in its queue, as of when, and for what. It is `firm` when the run cannot
    give way: its workers hold the only state there is. Times on that run's own line: only the order of `since` means
    anything to others."""

    run: str
    since: float
    told_at: float
    firm: bool
    need: Need

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Wish:
        return cls(**{**content, "need": Need(**content["need"])})


def in_order(wishes: Iterable[Wish], now: float) -> list[Wish]:
    """Of those that still wait: who cannot give way first, then who has waited longest."""
    waiting = [wish for wish in wishes if now - wish.told_at < SILENCE_S]
    return sorted(waiting, key=lambda wish: (not wish.firm, wish.since, wish.run))


class RunQueue:
    """Where this run is in the queue; outside it to begin with. A turn of its own lasts `turn_s` seconds: places that
    are given back are free within a few."""

    def __init__(self, run: str, turn_s: float) -> None:
        self._run = run
        self._turn_s = turn_s
        self._mine: Wish | None = None
        self._first_since: float | None = None
        self._told: dict[str, tuple[float, float]] = {}

    def leave(self) -> None:
        """It waits no more."""
        if self._mine is not None:
            self._mine = self._first_since = None
            with suppress(Exception):
                _store()._internal_kv_del(PREFIX + self._run, namespace=NAMESPACE)

    def look(self, need: Need, now: float, *, firm: bool, could_use: Callable[[Need], bool]) -> str:
        """The run waits for places like this. Whom it is to give way to, "": nobody. `could_use` says whether another
        could do anything with what this one holds."""
        mine = self._mine or Wish(self._run, now, 0.0, firm, need)
        others = [self._as_heard(wish, now) for wish in self._heard() if wish.run != self._run]
        queue = in_order([*others, replace(mine, firm=firm, told_at=now)], now)
        if queue[0].run != self._run:
            self._first_since = None
        elif self._first_since is None:
            self._first_since = now
        elif now - self._first_since > self._turn_s and len(queue) > 1 and not firm:
            self._first_since = None
            # Behind all others, also those whose clocks are ahead of ours.
            behind = max((wish.since + 0.001 for wish in queue if wish.run != self._run), default=now)
            mine = replace(mine, since=max(now, behind), told_at=0.0)
            queue = in_order([*others, replace(mine, told_at=now)], now)
        if now - mine.told_at > TELL_S or mine.firm != firm:
            mine = replace(mine, firm=firm, need=need, told_at=now)
            _store()._internal_kv_put(PREFIX + self._run, json_text(asdict(mine)), namespace=NAMESPACE)
        self._mine = mine
        before = queue[: [wish.run for wish in queue].index(self._run)]
        return "" if firm else next((wish.run for wish in before if could_use(wish.need)), "")

    def _as_heard(self, wish: Wish, now: float) -> Wish:
        """With `told_at` by the clock of this run: whether it still waits is seen by its saying so again."""
        told_at, at = self._told.get(wish.run, (None, now))
        if told_at != wish.told_at:
            at = now
        self._told[wish.run] = wish.told_at, at
        return replace(wish, told_at=at)

    def _heard(self) -> list[Wish]:
        found = []
        for key in _store()._internal_kv_list(PREFIX, namespace=NAMESPACE):
            content = _store()._internal_kv_get(key, namespace=NAMESPACE)
            with suppress(ValueError, TypeError, KeyError):  # Gone meanwhile, or of another version of ours.
                found.append(Wish.read(parse(content)))
        return found


def _store() -> Any:
    return compat.internal_kv
