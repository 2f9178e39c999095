"""The job file: its schema, its loading with errors that name line and column, its resolved form.

The job file is the only thing a user writes. This room turns it into a frozen `Job` or into a `JobError` that
lists every mistake at once. It knows nothing of Ray, torch or transformers: whether a model config makes
sense to transformers, or a data source exists, is found out by the rooms that use them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.job.overrides import parse_fault
    from orchestrator.job.problems import JobError, Problem
    from orchestrator.job.schema import Job
    from orchestrator.job.sections.checkpoint import Checkpoint
    from orchestrator.job.sections.data import Data
    from orchestrator.job.sections.elastic import Elastic, Workers
    from orchestrator.job.sections.faults import Fault
    from orchestrator.job.sections.model import Model
    from orchestrator.job.sections.monitoring import Monitoring
    from orchestrator.job.sections.resources import Resources
    from orchestrator.job.sections.strategy import Strategy
    from orchestrator.job.sections.train import Optimizer, Schedule, Train

__all__ = [
    "Checkpoint",
    "Data",
    "Elastic",
    "Fault",
    "Job",
    "JobError",
    "Model",
    "Monitoring",
    "Optimizer",
    "Problem",
    "Resources",
    "Schedule",
    "Strategy",
    "Train",
    "Workers",
    "parse_fault",
]

_MODULES = {
    "Job": "schema", "JobError": "problems", "Problem": "problems", "parse_fault": "overrides",
    "Fault": "sections.faults", "Optimizer": "sections.train", "Schedule": "sections.train",
    "Workers": "sections.elastic",
}  # fmt: skip
"""Others are in a file of their own name."""


def __getattr__(name: str) -> Any:
    # Lazy, so that `orchestrator --help` does not pay for importing pydantic.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, f'sections.{name.lower()}')}"), name)
