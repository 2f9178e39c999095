"""Sums that are rounded on their way have the same bits in every layout, and what is rounded off is not lost."""

from __future__ import annotations

from functools import cache, partial

import pytest

from strategies.wire.format import WireFormat
from tests.ranks.laid_out import Stretch, Trained, as_numbers, layout_of, train
from tests.ranks.local_ranks import run_ranks
from tests.ranks.test_layouts import Numbers, assert_all_give, expected

FORMATS = {
    "bf16": WireFormat("bf16"),
    "int8": WireFormat("int8"),
    "int8 with feedback": WireFormat("int8", feedback=True),
    "int4": WireFormat("int4", feedback=True),
    "top 5 %": WireFormat("top_k", fraction=0.05, feedback=True),
    "int4 of pairs": WireFormat("int4", feedback=True, across=2),
}


@cache
def alone(name: str, steps: int = 2, tensor: int = 1, model: str = "llama") -> Numbers:
    """What the smallest group of ranks computes."""
    program = partial(train, wire=FORMATS[name], model=model)
    seen: Trained = run_ranks(tensor, program, [Stretch(layout_of(tensor=tensor), steps)])[0]
    return as_numbers(seen)  # type: ignore[return-value]


@pytest.mark.parametrize("name", FORMATS)
def test_every_layout_gives_one_ranks_bits(name: str) -> None:
    assert alone(name)[0][0] == expected()[0][0], "the first step reads the same weights"
    assert alone(name)[2] != expected()[2], "and what it sends is rounded"
    layouts = [layout_of(2), layout_of(3), layout_of(2, shard="optimizer"), layout_of(1, 2)]
    if FORMATS[name].across == 1:
        layouts.append(layout_of(3, shard="gradients"))
    assert_all_give(alone(name), layouts, wire=FORMATS[name])


def test_tensor_parallel_groups_give_the_bits_of_one() -> None:
    layouts = [layout_of(2, 1, 2), layout_of(1, 2, 2)]
    assert_all_give(alone("int4", tensor=2, model="own"), layouts, wire=FORMATS["int4"], model="own")


def test_a_head_that_is_the_embedding_is_sent_as_it_is_and_the_bits_are_the_same() -> None:
    layouts = [layout_of(2), layout_of(2, 2), layout_of(3, shard="optimizer"), layout_of(2, shard="gradients")]
    assert_all_give(alone("int4", model="tied"), layouts, wire=FORMATS["int4"], model="tied")


STRETCHES = [
    Stretch(layout_of(3), 2, (0, 1, 2)),
    Stretch(layout_of(2), 1, (0, 2)),  # one is lost
    Stretch(layout_of(1, 2), 1, (3, 0)),  # and another, while one that has nothing joins
    Stretch(layout_of(2, shard="optimizer"), 1, (3, 0)),
    Stretch(layout_of(3, shard="gradients"), 1, (1, 3, 0)),
    Stretch(layout_of(1, 2), 1, (3, 1)),
]


@pytest.mark.parametrize("name", ["int4", "top 5 %"])
def test_what_was_rounded_off_moves_with_the_work_and_outlives_who_had_it(name: str) -> None:
    """There are two copies of everything; each stretch begins without one of those that had it."""
    one = alone(name, sum(stretch.steps for stretch in STRETCHES))
    seen = run_ranks(4, partial(train, wire=FORMATS[name]), STRETCHES)
    assert seen[3].digest == one[2]
    assert seen[0].losses + seen[3].losses[-1:] == one[0]
