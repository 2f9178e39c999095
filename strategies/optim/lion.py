"""Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", program 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from strategies.optim.optimizer import Optimizer, Settings

if TYPE_CHECKING:
    import torch


class Lion(Optimizer):
    """The sign of a mean of gradients; torch has none. One operation after the other, each the same for an element
    wherever it is."""

    name = "lion"

    def moments(self, settings: Settings) -> tuple[str, ...]:
        """See `Optimizer`."""
        return ("exp_avg",)

    def build(self, groups: Sequence[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
        """See `Optimizer`."""
        import torch

        class Stepping(torch.optim.Optimizer):
            """As torch's own."""

            @torch.no_grad()
            def step(self, closure: Any = None) -> None:  # type: ignore[override]
                """One update."""
                for group in self.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            _update(parameter, parameter.grad, self.state[parameter]["exp_avg"], group)

        return Stepping(list(groups), {"lr": settings.lr, "betas": settings.betas, "weight_decay": 0.0})


def _update(parameter: torch.Tensor, gradient: torch.Tensor, mean: torch.Tensor, group: dict[str, Any]) -> None:
    one, two = group["betas"]
    direction = mean.mul(one).add_(gradient, alpha=1 - one).sign_()
    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
    mean.mul_(two).add_(gradient, alpha=1 - two)


LION = Lion()
