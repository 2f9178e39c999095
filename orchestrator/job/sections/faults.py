"""`faults`: planned failures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.faults import KINDS
from orchestrator.job.fields import (
    CIRCUMSTANCES,
    CountInt,
    PositiveFloat,
    PositiveInt,
    Section,
    named,
)


class Fault(Section):
    """One planned failure: a game day."""

    step: Annotated[CountInt, CIRCUMSTANCES]
    worker: Annotated[CountInt | None, CIRCUMSTANCES] = None
    """Required for every kind but controller."""
    kind: Annotated[str, named("faults", KINDS), CIRCUMSTANCES]
    phase: Annotated[
        Literal["data", "compute", "reduce", "gather", "vote", "commit", "refresh", "evaluate", "tally"], CIRCUMSTANCES
    ] = "compute"
    """Where in the step; evaluate and tally are of the evaluation after `step` steps."""
    seconds: Annotated[PositiveFloat | None, CIRCUMSTANCES] = None
    """How long it lasts (slow), or the time that is left (drain)."""
    steps: Annotated[PositiveInt | None, CIRCUMSTANCES] = None
    """How many steps it lasts (slow)."""
    factor: Annotated[Annotated[float, Field(gt=1)] | None, CIRCUMSTANCES] = None
    """How many times as long a virtual worker takes (slow); 2 when it is not said."""
