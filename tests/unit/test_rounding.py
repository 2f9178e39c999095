"""Moments in bf16: rounded at random, by place and update, so that the mean is right and the bits are the same
everywhere."""

from __future__ import annotations

import pytest
import torch

from strategies.optim.rounding import round_to_bf16


def neighbours(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values in bf16 next to each, towards zero and away from it."""
    bits = values.view(torch.int32)
    low = (bits & ~0xFFFF).view(torch.float32)
    high = ((bits & ~0xFFFF) + 0x10000).view(torch.float32)
    return low, high


def test_a_value_becomes_one_of_its_neighbours_and_what_bf16_has_stays() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(1)) * torch.logspace(-30, 30, 10_000)
    found = round_to_bf16(values, 0, 1).float()
    low, high = neighbours(values)
    assert bool(((found == low) | (found == high)).all())
    assert 0.4 < float((found == high).float().mean()) < 0.6
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-126, torch.inf, -torch.inf])
    assert torch.equal(round_to_bf16(exact, 0, 1).float(), exact)
    assert round_to_bf16(torch.tensor([torch.nan]), 0, 1).isnan().all()


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_the_mean_of_the_draws_is_the_value(part: float) -> None:
    step = 2.0**-7
    values = torch.full((200_000,), 1.0 + part * step)
    for key in (1, 1 << 40):
        found = round_to_bf16(values, 12_345, key).float()
        assert float((found > 1.0).float().mean()) == pytest.approx(part, abs=0.01)
        # Neighbouring places draw apart from each other.
        up = (found > 1.0).float() - part
        assert abs(float((up[1:] * up[:-1]).mean())) < 0.005


def test_draws_depend_on_place_and_key_and_on_nothing_else() -> None:
    values = torch.randn(5_000, generator=torch.Generator().manual_seed(2))
    whole = round_to_bf16(values, 700, 9)
    assert torch.equal(torch.cat([round_to_bf16(values[:33], 700, 9), round_to_bf16(values[33:], 733, 9)]), whole)
    for other in (
        round_to_bf16(values, 701, 9),
        round_to_bf16(values, 700, 10),
        round_to_bf16(values, 700 + (1 << 33), 9),
    ):
        assert 0.3 < float((other != whole).float().mean()) < 0.7
