"""What everything else asks of an optimizer, so that only its own file knows its name. No torch but to build one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import torch

MOMENT_BYTES = {"fp32": 4, "bf16": 2}
"""Of an element of a moment, by the type that a job asks for. Whatever that is, they are moved and saved as fp32."""


@dataclass(frozen=True)
class Settings:
    """What a job may ask of an optimizer; each looks at those that it has."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.0


class Optimizer(ABC):
    """One kind of optimizer.

    `scope` is what one update of an element depends on: the gradient of that `element`, so that the state may be cut
    anywhere; or that of its whole `matrix`, which then has to be on one rank. `counts_updates` says that torch keeps
    the number of updates beside each parameter (its state `step`).
    """

    name: ClassVar[str]
    scope: ClassVar[Literal["element", "matrix"]] = "element"
    counts_updates: ClassVar[bool] = False

    @abstractmethod
    def moments(self, settings: Settings) -> tuple[str, ...]:
        """The names, in torch's own words, of the fp32 tensors that it keeps for each parameter, of its shape."""

    @abstractmethod
    def build(self, groups: Sequence[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
        """A torch optimizer over flat parameters. Each of `groups` has its own `params` and `weight_decay`; the
        learning rate is set before every update. What it computes must not depend on how the parameters are cut."""
