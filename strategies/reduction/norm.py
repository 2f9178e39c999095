"""The norm of a gradient, the same to the last bit however the gradient is cut up and added.

Squares of fp32 values are exact in fp64. Each is rounded, by itself, to a multiple of 2^-70, and those multiples are
added as integers, so that the sum does not depend on any order: slices of ranks, stages of a pipeline and shards of a
tensor may be cut anywhere. Rounding to a multiple of u is done with one addition and one subtraction of 1.5 * 2^52 * u
(the pre-rounding of Demmel & Nguyen, "Fast Reproducible Floating-Point Summation", 2013), in up to three stages, so
that every intermediate sum fits the 53 bits of fp64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

LIMIT = 2.0**24
"""A gradient with an element this large is taken to be not finite; its squares would not be added exactly."""

_UNITS = (2.0**10, 2.0**-30, 2.0**-70)
_SCALE_BITS = 70
_ROW = 4096
"""The sum over a row is exact in fp64: each stage leaves at most 2^40 units per element."""
_ROWS_AT_ONCE = {"cpu": 16, "cuda": 1024}
"""Few enough to stay in a processor's cache; and in any case for their sum in int64."""
_WORD_BITS = 62
WORDS = 3
"""A sum of squares as machine words: enough for 2^40 elements."""


def square_sum(values: torch.Tensor) -> int | None:
    """The sum of squares of `values` fp32 [n] in units of 2^-70; None when it is not finite.

    What is below 2^-35 in magnitude counts as nothing.
    """
    total = 0
    if not values.numel():
        return total
    for part in values.detach().split(_ROW * _ROWS_AT_ONCE.get(values.device.type, 16)):
        largest = float(part.abs().max())
        if not largest < LIMIT:
            return None
        rest = part.double()
        rest.mul_(rest)
        if len(rest) > _ROW and len(rest) % _ROW:
            rest = torch.nn.functional.pad(rest, (0, -len(rest) % _ROW))
        rows = rest.view(-1, min(_ROW, len(rest)))
        square = largest * largest
        for unit in _UNITS:
            if square < unit / 2:
                continue  # All would be rounded to zero.
            magic = 1.5 * 2.0**52 * unit
            rounded = (rows + magic).sub_(magic)
            shift = _SCALE_BITS + round(math.log2(unit))
            total += int(rounded.sum(dim=1).div_(unit).to(torch.int64).sum()) << shift
            rows.sub_(rounded)
            square = unit / 2
    return total


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
