"""The parts that a job names (its objective, its optimizer, its update rule), as objects. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.job.kinds import optimizer_named, update_rule_named
from strategies.objective.objective import Objective
from strategies.optim.optimizer import Optimizer
from strategies.update.ema import WithEma
from strategies.update.rule import UpdateRule

if TYPE_CHECKING:
    from orchestrator.job.schema import Job


def optimizer_of(job: Job) -> Optimizer:
    return optimizer_named(job.train.optimizer.name)


def objective_of(job: Job) -> Objective:
    return job.objective.made()


def update_rule_of(job: Job) -> UpdateRule:
    rule = update_rule_named(job.strategy.update)
    return rule if job.train.ema is None else WithEma(rule, job.train.ema.decay)
