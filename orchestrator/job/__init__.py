"""The job file: its schema, its loading with errors that name line and column, its resolved form.

The job file is the only thing a user writes. This room turns it into a frozen `Job` or into a `JobError` that
lists every mistake at once. It knows nothing of Ray, torch or transformers: whether a model config makes
sense to transformers, or a data source exists, is found out by the rooms that use them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.job.errors import JobError, Problem
    from orchestrator.job.overrides import parse_fault
    from orchestrator.job.schema import (
        Checkpoint,
        Data,
        Elastic,
        Fault,
        Job,
        Model,
        Monitoring,
        Optimizer,
        Resources,
        Schedule,
        Strategy,
        Train,
        Workers,
    )

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

_MODULES = {"JobError": "errors", "Problem": "errors", "parse_fault": "overrides"}


def __getattr__(name: str) -> Any:
    # Lazy, so that `orchestrator --help` does not pay for importing pydantic.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'schema')}"), name)
