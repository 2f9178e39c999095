"""The norm: right, and the same however the gradient is cut up."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.reduction.norm import LIMIT, WORDS, _at_once, from_words, norm_of, square_sum, to_words


def exact(values: torch.Tensor) -> float:
    return math.sqrt(sum(Fraction(float(value)) ** 2 for value in values))


def gradient(seed: int, size: int, scale: float) -> torch.Tensor:
    """Of very different magnitudes, as gradients are."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator) * scale
    return values * 10.0 ** torch.randint(-6, 1, (size,), generator=generator)


@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 20_000),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e3, 1e6]),
    cuts=st.lists(st.integers(0, 20_000), max_size=8),
)
@settings(deadline=None, max_examples=60)
def test_the_sum_does_not_depend_on_how_the_gradient_is_cut(
    seed: int, size: int, scale: float, cuts: list[int]
) -> None:
    values = gradient(seed, size, scale)
    whole = square_sum(values)
    assert whole is not None
    bounds = [0, *sorted(min(cut, size) for cut in cuts), size]
    parts = [values[start:stop].clone() for start, stop in pairwise(bounds)]
    sums = [square_sum(part) for part in reversed(parts)]
    assert sum(part for part in sums if part is not None) == whole
    assert square_sum(values[torch.randperm(size)]) == whole
    assert norm_of(sums) == norm_of([whole])
    assert norm_of(from_words(to_words(part)) for part in sums) == norm_of([whole])


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e8, math.inf, math.nan])
@pytest.mark.parametrize("size", [1, 4095, 4097, 70_000, 1024 * 4096 + 5])
def test_the_sum_of_a_device_that_nobody_waits_for_is_the_same(scale: float, size: int) -> None:
    values = gradient(2, size, scale)
    others = [values[: size // 3], values[:0], values[size // 3 :]]
    assert _at_once(others) == square_sum(*others) == square_sum(values)
    assert (square_sum(values) is None) == (not values.abs().max() < LIMIT)


def test_no_gradient_has_no_sum() -> None:
    assert square_sum() == _at_once([]) == _at_once([torch.empty(0)]) == 0


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_the_norm_is_that_of_exact_arithmetic(scale: float) -> None:
    values = gradient(1, 5000, scale)
    assert norm_of([square_sum(values)]) == pytest.approx(exact(values), rel=1e-9)


def test_elements_just_below_the_limit_are_added_exactly() -> None:
    values = torch.full((100_000,), LIMIT * (1 - 2.0**-24))
    expected = 100_000 * int(float(values[0]) ** 2) << 70
    assert square_sum(values) == expected
    assert from_words(to_words(expected)) == expected


def test_nothing_has_no_norm() -> None:
    assert square_sum(torch.empty(0)) == 0
    assert norm_of([]) == 0.0
    assert norm_of([square_sum(torch.zeros(5000))]) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, LIMIT, -2 * LIMIT])
@pytest.mark.parametrize("place", [0, 7777, 99_999])
def test_a_norm_with_anything_not_finite_is_not_finite(bad: float, place: int) -> None:
    values = torch.ones(100_000)
    values[place] = bad
    assert square_sum(values) is None
    assert to_words(None) == [-1] * WORDS
    assert math.isnan(norm_of([1, from_words(to_words(square_sum(values))), 2]))


@given(st.integers(0, 2 ** (62 * WORDS) - 1))
def test_words_carry_every_sum(total: int) -> None:
    words = to_words(total)
    assert all(0 <= word < 2**63 for word in words)
    assert from_words(words) == total


def test_a_sum_too_large_for_its_words_is_not_finite() -> None:
    assert from_words(to_words(2 ** (62 * WORDS))) is None
