"""Which layouts a job can have at all: what `validate` checks of the job's own, asked of any.

The rules are those of a job file (`orchestrator.job.layout_checks`), and what a model without weights says of being
split, cut and sharded (`orchestrator.models.validation`). `plan` and `validate` ask the same functions, so that a
layout which is recommended can be had.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from orchestrator.job.layout_checks import RULES_OF_DEGREES
from orchestrator.models.validation import LayoutReasons
from orchestrator.planning.search import Refuse
from strategies.layout.schedule import NO_PIPELINE, PipelineSchedule

if TYPE_CHECKING:
    from torch import nn

    from orchestrator.job import Job


def possible(job: Job, model: nn.Module) -> Refuse:
    """What says no to layouts of this job, whose `model` has been built without weights; it remembers."""

    reasons = LayoutReasons(model)

    @cache
    def refuse(tensor: int, schedule: PipelineSchedule, shard: str) -> str | None:
        degrees: dict[str, Any] = {
            "strategy.tensor": tensor, "strategy.pipeline": schedule.stages, "strategy.shard": shard,
        }  # fmt: skip
        if schedule.kind != NO_PIPELINE:
            degrees["strategy.schedule"] = schedule.kind

        def get(path: str) -> Any:
            return degrees[path] if path in degrees else _value(job, path)

        found = [finding.reason for rule in RULES_OF_DEGREES for finding in _findings(rule, get)]
        said = next(iter(found), None) or reasons.of_tensor(tensor)
        return said or reasons.of_pipeline(schedule.stages, schedule.parts) or reasons.of_shard(shard)

    return refuse


def _findings(rule: Any, get: Any) -> list[Any]:
    from orchestrator.job.rules import Unknown

    try:
        return list(rule(get))
    except Unknown:
        return []


def _value(job: Job, path: str) -> Any:
    value: Any = job
    for name in path.split("."):
        value = getattr(value, name)
    # As rules are given it of a file.
    return value.model_dump() if hasattr(value, "model_dump") else value
