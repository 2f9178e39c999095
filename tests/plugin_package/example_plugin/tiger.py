"""Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms"): an optimizer in one file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from strategies.optim.optimizer import Optimizer, Settings


class Update(torch.optim.Optimizer):
    """Elementwise, so that the result does not depend on how the state is cut."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                average = self.state[parameter]["exp_avg"]
                direction = (average * first + parameter.grad * (1 - first)).sign()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction * group["lr"])
                average.mul_(second).add_(parameter.grad, alpha=1 - second)


class Lion(Optimizer):
    name = "tiger"

    def moments(self, settings: Settings) -> tuple[str, ...]:
        return ("exp_avg",)

    def build(self, groups: Sequence[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
        return Update(list(groups), {"lr": settings.lr, "betas": settings.betas, "weight_decay": 0.0})


TIGER = Lion()
