"""An objective that another package brings trains in every layout, and gives one rank's bits in all of them."""

from __future__ import annotations

import functools

import pytest

from strategies.layout.parallel import ParallelLayout
from tests.plugin_package.example_plugin.remainder import REMAINDER
from tests.ranks.laid_out import Stretch, Trained, layout_of, train
from tests.ranks.local_ranks import run_ranks
from tests.ranks.test_layouts import Numbers, assert_all_give, expected
from tests.selection import nightly

SPLIT = [layout_of(1, 2, 2), layout_of(2, 1, 2, "parameters")]


@functools.cache
def alone(tensor: int = 1, model: str = "llama") -> Numbers:
    """What the smallest group of ranks computes."""
    objective = functools.partial(train, objective=REMAINDER, model=model)
    seen: Trained = run_ranks(tensor, objective, [Stretch(layout_of(tensor=tensor), 2)])[0]
    return seen.losses, seen.norms, seen.digest


@pytest.mark.parametrize(
    "layouts",
    [
        [layout_of(3), layout_of(2, shard="parameters"), layout_of(2, 2, shard="gradients", schedule="zero-bubble")],
        *nightly([[layout_of(1, 2), layout_of(2, 2, shard="parameters"), layout_of(3, shard="optimizer")]]),
    ],
    ids=["three", "more"],
)
def test_an_objective_of_another_package_is_one_ranks_in_every_layout(layouts: list[ParallelLayout]) -> None:
    assert alone()[0] != expected()[0], "it is another objective"
    assert_all_give(alone(), layouts, objective=REMAINDER)


@pytest.mark.parametrize("model", ["own", *nightly(["llama"])])
def test_an_objective_of_another_package_in_tensor_parallel_groups(model: str) -> None:
    assert_all_give(alone(2, model), SPLIT, objective=REMAINDER, model=model)
