"""The evaluations of a run as people are shown them. Pure: made of the events alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from monitoring.events import Evaluated, RolledBack

Json = dict[str, Any]

SHOWN = 6
"""Metrics in one line or row of a table; all are on record."""


class StandingEvaluations:
    """The evaluations that stand: steps that a run goes back over are evaluated again."""

    def __init__(self, events: Iterable[Mapping[str, Any]] = ()) -> None:
        self.standing: list[Json] = []
        for event in events:
            self.take(event)

    def take(self, event: Mapping[str, Any]) -> None:
        """The next event of any kind; of another version or damaged, it is passed over."""
        if event["kind"] == Evaluated.kind and isinstance(event.get("metrics"), dict):
            self._forget(lambda step: step < event["step"])
            self.standing.append(dict(event))
        elif event["kind"] == RolledBack.kind:
            self._forget(lambda step: step <= event["committed"])

    def _forget(self, stays: Any) -> None:
        while self.standing and not stays(self.standing[-1]["step"]):
            self.standing.pop()

    @property
    def last(self) -> Json | None:
        return self.standing[-1] if self.standing else None

    @property
    def best(self) -> Json | None:
        """The one that none of the later ones was better than, by the metric that decides."""
        return next((event for event in reversed(self.standing) if event.get("best")), None)


def metrics_by_step(evaluations: StandingEvaluations) -> dict[int, Json]:
    """The metrics of those that stand, by how many steps their weights had seen, in order."""
    return {event["step"]: dict(event["metrics"]) for event in evaluations.standing}


def numbers_in(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are one number; not those by class, and none that was not finite."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def as_text(metrics: Mapping[str, Any]) -> str:
    """The first of them, as in "loss 0.4312, perplexity 1.539"."""
    shown = list(numbers_in(metrics).items())[:SHOWN]
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in shown) or "nothing that is a number"


def describe_evaluation(event: Mapping[str, Any]) -> str:
    """One line about one evaluation."""
    better = ", the best so far" if event.get("best") else ""
    return (
        f"evaluation after {event['step']} steps: {as_text(event['metrics'])} "
        f"({event['samples']} samples, {event['seconds']:.2f} s){better}"
    )
