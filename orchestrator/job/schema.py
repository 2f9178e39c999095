"""The job: its sections together, its digest, and the ways to one.

The sections are in `sections`, a file each. Rules that involve two or more fields are in `checks.py` and
`layout_checks.py`; turning YAML into these classes, and mistakes into lines with positions, is `load.py`. All classes
are frozen, refuse unknown fields, and convert nothing except an integer where a number is wanted and a list where a
pair is wanted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from monitoring.outside import without_secrets
from orchestrator.job import checks
from orchestrator.job.fields import CIRCUMSTANCES, NUMBERS, NUMBERS_LATER, FactoryPath, Name, Section
from orchestrator.job.load import load_file, load_text, mistakes_in
from orchestrator.job.rules import ACROSS_FIELDS
from orchestrator.job.sections.adapter import Adapter
from orchestrator.job.sections.checkpoint import Checkpoint
from orchestrator.job.sections.data import Data
from orchestrator.job.sections.elastic import Elastic
from orchestrator.job.sections.evaluation import Evaluation
from orchestrator.job.sections.faults import Fault
from orchestrator.job.sections.model import Model
from orchestrator.job.sections.monitoring import Monitoring
from orchestrator.job.sections.objective import Objective
from orchestrator.job.sections.resources import Resources
from orchestrator.job.sections.strategy import Strategy
from orchestrator.job.sections.train import Train


class Job(Section):
    """A training job: the one thing a user describes, and all that decides its result."""

    name: Annotated[Name, CIRCUMSTANCES]
    model: Annotated[Model, NUMBERS]
    data: Annotated[Data, NUMBERS]
    train: Annotated[Train, NUMBERS]
    objective: Annotated[Objective, NUMBERS_LATER] = Field(default_factory=Objective)
    adapter: Annotated[Adapter | None, NUMBERS_LATER] = None
    evaluation: Annotated[Evaluation | None, NUMBERS_LATER] = None
    strategy: Annotated[Strategy, NUMBERS] = Field(default_factory=Strategy)
    elastic: Annotated[Elastic, NUMBERS] = Field(default_factory=Elastic)
    resources: Annotated[Resources, NUMBERS] = Field(default_factory=Resources)
    checkpoint: Annotated[Checkpoint, CIRCUMSTANCES] = Field(default_factory=Checkpoint)
    monitoring: Annotated[Monitoring, CIRCUMSTANCES] = Field(default_factory=Monitoring)
    hooks: Annotated[FactoryPath | None, CIRCUMSTANCES] = None
    """`package.module:Class` of `monitoring.sinks.hooks.Hooks`, told of what happens."""
    faults: Annotated[list[Fault], CIRCUMSTANCES] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Job:
        # The loader runs the same checks by itself, with positions; this is for jobs made in Python.
        found = checks.find(checks.reader(self.model_dump()))
        if found:
            lines = "; ".join(f"{finding.fields[0]} {finding.reason}" for finding in found)
            raise PydanticCustomError(ACROSS_FIELDS, "{lines}", {"lines": lines})
        return self

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise mistakes_in(Job, error, data) from None

    # For pydantic it is as if there was no `__init__` of ours: it makes jobs out of mappings without it.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Job:  # type: ignore[override]
        """The job in a mapping, as `resolved()` gives it. Raises JobError, which lists every mistake."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise mistakes_in(Job, error, obj) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Sequence[str] = (), faults: Sequence[str] = ()) -> Job:
        """The job in a YAML file, after `overrides` (each `a.b=value`) and with `faults` (see `parse_fault`).

        Raises JobError, which lists every mistake.
        """
        return load_file(cls, path, overrides, faults)

    @classmethod
    def loads(
        cls,
        text: str,
        filename: str = "<string>",
        overrides: Sequence[str] = (),
        faults: Sequence[str] = (),
    ) -> Job:
        """The job in a YAML text; `filename` is what its problems are reported under. Raises JobError."""
        return load_text(cls, text, filename, overrides, faults)

    @property
    def samples_per_virtual_worker(self) -> int:
        """Samples of one step that each virtual worker computes."""
        return self.train.global_batch // self.elastic.virtual_workers

    @property
    def micro_batches_per_virtual_worker(self) -> int:
        """Forward passes of one step that each virtual worker runs, in order."""
        return self.samples_per_virtual_worker // self.train.micro_batch

    def resolved(self) -> dict[str, Any]:
        """The whole job as JSON values, every default filled in. `Job.model_validate` turns it back."""
        return self.model_dump(mode="json")

    def numerics(self) -> dict[str, Any]:
        """The part of `resolved()` that decides the numbers: two jobs that agree here give the same bits. A password
        in a URL decides nothing and is no part.

        Resources stay in: the number of threads decides how a sum inside an operator is split. So does the tensor
        degree, which splits sums inside a matrix product; the rest of a layout changes no bit.
        """
        found: dict[str, Any] = without_secrets(super().numerics())
        return found

    def digest(self) -> str:
        """`sha256:<hex>` over the canonical JSON (sorted keys, no spaces, ASCII) of `numerics()`."""
        canonical = json.dumps(self.numerics(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return "sha256:" + hashlib.sha256(canonical.encode("ascii")).hexdigest()
