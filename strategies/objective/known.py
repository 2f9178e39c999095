"""The objectives that come with this package."""

from __future__ import annotations

from strategies.objective.causal_lm import CAUSAL_LM
from strategies.objective.objective import Objective

OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in (CAUSAL_LM,)}
"""By the name that a job file has for them."""
