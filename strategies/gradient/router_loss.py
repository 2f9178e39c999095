"""What decides the loss of a mixture's routers (see `strategies.gradient.routing`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from strategies.model.routers import Routers

Over = Literal["micro-batch", "virtual-worker", "step"]


@dataclass(frozen=True)
class RouterLossSpec:
    """What a job says: over which tokens, and what the two losses are multiplied by, where it says that (None: as the
    model does; and not at all, unless the job `is_asking`, where the model does not want it)."""

    virtual_workers: int
    over: Over = "micro-batch"
    balance: float | None = None
    z: float | None = None
    is_asking: bool = False


@dataclass(frozen=True)
class RouterLoss:
    """`balance` and `z` are what the two losses are multiplied by. `routers` are the modules that give logits, by name,
    as this element of what they give; each token has `top_k` of `experts`. Both are means over all tokens of a step,
    which has `virtual_workers` with `micro_batches` each, all of one size, and over all routers."""

    routers: Mapping[str, int]
    experts: int
    top_k: int
    virtual_workers: int
    micro_batches: int
    over: Over = "micro-batch"
    balance: float = 0.0
    z: float = 0.0

    @classmethod
    def of(cls, routers: Routers | None, spec: RouterLossSpec | None, micro_batches: int) -> RouterLoss | None:
        """None where a model has no routers, or none that add to the loss."""
        if routers is None or spec is None:
            return None
        is_wanted = routers.are_balanced or spec.is_asking
        balance = spec.balance if spec.balance is not None else routers.balance * is_wanted
        z = spec.z if spec.z is not None else routers.z * is_wanted
        if not balance and not z:
            return None
        return cls(
            routers.names, routers.experts, routers.top_k, spec.virtual_workers, micro_batches, spec.over, balance, z
        )
