"""The parts that a job names (its objective, its optimizer), as objects. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator import plugins
from strategies.objective.causal_lm import OBJECTIVES
from strategies.objective.objective import Objective
from strategies.optim.optimizer import Optimizer
from strategies.optim.spec import OPTIMIZERS

if TYPE_CHECKING:
    from orchestrator.job.schema import Job


def optimizer_of(job: Job) -> Optimizer:
    """Raises PluginError."""
    return plugins.find("optimizers", job.train.optimizer.name, OPTIMIZERS, Optimizer)  # type: ignore[type-abstract]


def objective_of(job: Job) -> Objective:
    """Raises PluginError."""
    return plugins.find("objectives", job.objective.name, OBJECTIVES, Objective)  # type: ignore[type-abstract]
