"""How soon a run takes in more workers after its membership has changed, so that nodes that come and go do not keep it
busy with coming and going."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.controller.protocol import Action, Record
from orchestrator.controller.views import ScalingRules, WorkerView

GROWTH_SHARE = 0.05
"""Of its time, a run spends at most so much on taking in workers."""


class Pace:
    """Losses are met at once and cost what they cost; growth can wait until it pays."""

    def __init__(self, rules: ScalingRules) -> None:
        self._rules = rules
        self._changed_at: float | None = None
        self._cost_s = 0.0
        self._flaps = 0
        self._flapped_at = 0.0

    def changed(self, now: float) -> None:
        """A generation began to train."""
        self._changed_at = now

    def learn(self, actions: Iterable[Action]) -> None:
        """What it cost when workers joined."""
        for action in actions:
            if isinstance(action, Record) and action.kind == "recovery" and action.fields["kind"] == "grow":
                self._cost_s = action.fields["pause_seconds"]

    def lost(self, view: WorkerView, now: float) -> None:
        """A member is gone, or must go."""
        if view.joined_at is None or now - view.joined_at > self._rules.flap_window_s:
            return
        self._flaps = self._flaps_at(now) + 1
        self._flapped_at = now
        view.joined_at = None  # One worker flaps once: with its notice or with its death.

    def asked_to_resize(self) -> None:
        """A user knows better."""
        self._changed_at, self._flaps = None, 0

    def wait_s(self, now: float) -> float:
        """How long after a change of membership the next growth waits."""
        if not self._rules.settle_s:
            return 0.0
        return max(self._settle_s(self._flaps_at(now)), self._cost_s / GROWTH_SHARE)

    def _flaps_at(self, now: float) -> int:
        """Those that count: until newcomers, once they may come, have stayed for as long as the window."""
        quiet_s = now - self._flapped_at
        return self._flaps if quiet_s < self._settle_s(self._flaps) + self._rules.flap_window_s else 0

    def _settle_s(self, flaps: int) -> float:
        rules = self._rules
        return min(rules.settle_s * 2.0 ** min(flaps, 30), max(rules.settle_s, rules.flap_window_s))

    def may_grow(self, now: float) -> bool:
        return self._changed_at is None or now - self._changed_at >= self.wait_s(now)
