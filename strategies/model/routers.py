"""The routers of a mixture of experts: which modules they are, and what their model says of their loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Routers:
    """The modules that give the logits [tokens, experts] by which `top_k` experts are chosen for a token: by name, in
    the order of the model, as this element of what they give. `balance` and `z` are what the model would multiply its
    two losses by, and `are_balanced` whether it does."""

    names: Mapping[str, int]
    experts: int
    top_k: int
    balance: float = 0.0
    z: float = 0.0
    are_balanced: bool = False
