"""Virtual workers of even cost from samples of uneven lengths."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.compose import Composer, deal
from orchestrator.data.packing import cut
from tests.unit.test_packing import functions_of_the_standard_library


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(2, 5000), min_size=1, max_size=50),
    st.sampled_from([1, 2, 3]), st.integers(1, 7), st.integers(1, 4), st.randoms(use_true_random=False),
)  # fmt: skip
def test_a_step_keeps_its_samples_and_every_virtual_worker_its_number(
    lengths: list[int], micro_batch: int, virtual_workers: int, micro_batches: int, rng: random.Random
) -> None:
    composer = Composer(np.array(lengths), micro_batch, virtual_workers, 100)
    batch = micro_batch * virtual_workers * micro_batches
    ids = np.array([rng.randrange(len(lengths)) for _ in range(batch)])
    composed = composer.compose(ids)
    assert sorted(composed.ids) == sorted(ids)
    assert composed.widths.shape == (virtual_workers, micro_batches)
    positions = np.array(lengths)[composed.ids].reshape(virtual_workers, micro_batches, micro_batch) - 1
    assert (positions.max(axis=2) == composed.widths).all(), "a micro-batch is as wide as its longest"
    costs = micro_batch * (composed.widths * (100 + composed.widths)).sum(axis=1)
    assert composed.costs == tuple(costs.tolist())
    again = composer.compose(ids)
    assert (again.ids == composed.ids).all()


def test_micro_batches_are_of_similar_lengths() -> None:
    lengths = np.array([900, 10, 11, 880, 300, 12, 13, 310])
    composed = Composer(lengths, 2, 2, 50).compose(np.arange(8))
    assert sorted(composed.widths.ravel()) == [10, 12, 309, 899]


def longest_of_runs(costs: tuple[int, ...], ranks: int) -> float:
    """The cost of the dearest of `ranks` runs of virtual workers, in units of the mean."""
    held = np.array_split(np.array(costs), ranks)
    return float(max(part.sum() for part in held) / (sum(costs) / ranks))


@pytest.mark.parametrize("length", [512, 1024, 2048])
def test_ranks_are_even_on_functions_of_the_standard_library(length: int) -> None:
    """The dearest of four ranks against their mean; as the shuffle deals them they are far from it."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    lengths = cut(functions_of_the_standard_library(), length + 1).lengths
    composer = Composer(lengths, 1, 16, 12 * 256)
    composed, shuffled = [], []
    for _ in range(100):
        ids = rng.choice(len(lengths), 64, replace=False)
        step = composer.compose(ids)
        composed.append(longest_of_runs(step.costs, 4))
        shuffled.append(longest_of_runs(tuple(composer.cost(lengths[ids] - 1).tolist()), 4))
        assert longest_of_runs(step.costs, 2) <= 1.05
    print(f"composed: worst {max(composed):.4f}; shuffled: mean {np.mean(shuffled):.3f}, worst {max(shuffled):.3f}")
    assert max(composed) <= 1.05
    assert np.mean(shuffled) > 1.1


def test_a_deal_is_close_to_the_best_there_is() -> None:
    """Against all deals of a few items into two groups of four."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(30):
        costs = [int(rng.lognormvariate(6, 1)) for _ in range(8)]
        groups = deal(costs, [4, 4])
        assert sorted(groups[0] + groups[1]) == list(range(8))
        best = min(max(sum(half), sum(costs) - sum(half)) for half in itertools.combinations(costs, 4))
        assert max(sum(costs[item] for item in group) for group in groups) <= 1.15 * best


def test_groups_of_different_sizes_are_even_for_their_sizes() -> None:
    costs = [10] * 9
    assert [len(group) for group in deal(costs, [6, 3])] == [6, 3]
    costs = [9, 8, 7, 6, 5, 4, 3, 2, 1]
    large, _ = deal(costs, [6, 3])
    assert abs(sum(costs[item] for item in large) - 30) <= 1
