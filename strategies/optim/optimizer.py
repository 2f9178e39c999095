"""What everything else asks of an optimizer, so that only its own file knows its name. No torch but to build one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import torch

MOMENT_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0625}
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
    anywhere; or that of its whole `matrix`, if it is one of a layer; or that of its whole `parameter`. What an update
    depends on has to be on one rank. `counts_updates` says that torch keeps the number of updates beside each parameter
    (its state `step`). `squares` are those of its moments that are means of squares, so never negative.
    """

    name: ClassVar[str]
    scope: ClassVar[Literal["element", "matrix", "parameter"]] = "element"
    counts_updates: ClassVar[bool] = False
    squares: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def moments(self, settings: Settings) -> tuple[str, ...]:
        """The names, in torch's own words, of the fp32 tensors that it keeps for each parameter."""

    def shape_of(self, moment: str, shape: tuple[int, ...], *, is_whole: bool) -> tuple[int, ...] | None:
        """The shape that a moment has for a parameter of this `shape`, with no more elements than that; None where
        there is none. `is_whole` says whether the parameter is updated as a whole. As it is, its own."""
        return shape

    def state_bytes(self, settings: Settings, bytes_of_one: float) -> float:
        """About what is kept for each element of a parameter, if an element of a moment takes `bytes_of_one`."""
        return bytes_of_one * len(self.moments(settings))

    @abstractmethod
    def build(self, groups: Sequence[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
        """A torch optimizer over flat parameters. Each of `groups` has its own `params` and `weight_decay`; the
        learning rate is set before every update. What it computes must not depend on how the parameters are cut."""
