"""The evaluations of a run, from its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monitoring.evaluations import StandingEvaluations, metrics_by_step
from monitoring.records import read_records
from orchestrator.checkpoint.of_run import job_of
from orchestrator.evaluation.judge import NOT_YET, EvaluationRules, Judgement, judge
from orchestrator.rundir import RunDirectory


def judged(evaluations: Mapping[int, Mapping[str, Any]], rules: EvaluationRules | None) -> Judgement:
    """What they come to, in their order."""
    found = NOT_YET
    for step, metrics in sorted(evaluations.items()) if rules is not None else ():
        assert rules is not None
        found = judge(found, step, metrics, rules)
    return found


def judged_of(directory: RunDirectory) -> Judgement:
    """What the evaluations of a run came to. Raises RunDirectoryError, OSError."""
    standing = StandingEvaluations(read_records(directory.events))
    return judged(metrics_by_step(standing), EvaluationRules.of(job_of(directory)))
