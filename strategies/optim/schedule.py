"""Learning-rate schedules, as functions of the step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "wsd")
"""By the names that transformers has for them, but for wsd (its warmup_stable_decay)."""
_TIMESCALE = 10_000


@dataclass(frozen=True)
class ScheduleSpec:
    """Learning-rate schedule: linear warm-up over `warmup_steps`, then one of SCHEDULES.

    By our own `convention` no step has a rate of 0 in the warm-up, and the last step has `min_ratio`; by that of
    `transformers` the first step has 0, and `min_ratio` is reached one step after the last. `power` is polynomial's,
    `cycles` that of cosine with restarts; wsd decays over the last `decay_ratio` of all steps.
    """

    name: str = "cosine"
    warmup_steps: int = 0
    min_ratio: float = 0.1
    total_steps: int = 1
    convention: str = "own"
    power: float = 1.0
    cycles: int = 1
    decay_ratio: float = 0.2

    def factor(self, step: int) -> float:
        """The multiple of the base learning rate used by 0-based `step`.

        Warm-up gives (step + 1) / warmup_steps; decay runs from 1 to `min_ratio` at the last step (cosine: Loshchilov &
        Hutter 2017; inverse square root: Vaswani et al. 2017; wsd: Hu et al. 2024, MiniCPM). By the convention of
        transformers (`optimization.py`) warm-up gives step / warmup_steps, and decay would end at step `total_steps`.
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
        if self.name == "inverse_sqrt":
            scale = self.warmup_steps or _TIMESCALE
            return math.sqrt(scale / (step - self.warmup_steps + scale))
        length = max(1, last - self.warmup_steps)
        return self._decayed(min(1.0, (step - self.warmup_steps) / length), length)

    def _decayed(self, done: float, length: int) -> float:
        """After the share `done` of the `length` steps behind the warm-up."""
        spread = 1.0 - self.min_ratio
        match self.name:
            case "linear":
                return 1.0 - spread * done
            case "cosine":
                return self.min_ratio + spread * 0.5 * (1.0 + math.cos(math.pi * done))
            case "cosine_with_restarts":
                turn = 1.0 if done >= 1.0 else (self.cycles * done) % 1.0
                return self.min_ratio + spread * 0.5 * (1.0 + math.cos(math.pi * turn))
            case "polynomial":
                return self.min_ratio + spread * float((1.0 - done) ** self.power)
            case "wsd":
                share = min(1.0, self.decay_ratio * self.total_steps / length)
                return 1.0 - spread * max(0.0, (done - (1.0 - share)) / share)
        raise ValueError(f"unknown schedule {self.name!r}; known are {', '.join(SCHEDULES)}")
