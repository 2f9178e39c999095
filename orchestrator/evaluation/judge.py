"""What a run makes of its evaluations: which weights are the best, and whether it is time to stop.

Pure: a function of the metrics, which all ranks know to the bit. So workers and controller come to the same answer,
each for itself, whatever happened on the way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.job import Job


@dataclass(frozen=True)
class EvaluationRules:
    """When to evaluate in a run of `total_steps`, and what decides: the `metric` whose `mode` (min, max) is best,
    whether such weights are kept (`keeps_best`), and after how many evaluations without a better one by more than
    `threshold` it stops (None: never)."""

    total_steps: int
    every_steps: int
    at_start: bool = False
    metric: str = "loss"
    mode: str = "min"
    keeps_best: bool = False
    patience: int | None = None
    threshold: float = 0.0

    @classmethod
    def of(cls, job: Job) -> EvaluationRules | None:
        """Those of a job; None where it evaluates nothing."""
        asked = job.evaluation
        if asked is None:
            return None
        best, stop = asked.best, asked.early_stop
        return cls(
            job.train.steps, asked.every_steps, asked.at_start,
            "loss" if best is None else best.metric, "min" if best is None else best.mode,
            best is not None, None if stop is None else stop.patience, 0.0 if stop is None else stop.threshold,
        )  # fmt: skip

    @property
    def decides(self) -> bool:
        """Whether anything follows from the metric."""
        return self.keeps_best or self.patience is not None

    def is_due(self, step: int) -> bool:
        """Whether the weights after `step` steps are evaluated."""
        if step == 0:
            return self.at_start
        return step % self.every_steps == 0 or step == self.total_steps


@dataclass(frozen=True)
class Judgement:
    """What is known after the evaluation of the weights after `step` steps (-1: none yet): the `best` value of the
    metric so far, of which step, how many evaluations since had none better, and whether it is time to stop."""

    step: int = -1
    best: float | None = None
    best_step: int = -1
    without: int = 0
    stops: bool = False

    @property
    def is_best(self) -> bool:
        """Whether those weights are the best so far."""
        return self.step >= 0 and self.step == self.best_step


NOT_YET = Judgement()
"""Before any evaluation."""


def judge(before: Judgement, step: int, metrics: Mapping[str, Any], rules: EvaluationRules) -> Judgement:
    """With one more evaluation, of a later step."""
    found = value_of(metrics, rules.metric)
    if found is None:
        is_better = is_much_better = False
    elif before.best is None:
        is_better = is_much_better = True
    else:
        gain = (before.best - found) if rules.mode == "min" else (found - before.best)
        is_better, is_much_better = gain > 0, gain > rules.threshold
    without = 0 if is_much_better else before.without + 1
    return Judgement(
        step,
        found if is_better else before.best,
        step if is_better else before.best_step,
        without,
        rules.patience is not None and without >= rules.patience,
    )


def is_measured(metrics: Mapping[str, Any], name: str) -> bool:
    """Whether there is a metric of this name, or one of that name inside another (per_class.spam.f1)."""
    return _found(metrics, name) is not _NOTHING


_NOTHING = object()


def _found(metrics: Mapping[str, Any], name: str) -> Any:
    value: Any = metrics
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _NOTHING
        value = value[part]
    return value


def value_of(metrics: Mapping[str, Any], name: str) -> float | None:
    """A metric by its name, which may have dots (per_class.spam.f1); None where there is none that is a number."""
    value = _found(metrics, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
