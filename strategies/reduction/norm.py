"""The norm of a gradient, the same to the last bit however the gradient is cut up and added.

Squares of fp32 values are exact in fp64. Each is rounded, by itself, to a multiple of 2^-70, and those multiples are
added as integers, so that the sum does not depend on any order: slices of ranks, stages of a pipeline and shards of a
tensor may be cut anywhere. Rounding to a multiple of u is done with one addition and one subtraction of 1.5 * 2^52 * u
(the pre-rounding of Demmel & Nguyen, "Fast Reproducible Floating-Point Summation", 2013), in up to three stages, so
that every intermediate sum fits the 53 bits of fp64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

LIMIT = 2.0**24
"""A gradient with an element this large is taken to be not finite; its squares would not be added exactly."""

_UNITS = (2.0**10, 2.0**-30, 2.0**-70)
_SCALE_BITS = 70
_ROW = 4096
"""The sum over a row is exact in fp64: each stage leaves at most 2^40 units per element."""
_ROWS_ON_HOST = 16
"""Few enough to stay in a processor's cache."""
_ROWS_ON_DEVICE = 4096
"""Enough to keep a device busy: 16.8M elements, which take 400 MB as they are added."""
_ROWS_OF_SUM = 1024
"""The sums of this many rows can be added in int64."""
_WORD_BITS = 62
WORDS = 3
"""A sum of squares as machine words: enough for 2^40 elements."""


def square_sum(*tensors: torch.Tensor) -> int | None:
    """The sum of squares of all `tensors` fp32 [n] in units of 2^-70; None when it is not finite.

    What is below 2^-35 in magnitude counts as nothing. On a device other than a CPU nobody waits but for the result.
    """
    on_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    on_device = [tensor for tensor in tensors if tensor.device.type != "cpu"]
    total = 0
    for sums in (_one_by_one(on_host), _at_once(on_device)):
        if sums is None:
            return None
        total += sums
    return total


def _one_by_one(tensors: Iterable[torch.Tensor]) -> int | None:
    """Leaves out what would be rounded to zero."""
    total = 0
    for part in _parts_of(tensors, _ROWS_ON_HOST):
        largest = float(part.abs().max())
        if not largest < LIMIT:
            return None
        rows, square = _squares(part), largest * largest
        for unit in _UNITS:
            if square < unit / 2:
                continue  # All would be rounded to zero.
            total += int(_take(rows, unit).sum()) << _shift(unit)
            square = unit / 2
    return total


def _at_once(tensors: Iterable[torch.Tensor]) -> int | None:
    """Asks nothing of the device until all is computed, and then once."""
    sums: list[torch.Tensor] = []
    shifts: list[int] = []
    fine: list[torch.Tensor] = []
    for part in _parts_of(tensors, _ROWS_ON_DEVICE):
        fine.append((part.abs().max() < LIMIT).view(1))
        rows = _squares(part)
        for unit in _UNITS:
            units = _take(rows, unit)
            units = torch.nn.functional.pad(units, (0, -len(units) % _ROWS_OF_SUM)).view(-1, _ROWS_OF_SUM).sum(dim=1)
            sums.append(units)
            shifts += [_shift(unit)] * len(units)
    if not sums:
        return 0
    told = torch.cat([torch.cat(fine).all().to(torch.int64).view(1), *sums]).tolist()
    return sum(units << shift for units, shift in zip(told[1:], shifts, strict=True)) if told[0] else None


def _parts_of(tensors: Iterable[torch.Tensor], rows: int) -> Iterator[torch.Tensor]:
    for tensor in tensors:
        if tensor.numel():
            yield from tensor.detach().split(_ROW * rows)


def _squares(part: torch.Tensor) -> torch.Tensor:
    """The squares fp64 [rows, up to _ROW] of `part` fp32 [n]."""
    rest = part.double()
    rest.mul_(rest)
    if len(rest) > _ROW and len(rest) % _ROW:
        rest = torch.nn.functional.pad(rest, (0, -len(rest) % _ROW))
    return rest.view(-1, min(_ROW, len(rest)))


def _take(rows: torch.Tensor, unit: float) -> torch.Tensor:
    """Takes out of `rows` what they have in multiples of `unit`; how many those are in each row, int64 [rows]."""
    magic = 1.5 * 2.0**52 * unit
    rounded = (rows + magic).sub_(magic)
    rows.sub_(rounded)
    return rounded.sum(dim=1).div_(unit).to(torch.int64)


def _shift(unit: float) -> int:
    return _SCALE_BITS + round(math.log2(unit))


def to_words(total: int | None) -> list[int]:
    """A sum of squares as WORDS int64 values, lowest first; all -1 when it is not finite."""
    if total is None or total >> (WORDS * _WORD_BITS):
        return [-1] * WORDS
    return [total >> (_WORD_BITS * word) & (1 << _WORD_BITS) - 1 for word in range(WORDS)]


def from_words(words: Iterable[int]) -> int | None:
    """The inverse of `to_words`."""
    parts = list(words)
    if any(part < 0 for part in parts):
        return None
    return sum(part << (_WORD_BITS * word) for word, part in enumerate(parts))


def norm_of(sums: Iterable[int | None]) -> float:
    """The 2-norm from the sums of squares of all parts; NaN when any of them is not finite."""
    total = 0
    for part in sums:
        if part is None:
            return math.nan
        total += part
    return math.sqrt(total) * 2.0 ** (-_SCALE_BITS // 2)
