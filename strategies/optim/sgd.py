"""Stochastic gradient descent, with momentum or without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from strategies.optim.optimizer import Optimizer, Settings

if TYPE_CHECKING:
    import torch


class Sgd(Optimizer):
    """Of torch, with its fused kernel; see `strategies.optim.adamw` for why that gives the same bits everywhere."""

    name = "sgd"

    def moments(self, settings: Settings) -> tuple[str, ...]:
        """See `Optimizer`."""
        return ("momentum_buffer",) if settings.momentum else ()

    def build(self, groups: Sequence[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
        """See `Optimizer`."""
        import torch

        return torch.optim.SGD(list(groups), lr=settings.lr, momentum=settings.momentum, fused=True)


SGD = Sgd()
