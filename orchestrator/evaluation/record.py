"""The evaluations of a run, from its record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from monitoring.evaluations import Evaluations
from monitoring.records import read_records
from orchestrator.checkpoint.of_run import job_of
from orchestrator.evaluation.judge import NOT_YET, EvaluationRules, Judgement, judge
from orchestrator.rundir import RunDirectory


def evaluations_in(events: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """The metrics of each that stands, by the number of steps that its weights had seen."""
    return {event["step"]: dict(event["metrics"]) for event in Evaluations(events).standing}


def judged(evaluations: Mapping[int, Mapping[str, Any]], rules: EvaluationRules | None) -> Judgement:
    """What they come to, in their order."""
    found = NOT_YET
    for step, metrics in sorted(evaluations.items()) if rules is not None else ():
        assert rules is not None
        found = judge(found, step, metrics, rules)
    return found


def judged_of(directory: RunDirectory) -> Judgement:
    """What the evaluations of a run came to. Raises RunDirectoryError, OSError."""
    return judged(evaluations_in(read_records(directory.events)), EvaluationRules.of(job_of(directory)))
