"""The kinds of parts that a job names, each found by its name: ours, and those of other packages. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from orchestrator import plugins
from orchestrator.faults import KINDS, FaultKind
from strategies.objective.known import OBJECTIVES
from strategies.objective.objective import Objective
from strategies.optim.optimizer import Optimizer
from strategies.optim.spec import OPTIMIZERS
from strategies.update.rule import RULES, UpdateRule

if TYPE_CHECKING:
    from monitoring.sinks.base import Sink


def optimizer_named(name: str) -> Optimizer:
    """Raises PluginError."""
    return plugins.find("optimizers", name, OPTIMIZERS, Optimizer)  # type: ignore[type-abstract]


def objective_named(name: str) -> Objective:
    """Raises PluginError."""
    return plugins.find("objectives", name, OBJECTIVES, Objective)  # type: ignore[type-abstract]


def fault_kind_named(name: str) -> FaultKind:
    """Raises PluginError."""
    return plugins.find("faults", name, KINDS, FaultKind)  # type: ignore[type-abstract]


def sink_named(name: str) -> Callable[[dict[str, Any]], Sink]:
    """What makes a sink of another package from its settings. Raises PluginError."""
    return plugins.find_callable("sinks", name, {})


def update_rule_named(name: str) -> UpdateRule:
    """Raises PluginError."""
    return plugins.find("update_rules", name, RULES, UpdateRule)  # type: ignore[type-abstract]
