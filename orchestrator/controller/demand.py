"""What a run asks of the cluster while there is no room: in which market, and when somebody should hear of it."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.controller.protocol import Action, Record, TellShortage
from orchestrator.controller.views import ScalingRules, WorkerView


class Demand:
    """Knows since when workers wait for room, and which of the markets that the job prefers is asked now."""

    def __init__(self, rules: ScalingRules) -> None:
        self._rules = rules
        self._market = 0
        self._held_until = 0.0
        self._short_since: float | None = None
        self._is_told = False

    def market(self, now: float) -> str:
        """Where to ask for a worker; "": anywhere."""
        if now >= self._held_until:
            self._market = 0  # The first may have recovered. What was asked for elsewhere stays asked for.
        return self._rules.markets[self._market] if self._rules.markets else ""

    def turn_to_next(self, waiting: Sequence[WorkerView], now: float) -> tuple[list[WorkerView], list[Action]]:
        """Those of the `waiting` that their market has not met in time, to be asked for again: in the next, after the
        last in the first, and so are others for a while."""
        rules = self._rules
        if len(rules.markets) < 2:
            return [], []
        late = [view for view in waiting if view.market and now - view.requested_at > rules.fallback_after_s]
        if not late:
            return [], []
        tried = rules.markets.index(late[0].market)
        self._market, self._held_until = (tried + 1) % len(rules.markets), now + rules.fallback_hold_s
        waited_s = now - min(view.requested_at for view in late)
        fields = {
            "from": rules.markets[tried],
            "to": rules.markets[self._market],
            "workers": len(late),
            "waited_seconds": round(waited_s, 1),
        }
        return late, [Record("market_changed", fields)]

    def tell(self, waiting: Sequence[WorkerView], now: float) -> list[Action]:
        """That workers have found no room for long, once; and that there is no shortage any more."""
        if not waiting:
            told, since = self._is_told, self._short_since
            self._is_told, self._short_since = False, None
            return [Record("shortage_over", {"seconds": round(now - (since or now), 1)})] if told else []
        if self._short_since is None:
            self._short_since = now
        waited_s = now - self._short_since
        if self._is_told or waited_s < self._rules.shortage_after_s:
            return []
        self._is_told = True
        workers = tuple(sorted(view.worker for view in waiting))
        return [TellShortage(workers, waited_s, waiting[0].market)]

    def overslept(self, gap_s: float) -> None:
        """Nothing could be asked for so long."""
        if self._short_since is not None:
            self._short_since += gap_s
