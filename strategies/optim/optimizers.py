"""Optimizers over flat parameter tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class OptimizerSpec:
    """What the job asks of the optimizer (AdamW: Loshchilov & Hutter 2019)."""

    name: str = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.0

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the state tensors kept per parameter, in torch's own words."""
        if self.name == "adamw":
            return ("exp_avg", "exp_avg_sq")
        if self.name == "sgd":
            return ("momentum_buffer",) if self.momentum else ()
        raise ValueError(f"unknown optimizer {self.name!r}; known are adamw and sgd")


def build_optimizer(
    spec: OptimizerSpec, decayed: Sequence[torch.Tensor], undecayed: Sequence[torch.Tensor]
) -> torch.optim.Optimizer:
    """A torch optimizer over flat parameter tensors; weight decay applies to `decayed` only.

    The fused kernels are used: their results do not depend on how ranks share the work because the flat tensors are
    the same on every rank and start on 64-byte boundaries.
    """
    groups: list[dict[str, Any]] = [
        {"params": list(tensors), "weight_decay": decay}
        for tensors, decay in ((decayed, spec.weight_decay), (undecayed, 0.0))
        if tensors
    ]
    if spec.name == "adamw":
        return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)
    if spec.name == "sgd":
        return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum, fused=True)
    raise ValueError(f"unknown optimizer {spec.name!r}; known are adamw and sgd")
