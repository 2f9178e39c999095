"""Somebody for faults to happen to."""

from __future__ import annotations

import torch

from strategies.comm.fabric import Fabric


class Bystander:
    """Has a CPU, is in no generation, and does not mind."""

    fabric: Fabric | None = None
    device = torch.device("cpu")

    def make_gradient_nan(self, step: int) -> None:
        """Nothing here has a gradient."""
