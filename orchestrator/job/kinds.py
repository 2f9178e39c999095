"""The kinds of parts that a job names, each found by its name: ours, and those of other packages. No torch."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator import plugins
from orchestrator.errors import PluginError
from orchestrator.faults import KINDS, FaultKind
from strategies.objective.known import OBJECTIVES
from strategies.objective.metric import Metric
from strategies.objective.objective import Objective
from strategies.optim.optimizer import Optimizer
from strategies.optim.spec import OPTIMIZERS
from strategies.update.rule import RULES, UpdateRule

if TYPE_CHECKING:
    from monitoring.sinks.base import Sink, SinkRun


Made = TypeVar("Made")


def optimizer_named(name: str) -> Optimizer:
    """Raises PluginError."""
    return plugins.find("optimizers", name, OPTIMIZERS, Optimizer)  # type: ignore[type-abstract]


def objective_named(name: str) -> Objective:
    """Raises PluginError."""
    return plugins.find("objectives", name, OBJECTIVES, Objective)  # type: ignore[type-abstract]


def objective_from(path: str) -> Objective:
    """The one that a class of the user's own makes. Raises PluginError."""
    return _made_at(path, Objective)  # type: ignore[type-abstract]


def metric_from(path: str) -> Metric:
    """Likewise."""
    return _made_at(path, Metric)  # type: ignore[type-abstract]


def hooks_from(path: str) -> Callable[[SinkRun], Any]:
    """What makes the hooks of a job, by the path of their class. Raises PluginError."""
    found = _at(path)
    if not callable(found):
        raise PluginError(
            f"{path} is a {type(found).__name__}, and a class of hooks is wanted (monitoring.sinks.hooks)"
        )
    return found  # type: ignore[no-any-return]


def _at(path: str) -> Any:
    """What stands at `package.module:name`, of the user's own. Raises PluginError."""
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # As for a model's factory.
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # A user's code can fail with anything.
        raise PluginError(f"{path} cannot be had: {type(error).__name__}: {error}") from error


def _made_at(path: str, kind: type[Made]) -> Made:
    """What the class at `package.module:Class` makes, which is to be of this kind. Raises PluginError."""
    made = _at(path)
    try:
        found = made()
    except Exception as error:  # A user's code can fail with anything.
        raise PluginError(f"{path} cannot be had: {type(error).__name__}: {error}") from error
    if not isinstance(found, kind):
        raise PluginError(f"{path} makes a {type(found).__name__}, not one of {kind.__module__}.{kind.__name__}")
    return found


def fault_kind_named(name: str) -> FaultKind:
    """Raises PluginError."""
    return plugins.find("faults", name, KINDS, FaultKind)  # type: ignore[type-abstract]


def sink_named(name: str) -> Callable[[dict[str, Any]], Sink]:
    """What makes a sink of another package from its settings. Raises PluginError."""
    return plugins.find_callable("sinks", name, {})


def update_rule_named(name: str) -> UpdateRule:
    """Raises PluginError."""
    return plugins.find("update_rules", name, RULES, UpdateRule)  # type: ignore[type-abstract]
