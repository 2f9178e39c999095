"""An optimizer and the settings that a job has for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from strategies.compat import build_optimizer
from strategies.optim.adafactor import ADAFACTOR
from strategies.optim.adamw import ADAMW
from strategies.optim.groups import ParameterGroup, Part, are_whole, parts_of
from strategies.optim.lion import LION
from strategies.optim.muon import MUON
from strategies.optim.optimizer import MOMENT_BYTES, Optimizer, Settings
from strategies.optim.sgd import SGD

if TYPE_CHECKING:
    import torch

    from strategies.layout.space import FlatRanges, Slot, Space

OPTIMIZERS: dict[str, Optimizer] = {kind.name: kind for kind in (ADAMW, SGD, LION, MUON, ADAFACTOR)}
"""Those that come with this package, by the name that a job file has for them."""


@dataclass(frozen=True)
class OptimizerSpec(Settings):
    """What the job asks for."""

    kind: Optimizer = field(default=ADAMW, kw_only=True)
    state: str = field(default="fp32", kw_only=True)
    """The type of moments, one of MOMENT_BYTES."""
    offload: bool = field(default=False, kw_only=True)
    """Whether they are kept in host memory, and with them weights that nothing computes with."""
    seed: int = field(default=0, kw_only=True)
    """Of what is drawn where they are rounded."""
    groups: tuple[ParameterGroup, ...] = field(default=(), kw_only=True)
    """Parameters that have a rate or a weight decay of their own: the first that has it decides."""

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the tensors kept for each parameter."""
        return self.kind.moments(self)

    @property
    def state_bytes(self) -> float:
        """About what is kept for each element of a parameter, beside the parameter itself."""
        return self.kind.state_bytes(self, MOMENT_BYTES[self.state])

    def space_of(self, moment: str, space: Space) -> Space:
        """The space with the shapes that a moment has for its parameters, each at the offset of its parameter; the same
        one where those are the parameters' own."""
        slots = []
        for slot, is_whole in zip(space.slots, are_whole(space.slots, self.kind.scope), strict=True):
            shape = self.kind.shape_of(moment, slot.shape, is_whole=is_whole)
            if shape == slot.shape:
                slots.append(slot)
            elif shape is not None:
                slots.append(replace(slot, shape=shape, numel=math.prod(shape)))
        return space if tuple(slots) == space.slots else replace(space, slots=tuple(slots), aliases=())

    def parts(self, flat: FlatRanges, slots: Sequence[Slot]) -> list[Part]:
        """What of a buffer of these ranges, of these slots, is updated alike."""
        return parts_of(flat, slots, self.groups, self.weight_decay, self.kind.scope)

    def build(self, tensors: Sequence[tuple[torch.Tensor, Part]]) -> torch.optim.Optimizer:
        """A torch optimizer over tensors, each with what it is part of; those that are alike are a group of it. In
        `lr_scale` a group has the multiple of the rate."""
        groups: dict[tuple[float, float, bool], list[torch.Tensor]] = {}
        for tensor, part in tensors:
            groups.setdefault((part.lr_scale, part.weight_decay, part.shape is not None), []).append(tensor)
        made = [
            {"params": params, "weight_decay": decay, "lr_scale": scale, **({"is_whole": True} if whole else {})}
            for (scale, decay, whole), params in groups.items()
        ]
        return build_optimizer(lambda: self.kind.build(made, self))
