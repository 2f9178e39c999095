"""Which elements of a buffer are coded, and in which blocks.

Blocks are cut from the beginning of every matrix. Vectors, which are few and matter most, are sent as they are, and so
is what a model uses twice: its two gradients are summed apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from strategies.layout.space import FlatRanges, Slot, Space
from strategies.wire.codecs import WORD, Codec


class _Run(NamedTuple):
    """Elements start..stop of a buffer, in blocks from number `block` on; only the last of these may not be full."""

    start: int
    stop: int
    block: int


class Blocks:
    """The blocks of `size` elements each of some runs of a buffer, in order, and its other elements. `num_blocks` and
    `num_plain` are how many there are of either."""

    def __init__(self, coded: Iterable[tuple[int, int]], size: int, length: int) -> None:
        self.size = size
        self.length = length
        self._runs: list[_Run] = []
        block = at = 0
        self._plain: list[tuple[int, int]] = []
        for start, stop in coded:
            last = self._runs[-1] if self._runs else None
            if last is not None and last.stop == start and (last.stop - last.start) % size == 0:
                self._runs[-1] = _Run(last.start, stop, last.block)
            else:
                self._runs.append(_Run(start, stop, block))
            if at < start:
                self._plain.append((at, start))
            block, at = block + -(-(stop - start) // size), stop
        if at < length:
            self._plain.append((at, length))
        self.num_blocks = block
        self.num_plain = sum(stop - start for start, stop in self._plain)

    @classmethod
    def of(cls, space: Space, flat: FlatRanges, size: int, length: int | None = None) -> Blocks:
        """Of a buffer of these ranges of the state, and what is behind them up to `length`."""
        coded = []
        for slot in space.slots:
            if is_coded(space, slot):
                coded += [(offset, offset + count) for _, offset, count in flat.locate(slot.offset, slot.stop)]
        return cls(coded, size, flat.size if length is None else length)

    def cut(self, start: int, stop: int) -> Blocks:
        """Of elements start..stop of the buffer, which no block lies across."""
        coded = [(max(r.start, start) - start, min(r.stop, stop) - start) for r in self._runs]
        return Blocks([(low, high) for low, high in coded if low < high], self.size, stop - start)

    def numbers(self, start: int, stop: int) -> tuple[int, int]:
        """The first and, excluded, the last of the blocks that lie in elements start..stop."""
        inside = [run for run in self._runs if max(run.start, start) < min(run.stop, stop)]
        if not inside:
            return 0, 0
        first, last = inside[0], inside[-1]
        full, begun = divmod(min(last.stop, stop) - last.start, self.size)
        return first.block + (max(first.start, start) - first.start) // self.size, last.block + full + (begun > 0)

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """The blocks [num_blocks, size] of `values` [length], filled up with zeros; a view where they lie so."""
        if len(self._runs) == 1 and (self._runs[0].stop - self._runs[0].start) % self.size == 0:
            return values[self._runs[0].start : self._runs[0].stop].view(-1, self.size)
        found = values.new_zeros((self.num_blocks, self.size))
        for start, stop, block in self._runs:
            found.view(-1)[block * self.size : block * self.size + stop - start] = values[start:stop]
        return found

    def put(self, blocks: torch.Tensor, values: torch.Tensor) -> None:
        """The reverse."""
        for start, stop, block in self._runs:
            values[start:stop] = blocks.reshape(-1)[block * self.size : block * self.size + stop - start]

    def plain(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Views of the elements that are in no block."""
        return [values[start:stop] for start, stop in self._plain]

    def clear_plain(self, values: torch.Tensor) -> None:
        """Zeros in their place."""
        for part in self.plain(values):
            part.zero_()

    def num_words(self, codec: Codec | None) -> int:
        """Of 4 bytes, that the whole buffer takes on the wire: of its codes, or as it is."""
        return self.length if codec is None else self.num_blocks * codec.words + self.num_plain


def is_coded(space: Space, slot: Slot) -> bool:
    """Whether sums of its gradient are coded."""
    return slot.decays and all(alias.slot.name != slot.name for alias in space.aliases)


def to_message(blocks: Blocks, codes: torch.Tensor | None, values: torch.Tensor) -> list[torch.Tensor]:
    """What is sent of a buffer, as parts of int32: its `codes` [num_blocks, words], and of `values` fp32 [length] those
    that are in no block; or all of them, where there are no codes."""
    if codes is None:
        return [values.view(torch.int32)]
    return [codes.reshape(-1), *(part.view(torch.int32) for part in blocks.plain(values))]


def from_message(
    blocks: Blocks, codec: Codec | None, message: torch.Tensor, values: torch.Tensor
) -> torch.Tensor | None:
    """Fills `values` [length] with what a message int32 says, and returns its codes; without a codec it is values."""
    if codec is None:
        values.view(torch.int32).copy_(message)
        return None
    codes = message[: blocks.num_blocks * codec.words].view(-1, codec.words)
    blocks.put(codec.decode(codes), values)
    at = codes.numel()
    for part in blocks.plain(values):
        part.view(torch.int32).copy_(message[at : at + len(part)])
        at += len(part)
    return codes


def coded_bytes(blocks: Sequence[Blocks], codec: Codec) -> int:
    """That these take on the wire."""
    return WORD * sum(each.num_words(codec) for each in blocks)
