"""The parallel layout: who is where, what each has, and errors that name every operand."""

from __future__ import annotations

import pickle
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.layout.assignment import deal, deal_in_turn, even
from strategies.layout.parallel import Coordinates, ParallelLayout
from strategies.layout.schedule import SCHEDULES, parts_of
from strategies.reduction.tree import cover

quick = settings(deadline=None, print_blob=True, max_examples=200)


def cut(parts: int) -> tuple[tuple[int, int], ...]:
    """Model parts of two blocks each."""
    return tuple((2 * part, 2 * part + 2) for part in range(parts))


# ---------------------------------------------------------------------------------------- what fits


@quick
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(0, 6))
def test_the_data_degree_is_what_is_left_over(tensor: int, pipeline: int, data: int, more: int) -> None:
    shares = data + more
    layout = ParallelLayout.fit(
        tensor * pipeline * data, shares, tensor=tensor, pipeline=pipeline, shard="optimizer", parts=cut(pipeline)
    )
    assert layout.describe() == {"data": data, "tensor": tensor, "pipeline": pipeline, "shard": "optimizer"}
    assert layout.world_size == layout.num_placed == tensor * pipeline * data
    assert layout.assignment == deal(shares, [1.0] * data)
    assert layout.virtual_workers == shares
    assert pickle.loads(pickle.dumps(layout)) == layout


@pytest.mark.parametrize(
    ("ranks", "degrees", "expected"),
    [
        (
            7, {"tensor": 2, "pipeline": 2},
            "data x tensor 2 x pipeline 2 must be 7 ranks, but 7 is no multiple of 2 x 2 = 4; 4 or 8 ranks would fit",
        ),
        (
            2, {"tensor": 4},
            "data x tensor 4 x pipeline 1 must be 2 ranks, but 2 is no multiple of 4 x 1 = 4; 4 ranks would fit",
        ),
        (
            20, {"tensor": 2},
            "data 20 / (2 x 1) = 10 is more than the 8 virtual workers, which are not divided; at most 16 ranks would "
            "have work",
        ),
    ],
)  # fmt: skip
def test_ranks_that_do_not_fit_are_refused_with_every_operand(
    ranks: int, degrees: dict[str, int], expected: str
) -> None:
    with pytest.raises(ValueError) as caught:
        ParallelLayout.fit(ranks, 8, **degrees)  # type: ignore[arg-type]
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"data": 0, "assignment": ()},
            "degrees must be at least 1 and spares at least 0, got {'data': 0,",
        ),
        ({"spares": -1}, "spares -1"),
        ({"shard": "weights"}, "unknown shard 'weights' or schedule '1f1b'; known are shards none, optimizer"),
        ({"schedule": "1f2b"}, "unknown shard 'none' or schedule '1f2b'"),
        ({"data": 2}, "data 2 replicas, but 1 are dealt work"),
        ({"assignment": ((0, 2),)}, r"must be dealt exactly once each, got ((0, 2),)"),
        ({"assignment": ((1, 0),)}, r"must ascend, got ((1, 0),)"),
        ({"assignment": ((),)}, r"must be dealt exactly once each, got ((),)"),
        ({"pipeline": 2}, "pipeline 2 needs a multiple of that many model parts, got ()"),
        ({"pipeline": 2, "parts": cut(3)}, "pipeline 2 needs a multiple of that many model parts, got ((0, 2), (2, 4)"),
        ({"pipeline": 2, "parts": ((0, 2), (3, 4))}, "must follow one another from block 0, got ((0, 2), (3, 4))"),
        ({"pipeline": 2, "parts": ((1, 2), (2, 4))}, "must follow one another from block 0, got ((1, 2), (2, 4))"),
        ({"pipeline": 2, "parts": ((0, 2), (2, 2))}, "every model part needs a block, got ((0, 2), (2, 2))"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_what_was_given(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        ParallelLayout(**{"data": 1, "assignment": ((0, 1),), **fields})
    assert expected in str(caught.value)


# ---------------------------------------------------------------------------------------- places


@quick
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2))
def test_places_and_ranks_are_inverse_and_planes_partition_the_ranks(
    tensor: int, pipeline: int, data: int, spares: int
) -> None:
    layout = ParallelLayout(data, deal(data, [1.0] * data), tensor, pipeline, parts=cut(pipeline), spares=spares)
    places = [layout.place(rank) for rank in range(layout.world_size)]
    placed = [place for place in places if place is not None]
    assert places[len(placed) :] == [None] * spares
    assert [layout.rank_of(*place) for place in placed] == list(range(layout.num_placed))
    assert len(set(placed)) == data * tensor * pipeline
    for rank, place in enumerate(placed):
        data_group = layout.data_group(rank)
        assert rank in data_group
        assert [layout.place(other) for other in data_group] == [
            Coordinates(replica, place.stage, place.tensor) for replica in range(data)
        ]
    for rank in (-1, layout.world_size):
        with pytest.raises(ValueError, match=f"rank {rank} is not one of {layout.world_size}"):
            layout.place(rank)


def test_neighbours_are_a_tensor_parallel_group_and_then_the_stages_of_a_pipeline() -> None:
    layout = ParallelLayout.fit(8, 4, tensor=2, pipeline=2, parts=cut(2))
    assert [layout.place(rank) for rank in range(4)] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert layout.data_group(1) == (1, 5)


# ---------------------------------------------------------------------------------------- parts of the model


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pipeline", [2, 3, 4])
def test_every_block_is_on_exactly_one_stage(schedule: str, pipeline: int) -> None:
    chunks = 2 if schedule in ("interleaved-1f1b", "zero-bubble") else 1
    parts = cut(pipeline * chunks)
    layout = ParallelLayout(1, ((0,),), 1, pipeline, schedule=schedule, parts=parts)
    stages = [layout.blocks_of(stage) or () for stage in range(pipeline)]
    assert all(len(runs) == chunks for runs in stages)
    assert sorted(run for runs in stages for run in runs) == list(parts)
    assert all(list(runs) == sorted(runs) for runs in stages)


def test_parts_are_dealt_as_each_schedule_says() -> None:
    assert [parts_of("1f1b", 3, 3, stage) for stage in range(3)] == [(0,), (1,), (2,)]
    assert [parts_of("interleaved-1f1b", 2, 4, stage) for stage in range(2)] == [(0, 2), (1, 3)]
    assert [parts_of("zero-bubble", 2, 4, stage) for stage in range(2)] == [(0, 3), (1, 2)]
    assert all(ParallelLayout(1, ((0,),), schedule=schedule).blocks_of(0) is None for schedule in SCHEDULES)


# ---------------------------------------------------------------------------------------- dealing


@quick
@given(st.integers(1, 40), st.integers(1, 40))
def test_dealing_in_turn_gives_everybody_as_much_as_dealing_runs(virtual_workers: int, replicas: int) -> None:
    in_turn, runs = deal_in_turn(virtual_workers, replicas), deal(virtual_workers, [1.0] * replicas)
    assert [len(held) for held in in_turn] == [len(held) for held in runs]
    ParallelLayout(replicas, in_turn)
    for held in in_turn:
        assert all(b - a == replicas for a, b in pairwise(held))
    if replicas > 1:
        assert all(len(cover(held, (0, virtual_workers))) == len(held) for held in in_turn), "no two are neighbours"


def test_nobody_to_deal_to_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot deal to 0 replicas"):
        deal_in_turn(8, 0)


@quick
@given(st.integers(0, 300), st.integers(1, 12), st.integers(1, 16))
def test_even_sizes_differ_by_at_most_the_multiple(total: int, parts: int, multiple: int) -> None:
    sizes = even(total, parts, multiple)
    assert (sum(sizes), len(sizes)) == (total, parts)
    assert min(sizes) >= 0
    assert all(size % multiple == 0 for size in sizes[:-1])
    assert max(sizes) - min(sizes) <= multiple
