"""What a run asks of the cluster while there is no room: in which market, and when somebody should hear of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from monitoring.events import MarketChanged, ShortageOver
from orchestrator.control.core.config import ScalingRules
from orchestrator.control.core.protocol import ProcessAction, TellShortage
from orchestrator.control.core.workers import ProcessView

V = TypeVar("V", bound=ProcessView)


COMING_S = 30.0
"""How long the word that nodes are starting counts."""
LONGEST_START_S = 900.0
"""Nodes that are starting are waited for this long, from when they were asked for, and no longer."""


class Demand:
    """Knows since when workers wait for room, and which of the markets that the job prefers is asked now."""

    def __init__(self, rules: ScalingRules) -> None:
        self._rules = rules
        self._market = 0
        self._held_until = 0.0
        self._rounds = 0
        self._coming_at = -COMING_S
        self._told: set[str] = set()
        self._short_since: float | None = None
        self._asked_since: dict[str, float] = {}
        """By market, since when it has met no request, also if that was taken back meanwhile and made again."""

    def market(self, now: float) -> str:
        """Where to ask for a worker; "": anywhere."""
        if now >= self._held_until:
            self._market = 0  # The first may have recovered. What was asked for elsewhere stays asked for.
        return self._rules.markets[self._market] if self._rules.markets else ""

    @property
    def is_short(self) -> bool:
        """Whether it has been told that workers find no room, and not yet that they have."""
        return bool(self._told)

    def coming(self, now: float) -> None:
        """Nodes are starting, which may be for these workers."""
        self._coming_at = now

    def placed(self) -> None:
        """There was room for a worker."""
        self._rounds = 0
        self._asked_since.clear()

    def turn_to_next(self, waiting: Sequence[V], now: float) -> tuple[list[V], list[ProcessAction]]:
        """Those of the `waiting` that their market has not met in time, to be asked for again: in the next, after the
        last in the first, and so are others for a while. When no market meets any, each round takes longer."""
        rules = self._rules
        if len(rules.markets) < 2:
            return [], []
        patience_s = rules.fallback_after_s * 2.0 ** min(self._rounds, 6)
        if now - self._coming_at < COMING_S:
            patience_s = max(patience_s, LONGEST_START_S)
        for view in waiting:
            since = min(view.requested_at, self._asked_since.get(view.market, now))
            self._asked_since[view.market] = since
        late = [view for view in waiting if view.market and now - self._asked_since[view.market] > patience_s]
        if not late:
            return [], []
        tried = rules.markets.index(late[0].market)
        waited_s = now - self._asked_since.pop(late[0].market)
        self._market, self._held_until = (tried + 1) % len(rules.markets), now + rules.fallback_hold_s
        self._rounds += self._market == 0
        changed = MarketChanged(
            from_=rules.markets[tried],
            to=rules.markets[self._market],
            workers=len(late),
            waited_seconds=round(waited_s, 1),
        )
        return late, [changed]

    def tell(self, waiting: Sequence[ProcessView], now: float) -> list[ProcessAction]:
        """That workers have found no room for long, once for each market; and that there is no shortage any more."""
        if not waiting:
            self._asked_since.clear()
            told, since = self._told, self._short_since
            self._told, self._short_since = set(), None
            return [ShortageOver(seconds=round(now - (since or now), 1))] if told else []
        if self._short_since is None:
            self._short_since = now
        short = [view for view in waiting if now - view.requested_at >= self._rules.shortage_after_s]
        actions: list[ProcessAction] = []
        for market in sorted({view.market for view in short} - self._told):
            self._told.add(market)
            those = [view for view in short if view.market == market]
            waited_s = now - min(view.requested_at for view in those)
            actions.append(TellShortage(tuple(sorted(view.worker for view in those)), waited_s, market))
        return actions

    def skip_gap(self, gap_s: float) -> None:
        """Nothing could be asked for this long."""
        if self._short_since is not None:
            self._short_since += gap_s
        for market in self._asked_since:
            self._asked_since[market] += gap_s
