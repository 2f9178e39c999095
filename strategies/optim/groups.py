"""Which elements of a shard are updated alike: at what multiple of the rate, with what weight decay, as one matrix or
element by element."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from strategies.layout.space import FlatRanges, Slot


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters whose names fit one of `patterns`: their rate is `lr_scale` times that of others; `weight_decay` None:
    as otherwise."""

    patterns: tuple[str, ...]
    lr_scale: float = 1.0
    weight_decay: float | None = None

    def has(self, name: str) -> bool:
        """Whether a parameter of this name is one of them."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)


class Part(NamedTuple):
    """Elements start..stop of a buffer that are updated alike; of a matrix that is updated as one, its shape."""

    start: int
    stop: int
    lr_scale: float
    weight_decay: float
    shape: tuple[int, ...] | None = None


def are_whole(slots: Sequence[Slot], scope: str) -> list[bool]:
    """Of each slot, whether an optimizer of this scope (`Optimizer.scope`) updates its parameter as a whole. A matrix
    of a layer is one in any block but the first, which has the embedding, and the last, which has the head."""
    last = max((slot.block for slot in slots), default=0)
    return [
        scope == "parameter" or (scope == "matrix" and slot.decays and 0 < slot.block < last) for slot in slots
    ]  # fmt: skip


def parts_of(
    flat: FlatRanges, slots: Sequence[Slot], groups: Sequence[ParameterGroup], weight_decay: float, scope: str
) -> list[Part]:
    """The parts of a buffer of these ranges, in order. What an optimizer of this `scope` updates as a whole is a part
    of its own.

    Without that and without groups there are two at most: what is weight-decayed, and the rest.
    """
    if not slots or not (groups or scope != "element"):
        found = [Part(0, flat.boundary, 1.0, weight_decay), Part(flat.boundary, flat.size, 1.0, 0.0)]
        return [part for part in found if part.start < part.stop]
    parts: list[Part] = []
    for slot, whole in zip(slots, are_whole(slots, scope), strict=True):
        for _, start, length in flat.locate(slot.offset, slot.stop):
            part = Part(start, start + length, *_settings(slot, groups, weight_decay), slot.shape if whole else None)
            if whole:
                assert length == slot.stop - slot.offset, f"{slot.name} is updated as a whole, and is here in part"
                part = part._replace(stop=start + slot.numel)
            parts.append(part)
    parts.sort()
    merged: list[Part] = []
    for part in parts:
        before = merged[-1] if merged else None
        alike = before is not None and before[2:] == part[2:] and part.shape is None and before.stop == part.start
        if alike and before is not None:
            merged[-1] = before._replace(stop=part.stop)
        else:
            merged.append(part)
    return merged


def _settings(slot: Slot, groups: Sequence[ParameterGroup], weight_decay: float) -> tuple[float, float]:
    usual = weight_decay if slot.decays else 0.0
    for group in groups:
        if group.has(slot.name):
            # What the loss does not depend on is left alone.
            decay = usual if group.weight_decay is None or not slot.is_used else group.weight_decay
            return group.lr_scale, decay
    return 1.0, usual
