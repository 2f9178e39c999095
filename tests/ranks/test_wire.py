"""Sums that are rounded on their way have the same bits in every layout, and what is rounded off is not lost."""

from __future__ import annotations

from functools import cache

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
    layout = layout_of(tensor=tensor)
    seen: Trained = run_ranks(tensor, lambda *a: train(*a, wire=FORMATS[name], model=model), [Stretch(layout, steps)])[
        0
    ]
    return as_numbers(seen)  # type: ignore[return-value]


@pytest.mark.parametrize("name", FORMATS)
def test_every_layout_gives_one_ranks_bits(name: str) -> None:
    assert alone(name)[0][0] == expected()[0][0], "the first step reads the same weights"
    assert alone(name)[2] != expected()[2], "and what it sends is rounded"
    layouts = [layout_of(2), layout_of(3), layout_of(2, shard="optimizer"), layout_of(1, 2)]
    if FORMATS[name].across == 1:
        layouts.append(layout_of(3, shard="gradients"))
    assert_all_give(alone(name), layouts, wire=FORMATS[name])
