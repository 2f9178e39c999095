"""Where one kind of state is kept for the ranges that a shard has: fp32 values to everybody else, however they are
stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from strategies.layout.space import ALIGNMENT, FlatRanges, Slot, Space, round_up
from strategies.layout.statemap import Span
from strategies.optim.rounding import FP8_BLOCK, from_fp8, round_to_bf16, to_fp8


class Buffer:
    """A value for each position of `flat`, as it is: fp32 in `values` [flat.size], or bf16."""

    def __init__(self, flat: FlatRanges, values: torch.Tensor) -> None:
        self.flat = flat
        self.values = values

    @property
    def num_bytes(self) -> int:
        """That it takes."""
        return self.values.numel() * self.values.element_size()

    def locate(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Like `FlatRanges.locate`: where elements start..stop of the space are, of those that are here."""
        return self.flat.locate(start, stop)

    def view(self, offset: int, length: int) -> torch.Tensor | None:
        """A view of elements offset..offset + length, through which they may be written; None where there is none."""
        return self.values[offset : offset + length]

    def read(self, offset: int, length: int) -> torch.Tensor:
        """Elements offset..offset + length: fp32, or a type of which every value is one of fp32."""
        return self.values[offset : offset + length]

    def write(self, offset: int, values: torch.Tensor) -> None:
        """Takes `values` [n] that another of its kind has read, as they are."""
        self.values[offset : offset + len(values)].copy_(values)

    def update(self, offset: int, values: torch.Tensor, key: int) -> None:
        """Takes new `values` fp32 [n], rounded as this is stored; `key` names what is drawn for that."""
        if self.values.dtype == torch.float32:
            self.write(offset, values)
            return
        for start, stop in self.flat.cut(offset, offset + len(values)):
            for first, place, length in self.flat.locate(start, stop):
                at = place - offset
                self.values[place : place + length] = round_to_bf16(values[at : at + length], first, key)

    def zero(self) -> None:
        """All values are zero."""
        self.values.zero_()

    def of_slot(self, slot: Slot) -> torch.Tensor:
        """What is kept of a whole parameter, whose slot has the shape of that. Raises RuntimeError when it is not
        here."""
        found = list(self.locate(slot.offset, slot.offset + slot.numel))
        if sum(length for _, _, length in found) < slot.numel or len(found) > 1:
            raise RuntimeError(f"{slot.name} is not on this rank")
        return self.read(found[0][1], slot.numel).view(slot.shape) if found else self.values.new_zeros(slot.shape)


class Fp8Buffer(Buffer):
    """Elements up to `flat.boundary`, those of matrices, in blocks of FP8_BLOCK: a byte for each, and one for the power
    of two that they have in common (as the MX formats of the Open Compute Project have it, with smaller blocks). All
    others, which are few and matter most, as they are.

    Of means of squares (`is_square`) roots are stored, which halves their range. What has been stored is stored again
    without any change, also in parts: so it may be moved and cut as other state, as long as no block is divided when it
    is updated.
    """

    def __init__(self, flat: FlatRanges, device: torch.device, *, is_square: bool) -> None:
        super().__init__(flat, torch.zeros(flat.size - flat.boundary, dtype=torch.float32, device=device))
        self._codes = torch.zeros(flat.boundary, dtype=torch.float8_e4m3fn, device=device)
        self._exponents = torch.zeros(flat.boundary // FP8_BLOCK, dtype=torch.int8, device=device)
        self._is_square = is_square

    @property
    def num_bytes(self) -> int:
        """See `Buffer`."""
        return super().num_bytes + self._codes.numel() + self._exponents.numel()

    def view(self, offset: int, length: int) -> torch.Tensor | None:
        """See `Buffer`."""
        coded = self.flat.boundary
        return super().view(offset - coded, length) if offset >= coded else None

    def read(self, offset: int, length: int) -> torch.Tensor:
        """See `Buffer`."""
        coded, stop = self.flat.boundary, offset + length
        if offset >= coded:
            return super().read(offset - coded, length)
        low, high = offset // FP8_BLOCK, round_up(min(stop, coded), FP8_BLOCK) // FP8_BLOCK
        found = from_fp8(
            self._codes[low * FP8_BLOCK : high * FP8_BLOCK], self._exponents[low:high], is_square=self._is_square
        )[offset - low * FP8_BLOCK :][: min(stop, coded) - offset]
        return found if stop <= coded else torch.cat((found, super().read(0, stop - coded)))

    def write(self, offset: int, values: torch.Tensor) -> None:
        """See `Buffer`."""
        self._store(offset, values, None)

    def update(self, offset: int, values: torch.Tensor, key: int) -> None:
        """See `Buffer`; begins with a block, and ends with one or with a parameter."""
        self._store(offset, values, key)

    def _store(self, offset: int, values: torch.Tensor, key: int | None) -> None:
        coded = self.flat.boundary
        inside = min(max(coded - offset, 0), len(values))
        if inside < len(values):
            super().write(max(offset - coded, 0), values[inside:])
        if not inside:
            return
        low, high = offset // FP8_BLOCK * FP8_BLOCK, round_up(offset + inside, FP8_BLOCK)
        whole = values[:inside].to(self._codes.device, torch.float32)
        if (low, high) != (offset, offset + inside):
            around = self.read(low, high - low).clone()
            around[offset - low : offset - low + inside] = whole
            whole = around
        places = None if key is None else self._places(low, high)
        codes, exponents = to_fp8(whole, places, key or 0, is_square=self._is_square)
        self._codes[low:high] = codes
        self._exponents[low // FP8_BLOCK : high // FP8_BLOCK] = exponents

    def _places(self, low: int, high: int) -> torch.Tensor:
        """Which elements of the space are at low..high of the buffer, int64; 0 where none is."""
        places = torch.zeros(high - low, dtype=torch.int64, device=self._codes.device)
        for start, stop in self.flat.cut(low, high):
            for first, place, length in self.flat.locate(start, stop):
                places[place - low : place - low + length] = torch.arange(
                    first, first + length, device=self._codes.device
                )
        return places

    def zero(self) -> None:
        """See `Buffer`."""
        super().zero()
        self._codes.zero_()
        self._exponents.zero_()


def make_buffer(flat: FlatRanges, state: str, device: torch.device, *, is_square: bool) -> Buffer:
    """One for a moment, zeros, stored as a job's `optimizer.state` says."""
    if state == "fp8":
        return Fp8Buffer(flat, device, is_square=is_square)
    dtype = torch.bfloat16 if state == "bf16" else torch.float32
    return Buffer(flat, torch.zeros(flat.size, dtype=dtype, device=device))


def kept_of(flat: FlatRanges, space: Space) -> FlatRanges:
    """Those elements of flat ranges that a kind of state has which is kept for the slots of `space`."""
    ranges = [
        (start, start + length)
        for slot in space.slots
        for start, _, length in flat.locate(slot.offset, slot.stop)
    ]  # fmt: skip
    return FlatRanges.of(ranges, space.boundary)


def part_of_span(space: Space, span: Span) -> FlatRanges:
    """How a message has the elements of a span that a kind of state has which is kept for the slots of `space`."""
    ranges = [
        (max(slot.offset, span.start), min(slot.stop, span.stop)) for slot in space.overlapping(span.start, span.stop)
    ]
    return FlatRanges.dense(ranges)


def whole_of_span(span: Span) -> FlatRanges:
    """The same of a kind that is kept for every element."""
    return FlatRanges.dense([(span.start, span.stop)])


Spaces = Mapping[str, Space]
"""By kind of state: the space with the shapes that it has, which is the model's own where those are the parameters'."""
assert FP8_BLOCK == ALIGNMENT, "no layout divides a block of matrices whose rows are multiples of it"
