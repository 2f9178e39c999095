"""How soon a run takes in more workers after its membership has changed, so that nodes that come and go do not keep it
busy with coming and going."""

from __future__ import annotations

from collections.abc import Iterable

from monitoring.events import Recovered
from orchestrator.control.core.config import ScalingRules
from orchestrator.control.core.workers import ProcessView

GROWTH_SHARE = 0.05
"""The share of its time that a run spends on taking in workers, as far as the longest wait allows."""
TOGETHER_S = 1.0
"""Workers that go within this long are taken to go for one reason: their node, or their rack."""


class ScaleUpBackoff:
    """Losses are met at once and cost what they cost; growth can wait until it pays, but never for longer than
    `flap_window_s` (or `settle_s`, if that is more)."""

    def __init__(self, rules: ScalingRules) -> None:
        self._rules = rules
        self._changed_at: float | None = None
        self._grown_at: float | None = None
        self._cost_s = 0.0
        self._flaps = 0
        self._flapped_at = 0.0

    def changed(self, now: float) -> None:
        """A generation began to train."""
        self._changed_at = now

    def learn(self, actions: Iterable[object], now: float) -> None:
        """What it cost when workers joined."""
        for action in actions:
            if isinstance(action, Recovered) and action.incident == "grow":
                self._grown_at, self._cost_s = now, action.pause_seconds

    def lost(self, view: ProcessView, now: float) -> None:
        """A member is gone, or must go. Those that go together flap once."""
        joined_at, view.joined_at = view.joined_at, None  # It flaps once: with its notice or with its death.
        if joined_at is None or now - joined_at > self._rules.flap_window_s or now - self._flapped_at < TOGETHER_S:
            return
        self._flaps = self._flaps_at(now) + 1
        self._flapped_at = now

    def asked_to_resize(self) -> None:
        """A user has asked for another size: no earlier change delays it."""
        self._changed_at = self._grown_at = None
        self._flaps = 0

    def may_grow(self, now: float) -> bool:
        """Whether newcomers may be taken in: a while after the last change, and a longer while after the last growth if
        that has cost much."""
        settled = self._changed_at is None or now - self._changed_at >= self.wait_s(now)
        paid_off = self._grown_at is None or now - self._grown_at >= min(self._cost_s / GROWTH_SHARE, self._longest_s)
        return settled and (paid_off or not self._rules.settle_s)

    def wait_s(self, now: float) -> float:
        """How long after a change of membership the next growth waits."""
        return self._settle_s(self._flaps_at(now))

    def _flaps_at(self, now: float) -> int:
        """Those that count: until newcomers, once they may come, have stayed for as long as the window."""
        quiet_s = now - self._flapped_at
        return self._flaps if quiet_s < self._settle_s(self._flaps) + self._rules.flap_window_s else 0

    def _settle_s(self, flaps: int) -> float:
        return min(self._rules.settle_s * 2.0 ** min(flaps, 30), self._longest_s)

    @property
    def _longest_s(self) -> float:
        return max(self._rules.settle_s, self._rules.flap_window_s)
