"""The parts that a job names (its objective, its optimizer, its update rule), as objects. No torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from orchestrator.job.kinds import optimizer_named, update_rule_named
from orchestrator.job.update_checks import warmup_steps_of
from strategies.objective.objective import Objective
from strategies.optim.optimizer import Optimizer, Settings
from strategies.update.ema import WithEma
from strategies.update.rule import UpdateRule
from strategies.wire.format import LOSES_LITTLE, WireFormat

if TYPE_CHECKING:
    from orchestrator.job.schema import Job
    from orchestrator.job.sections.strategy import LocalUpdate
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

    own = update_rule_of(job).virtual_states()
    return [*virtual_states((0, job.elastic.virtual_workers), wire_of(job)), *own]


def _local_rule(job: Job, update: LocalUpdate) -> UpdateRule:
    # Whoever only plans a job needs no numpy.
    from strategies.update.local import LocalRule
    from strategies.update.outer import LocalSettings

    mix = update.mix
    settings = LocalSettings(
        replicas=update.replicas,
        inner_steps=update.inner_steps,
        warmup_steps=warmup_steps_of(job.train.steps, update.warmup_steps),
        lr=update.outer.lr,
        momentum=update.outer.momentum,
        nesterov=update.outer.nesterov,
        fragments=update.fragments,
        overlap_steps=update.overlap_steps,
        mix=(0.5 if update.overlap_steps else 0.0) if mix is None else mix,
        wire=WireFormat(update.wire),
    )
    return LocalRule(settings, optimizer_of(job).moments(Settings(momentum=job.train.optimizer.momentum)))


def update_rule_of(job: Job) -> UpdateRule:
    update = job.strategy.update
    rule = update_rule_named(update) if isinstance(update, str) else _local_rule(job, update)
    return rule if job.train.ema is None else WithEma(rule, job.train.ema.decay)
