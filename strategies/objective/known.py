"""The objectives that come with this package."""

from __future__ import annotations

from strategies.objective.causal_lm import CAUSAL_LM
from strategies.objective.classification import CLASSIFICATION
from strategies.objective.distill import DISTILL
from strategies.objective.embedding import EMBEDDING
from strategies.objective.kto import KTO
from strategies.objective.objective import Objective
from strategies.objective.preference import DPO, ORPO, REWARD
from strategies.objective.regression import REGRESSION
from strategies.objective.sft import SFT

OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (CAUSAL_LM, SFT, CLASSIFICATION, REGRESSION, DPO, ORPO, KTO, REWARD, EMBEDDING, DISTILL)
}
"""By the name that a job file has for them."""
