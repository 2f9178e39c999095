"""`objective`: what the model is trained for."""

from __future__ import annotations

from typing import Annotated

from orchestrator.job.fields import NUMBERS, Section, named
from strategies.objective.known import OBJECTIVES


class Objective(Section):
    """Which."""

    name: Annotated[str, named("objectives", OBJECTIVES), NUMBERS] = "causal-lm"
