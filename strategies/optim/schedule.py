"""Learning-rate schedules, as functions of the step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass


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
