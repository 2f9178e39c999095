"""The parts that a job names (its objective, its optimizer, its update rule), as objects. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.job.kinds import objective_named, optimizer_named, update_rule_named
from strategies.objective.objective import Objective
from strategies.optim.optimizer import Optimizer
from strategies.update.rule import UpdateRule

if TYPE_CHECKING:
    from orchestrator.job.schema import Job


def optimizer_of(job: Job) -> Optimizer:
    return optimizer_named(job.train.optimizer.name)


def objective_of(job: Job) -> Objective:
    return objective_named(job.objective.name)


def update_rule_of(job: Job) -> UpdateRule:
    return update_rule_named(job.strategy.update)
