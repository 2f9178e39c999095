"""AdamW (Loshchilov & Hutter 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from strategies.optim.optimizer import Optimizer, Settings

if TYPE_CHECKING:
    import torch


class AdamW(Optimizer):
    """Of torch, with its fused kernel: the result does not depend on how ranks share the work, because flat tensors are
    the same on every rank and start on 64-byte boundaries."""

    name = "adamw"
    counts_updates = True
    squares = frozenset({"exp_avg_sq"})

    def moments(self, settings: Settings) -> tuple[str, ...]:
        """See `Optimizer`."""
        return ("exp_avg", "exp_avg_sq")

    def build(self, groups: Sequence[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
        """See `Optimizer`."""
        import torch

        return torch.optim.AdamW(list(groups), lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


ADAMW = AdamW()
