"""From what was measured to metrics, as people and records have them."""

from __future__ import annotations

import math
from typing import Any

from orchestrator.evaluation.measured import BYTES_OF_TEXT, metrics_of
from orchestrator.job import Job
from orchestrator.job.parts import objective_of
from strategies.objective.metric import reported_by
from strategies.update.evaluation import Measured


def report_of(job: Job, measured: Measured) -> dict[str, Any]:
    """The metrics of an evaluation: the objective's own, as JSON values. Numbers that are not finite are None."""
    objective = objective_of(job)
    found = objective.report(measured) | reported_by(metrics_of(job), measured)
    if (count := found.pop(BYTES_OF_TEXT, 0)) and objective.loss_unit == "nats per token":
        found["bits_per_byte"] = measured["loss"][0] / math.log(2) / count
    return _finite(found)  # type: ignore[no-any-return]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
