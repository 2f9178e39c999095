"""The trained state as one flat vector per tensor-parallel coordinate, and how its ranges are kept in buffers.

Every trained parameter has a slot, at an offset that is a multiple of 64 bytes, in the order: matrices of all blocks
(they are weight-decayed), then everything else; within each, blocks in model order. So a pipeline stage is a few long
ranges of it, and the place of a value does not depend on any layout. With tensor parallelism the slot of a split
parameter has the share of one coordinate; all coordinates have the same slots.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from strategies.layout.assignment import even

if TYPE_CHECKING:
    import torch

ALIGNMENT = 16
"""Elements of fp32 per 64 bytes, the widest vector register and the allocator's own alignment."""


def round_up(value: int, multiple: int = ALIGNMENT) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Cut:
    """A coordinate's share of a parameter that tensor parallelism splits over `ranks`: along a dimension that has
    `packs` matrices end to end, a part of each."""

    dim: int
    packs: int
    coordinate: int
    ranks: int

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """A view, unless it has parts of several matrices."""
        if self.packs == 1:
            return whole.chunk(self.ranks, self.dim)[self.coordinate]
        matrices = whole.unflatten(self.dim, (self.packs, -1))
        share: torch.Tensor = matrices.chunk(self.ranks, self.dim + 1)[self.coordinate].flatten(self.dim, self.dim + 1)
        return share


@dataclass(frozen=True)
class Slot:
    """Where one parameter lives: `offset` and `numel` in elements, `shape` of a coordinate's share, `block` of the
    model, and the dimension `dim` that tensor parallelism splits (None: every coordinate has the whole parameter). If
    that dimension has several matrices end to end, `packs` of them, each is split. `is_used` says whether the loss
    depends on it."""

    name: str
    offset: int
    numel: int
    shape: tuple[int, ...]
    block: int
    dim: int | None = None
    is_used: bool = True
    packs: int = 1

    @property
    def stop(self) -> int:
        """Where the next slot begins; what lies between is padding, and always zero."""
        return self.offset + round_up(self.numel)

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, not to vectors; and to nothing that the loss does not depend on,
        which has no gradient in torch's sense and is left alone."""
        return self.is_used and len(self.shape) >= 2


@dataclass(frozen=True)
class Alias:
    """A parameter's second use, under another name: the head that shares the embedding. It is state once, in `slot`,
    and has two gradients, which are summed apart and added when each is whole: so that it makes no difference whether
    the two uses are on one rank. `block` is where the second use is."""

    name: str
    slot: Slot
    block: int


@dataclass(frozen=True)
class Space:
    """The slots of a model at a tensor-parallel degree. `size` is in elements; `boundary` is where the parameters that
    are weight-decayed end."""

    slots: tuple[Slot, ...]
    tensor: int
    size: int
    boundary: int
    aliases: tuple[Alias, ...] = ()
    keeps_whole: bool = False
    """Whether a parameter is never divided among ranks, as its optimizer updates it as one."""
    wire_block: int = ALIGNMENT
    """Ranks are given whole blocks of this many elements of each parameter, which are coded together on the wire."""

    @classmethod
    def of(
        cls,
        parameters: Iterable[tuple[str, Sequence[int], int, int | None]],
        tensor: int,
        unused: Collection[str] = (),
        aliases: Mapping[str, tuple[str, int]] | None = None,
        packs: Mapping[str, int] | None = None,
        *,
        keeps_whole: bool = False,
        wire_block: int = ALIGNMENT,
    ) -> Space:
        """From (name, whole shape, block, split dimension) of every trained parameter, in model order; `unused` are the
        names of those that the loss does not depend on, `aliases` second uses by name: of which parameter, in which
        block; `packs` says of which parameters the split dimension has several matrices.

        Raises ValueError when a dimension does not divide by the degree, naming all that do not.
        """
        slots: list[Slot] = []
        offset = boundary = 0
        uneven = []
        ordered = sorted(parameters, key=lambda entry: (len(entry[1]) < 2 or entry[0] in unused, entry[2]))
        for name, whole, block, dim in ordered:
            sizes, of_it = list(whole), (packs or {}).get(name, 1)
            if dim is not None and tensor > 1:
                if sizes[dim] % (tensor * of_it):
                    uneven.append(f"{name} {list(whole)} in dimension {dim}")
                sizes[dim] //= tensor
            shape = tuple(sizes)
            is_split = dim is not None and tensor > 1
            slot = Slot(
                name, offset, math.prod(shape), shape, block, dim if is_split else None, name not in unused,
                of_it if is_split else 1,
            )  # fmt: skip
            slots.append(slot)
            offset = slot.stop
            boundary = offset if slot.decays else boundary
        if uneven:
            raise ValueError(f"tensor {tensor} does not divide {'; '.join(uneven[:5])}")
        by_name = {slot.name: slot for slot in slots}
        second = tuple(Alias(name, by_name[of], block) for name, (of, block) in (aliases or {}).items())
        return cls(tuple(slots), tensor, offset, boundary, second, keeps_whole, wire_block)

    def ranges_of(self, blocks: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]]:
        """The (start, stop) of all slots in these runs of blocks (None: of all), as few as can be."""
        if blocks is None:
            return [(0, self.size)]
        inside = [slot for slot in self.slots if any(first <= slot.block < last for first, last in blocks)]
        return merge((slot.offset, slot.stop) for slot in inside)

    def slices(self, flat: FlatRanges, parts: int) -> tuple[int, ...]:
        """How many elements of a buffer of these ranges each of `parts` ranks gets: as even as can be."""
        sizes = even(flat.size, parts, ALIGNMENT)
        if not self.keeps_whole and self.wire_block == ALIGNMENT:
            return sizes
        places = [0, *(start for slot in self.slots for _, start, _ in flat.locate(slot.offset, slot.stop)), flat.size]
        places = sorted(set(places))
        bounds = [0]
        for wanted in accumulate(sizes[:-1]):
            after = bisect_right(places, wanted)
            near = places[max(0, after - 1) : after + 1]
            if not self.keeps_whole and len(near) == 2:
                near.append(min(near[0] + (wanted - near[0]) // self.wire_block * self.wire_block, near[1]))
            nearest = min(near, key=lambda place: abs(place - wanted))
            bounds.append(max(bounds[-1], nearest))
        bounds.append(flat.size)
        return tuple(stop - start for start, stop in pairwise(bounds))

    def aliases_of(self, blocks: Sequence[tuple[int, int]] | None) -> list[Alias]:
        """The second uses in these runs of blocks (None: all)."""
        return [a for a in self.aliases if blocks is None or any(first <= a.block < last for first, last in blocks)]

    def overlapping(self, start: int, stop: int) -> Iterator[Slot]:
        """The slots that have elements in start..stop, ascending."""
        slots = self.slots
        for index in range(max(0, bisect_right(slots, start, key=lambda slot: slot.offset) - 1), len(slots)):
            if slots[index].offset >= stop:
                return
            if slots[index].offset + slots[index].numel > start:
                yield slots[index]

    def share(self, slot: Slot, whole: torch.Tensor, coordinate: int) -> torch.Tensor:
        """A coordinate's share of a whole parameter; a view, unless it has parts of several matrices."""
        if slot.dim is None:
            return whole
        return Cut(slot.dim, slot.packs, coordinate, self.tensor).of(whole)

    def assemble(self, slot: Slot, shares: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole parameter from all coordinates' shares."""
        if slot.dim is None:
            return shares[0]
        size = shares[0].shape[slot.dim]
        shape = list(shares[0].shape)
        shape[slot.dim] = size * len(shares)
        whole = shares[0].new_empty(shape)
        size //= slot.packs
        matrices = whole.unflatten(slot.dim, (slot.packs, -1))
        for number, share in enumerate(shares):
            part = matrices.narrow(slot.dim + 1, number * size, size)
            part.copy_(share.unflatten(slot.dim, (slot.packs, -1)))
        return whole


def _stop(part: tuple[int, int]) -> int:
    return part[1]


def merge(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending ranges, those that touch made one."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif stop > start:
            merged.append((start, stop))
    return merged


@dataclass(frozen=True)
class FlatRanges:
    """Ranges of a space laid end to end in one buffer, each from a multiple of 64 bytes on.

    `boundary` is where weight-decayed elements end in the buffer. Updates are elementwise, and kernels treat an
    element the same way wherever it is as long as it is not in the ragged end of a buffer: so there are none.
    """

    ranges: tuple[tuple[int, int], ...]
    size: int
    boundary: int
    _offsets: tuple[int, ...] = field(repr=False)

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]], boundary: int) -> FlatRanges:
        cut = []
        for start, stop in merge(ranges):
            middle = min(max(start, boundary), stop)
            cut += [part for part in ((start, middle), (middle, stop)) if part[0] < part[1]]
        return cls._laid(cut, boundary)

    @classmethod
    def pieces(cls, ranges: Iterable[tuple[int, int]], boundary: int) -> FlatRanges:
        """Like `of`, but ranges that touch stay apart."""
        return cls._laid(sorted(ranges), boundary)

    @classmethod
    def dense(cls, ranges: Iterable[tuple[int, int]]) -> FlatRanges:
        """Ascending ranges end to end without anything between them: of a message, of which nothing is computed."""
        kept = tuple(ranges)
        offsets = [0, *accumulate(stop - start for start, stop in kept)]
        return cls(kept, offsets[-1], offsets[-1], tuple(offsets[:-1]))

    @classmethod
    def _laid(cls, ranges: list[tuple[int, int]], boundary: int) -> FlatRanges:
        offsets, size, decayed = [], 0, 0
        for start, stop in ranges:
            offsets.append(size)
            size += round_up(stop - start)
            decayed = size if start < boundary else decayed
        return cls(tuple(ranges), size, decayed, tuple(offsets))

    def locate(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where elements start..stop of the space are: (from, position in the buffer, length), for those held."""
        for index in range(bisect_right(self.ranges, start, key=_stop), len(self.ranges)):
            first, last = self.ranges[index]
            if first >= stop:
                return
            low, high = max(first, start), min(last, stop)
            if low < high:
                yield low, self._offsets[index] + low - first, high - low

    def cut(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The ranges of the space that lie at start..stop of the buffer, without padding."""
        found = []
        for (first, last), offset in zip(self.ranges, self._offsets, strict=True):
            low, high = max(offset, start), min(offset + last - first, stop)
            if low < high:
                found.append((first + low - offset, first + high - offset))
        return found
