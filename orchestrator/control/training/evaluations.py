"""The evaluations that are on record, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monitoring.events import Evaluated
from orchestrator.evaluation.judge import EvaluationRules, Judgement, judge
from orchestrator.training.messages import EvaluationReport


class Evaluations:
    """`past` are the metrics of those that an earlier controller put on record, by step."""

    def __init__(self, rules: EvaluationRules | None, past: Mapping[int, Mapping[str, Any]]) -> None:
        self._rules = rules
        self._judged: list[Judgement] = []
        for step in sorted(past) if rules is not None else ():
            self._judge(step, past[step])

    @property
    def judged(self) -> Judgement:
        """What all of them come to."""
        return self._judged[-1] if self._judged else Judgement()

    def judged_at(self, committed: int) -> Judgement:
        """What those of no more than this many steps come to."""
        return next((each for each in reversed(self._judged) if each.step <= committed), Judgement())

    @property
    def ends_at(self) -> int | None:
        """After which step the run is to end early; None: it is not."""
        return self.judged.step if self.judged.stops else None

    def lacks(self, committed: int) -> bool:
        """Whether the weights after this many steps are to be evaluated, and no evaluation of them is on record."""
        return self._rules is not None and self._rules.is_due(committed) and self.judged.step < committed

    def take(self, report: EvaluationReport, committed: int) -> list[Evaluated]:
        """One more, of a state that is on record; nothing happens for one that is known."""
        if self._rules is None or not self.judged.step < report.step <= committed:
            return []
        self._judge(report.step, report.metrics)
        return [
            Evaluated(
                step=report.step, generation=report.generation, metrics=report.metrics, samples=report.samples,
                seconds=report.seconds, best=self.judged.is_best,
            )
        ]  # fmt: skip

    def roll_back(self, committed: int) -> None:
        """The steps from `committed` on are run again, and evaluated again."""
        self._judged = [each for each in self._judged if each.step <= committed]

    def _judge(self, step: int, metrics: Mapping[str, Any]) -> None:
        assert self._rules is not None
        self._judged.append(judge(self.judged, step, metrics, self._rules))
