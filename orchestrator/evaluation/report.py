"""From what was measured to metrics, as people and records have them."""

from __future__ import annotations

import math
from typing import Any

from orchestrator.job import Job
from orchestrator.job.parts import metrics_of, objective_of
from strategies.objective.metric import reported_by
from strategies.update.evaluation import Measured


def report_of(job: Job, measured: Measured) -> dict[str, Any]:
    """The metrics of an evaluation: the objective's own, as JSON values. Numbers that are not finite are None."""
    objective = objective_of(job)
    found = objective.report(measured) | reported_by(metrics_of(job), measured)
    if job.data.tokenizer == "bytes" and objective.loss_unit == "nats per token":
        # A byte is a token.
        found["bits_per_byte"] = found["loss"] / math.log(2)
    return _finite(found)  # type: ignore[no-any-return]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
