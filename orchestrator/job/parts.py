"""The parts that a job names (its optimizer), as objects."""

from __future__ import annotations

from orchestrator import plugins
from strategies.optim.base import Optimizer
from strategies.optim.spec import OPTIMIZERS


def optimizer_named(name: str) -> Optimizer:
    """Raises PluginError."""
    return plugins.find("optimizers", name, OPTIMIZERS, Optimizer)  # type: ignore[type-abstract]
