"""Ranges of the trained state as named chunks of full tensors: what a checkpoint is made of.

A chunk is a rectangle of one tensor, given by the offsets and sizes of each dimension (the vocabulary of
`torch.distributed.checkpoint`). A range of a rank's flat state becomes a few chunks that each lie in it without gaps,
and is found again in the chunks of any other layout, also of another tensor-parallel degree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from strategies.layout.space import Slot, Space
from strategies.layout.statemap import Span

MAX_CHUNK = 4 << 20
"""Elements of a chunk at most (16 MiB of fp32): what is read, verified and kept in memory at once."""


@dataclass(frozen=True)
class Box:
    """A rectangle of a tensor: where it begins and how long it is, by dimension. A scalar has no dimensions."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def overlap(self, other: Box) -> Box | None:
        """What both cover; None when that is nothing. Both are of tensors with as many dimensions."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        stops = [
            min(a + n, b + m) for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        ]
        sizes = tuple(stop - start for start, stop in zip(offsets, stops, strict=True))
        return None if any(size <= 0 for size in sizes) else Box(offsets, sizes)

    def view_in(self, outer: Box, tensor: torch.Tensor) -> torch.Tensor:
        """This rectangle, out of a `tensor` that has the contents of the rectangle `outer` around it."""
        for dim, (start, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            tensor = tensor.narrow(dim, start - outer.offsets[dim], size)
        return tensor


@dataclass(frozen=True)
class ChunkPiece:
    """A `box` of the full parameter of `slot`, and where its elements are, in order: at `start` of the space."""

    slot: Slot
    box: Box
    start: int


def pieces_of(space: Space, span: Span, max_elements: int = MAX_CHUNK) -> Iterator[ChunkPiece]:
    """A span as pieces of full parameters, in the order of the space; padding is left out.

    What all tensor-parallel coordinates have counts as the first one's, so that it comes up once.
    """
    for slot in space.overlapping(span.start, span.stop):
        if slot.dim is not None or not span.tensor:
            low, high = max(slot.offset, span.start), min(slot.offset + slot.numel, span.stop)
            yield from slot_pieces(space, slot, low, high, span.tensor, max_elements)


def slot_pieces(
    space: Space, slot: Slot, low: int, high: int, coordinate: int, max_elements: int = MAX_CHUNK
) -> Iterator[ChunkPiece]:
    """Elements low..high of the space, all of them in `slot`, as pieces of its full parameter."""
    if slot.dim is not None and slot.packs > 1:
        yield from _packed_pieces(space, slot, low - slot.offset, high - slot.offset, coordinate, max_elements)
        return
    for box, first in _boxes(tuple(slot.shape), low - slot.offset, high - slot.offset, max_elements):
        offsets = list(box.offsets)
        if slot.dim is not None:
            offsets[slot.dim] += coordinate * slot.shape[slot.dim]
        yield ChunkPiece(slot, Box(tuple(offsets), box.sizes), slot.offset + first)


def _packed_pieces(space: Space, slot: Slot, low: int, high: int, coordinate: int, most: int) -> Iterator[ChunkPiece]:
    """The same where a share has parts of several matrices: of one at a time."""
    assert slot.dim is not None
    dim, shape = slot.dim, slot.shape
    rows = shape[dim] // slot.packs
    inner = (rows, *shape[dim + 1 :])
    run = math.prod(inner)
    for number in range(low // run, -(-high // run)):
        outer, pack = divmod(number, slot.packs)
        before: list[int] = []
        for size in reversed(shape[:dim]):
            outer, at = divmod(outer, size)
            before.insert(0, at)
        first = number * run
        for box, start in _boxes(inner, max(low - first, 0), min(high - first, run), most):
            row, *rest = box.offsets
            # All coordinates' rows of a matrix, then the next matrix.
            at = pack * rows * space.tensor + coordinate * rows + row
            yield ChunkPiece(
                slot, Box((*before, at, *rest), (*[1] * dim, *box.sizes)), slot.offset + first + start
            )  # fmt: skip


def full_shape(space: Space, slot: Slot) -> tuple[int, ...]:
    """The shape of a slot's whole parameter."""
    return tuple(size * space.tensor if dim == slot.dim else size for dim, size in enumerate(slot.shape))


def _boxes(shape: Sequence[int], start: int, stop: int, most: int) -> Iterator[tuple[Box, int]]:
    """Elements start..stop of a tensor in row-major order as boxes of at most `most` elements; each with the number of
    its first element."""
    if start >= stop:
        return
    if not shape:
        yield Box((), ()), start
        return
    width = math.prod(shape[1:])
    while start < stop:
        row, inside = divmod(start, width)
        rows = min((stop - start) // width, max(1, most // width)) if inside == 0 else 0
        if rows and (rows > 1 or width <= most):
            yield Box((row, *[0] * (len(shape) - 1)), (rows, *shape[1:])), start
            start += rows * width
            continue
        # A part of one row.
        end = min(stop, (row + 1) * width)
        for box, first in _boxes(shape[1:], inside, inside + end - start, most):
            yield Box((row, *box.offsets), (1, *box.sizes)), row * width + first
        start = end
