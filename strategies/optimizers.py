"""Optimizers and learning-rate schedules, as functions of the step alone."""

from __future__ import annotations

import math
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


@dataclass(frozen=True)
class ScheduleSpec:
    """Learning-rate schedule: linear warm-up over `warmup_steps`, then constant, linear or cosine decay.

    By our own `convention` no step has a rate of 0 in the warm-up, and the last step has `min_ratio`; by that of
    `transformers` the first step has 0, and `min_ratio` is reached one step after the last.
    """

    name: str = "cosine"
    warmup_steps: int = 0
    min_ratio: float = 0.1
    total_steps: int = 1
    convention: str = "own"

    def factor(self, step: int) -> float:
        """The multiple of the base learning rate used by 0-based `step`.

        Warm-up gives (step + 1) / warmup_steps; decay runs from 1 to `min_ratio` at the last step (cosine: Loshchilov &
        Hutter 2017, one cycle). By the convention of transformers (`optimization.py`) warm-up gives
        step / warmup_steps, and decay would end at step `total_steps`.
        """
        last = self.total_steps - 1
        if self.convention == "transformers":
            last = self.total_steps
            if step < self.warmup_steps:
                return step / self.warmup_steps
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.name == "constant":
            return 1.0
        length = max(1, last - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / length)
        if self.name == "linear":
            return 1.0 - (1.0 - self.min_ratio) * done
        if self.name == "cosine":
            return self.min_ratio + (1.0 - self.min_ratio) * 0.5 * (1.0 + math.cos(math.pi * done))
        raise ValueError(f"unknown schedule {self.name!r}; known are constant, linear and cosine")


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
