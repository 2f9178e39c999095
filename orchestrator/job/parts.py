"""The parts that a job names (its objective, its optimizer, its update rule), as objects. No torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from orchestrator.job.kinds import optimizer_named, update_rule_named
from strategies.objective.objective import Objective
from strategies.optim.optimizer import Optimizer
from strategies.update.ema import WithEma
from strategies.update.rule import UpdateRule
from strategies.wire.format import LOSES_LITTLE, WireFormat

if TYPE_CHECKING:
    from orchestrator.job.schema import Job
    from strategies.layout.virtual import VirtualState


def optimizer_of(job: Job) -> Optimizer:
    return optimizer_named(job.train.optimizer.name)


def objective_of(job: Job) -> Objective:
    return job.objective.made()


def wire_of(job: Job) -> WireFormat:
    """How sums of gradients are sent."""
    strategy = job.strategy
    if isinstance(strategy.wire, str):
        made = WireFormat(strategy.wire, across=strategy.wire_across)
    elif strategy.wire.top_k is not None:
        made = WireFormat("top_k", fraction=strategy.wire.top_k, across=strategy.wire_across)
    else:
        made = WireFormat("power_sgd", rank=strategy.wire.power_sgd or 1)
    by_itself = not (made.is_exact or made.name in LOSES_LITTLE)
    return replace(made, feedback=by_itself if strategy.wire_feedback is None else strategy.wire_feedback)


def virtual_states_of(job: Job) -> list[VirtualState]:
    """What virtual things have for themselves."""
    # Whoever only plans a job needs no numpy.
    from strategies.reduction.residuals import virtual_states

    return virtual_states((0, job.elastic.virtual_workers), wire_of(job))


def update_rule_of(job: Job) -> UpdateRule:
    rule = update_rule_named(job.strategy.update)
    return rule if job.train.ema is None else WithEma(rule, job.train.ema.decay)
