"""Spans of flat state as boxes of full tensors, and back, between any two layouts and tensor degrees."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.layout.space import FlatRanges, Space
from strategies.layout.statemap import NOTHING, Span, Spans, share_out, subtract, union, whole
from strategies.optim.spec import OptimizerSpec
from strategies.state.chunk_loader import ChunkLoader
from strategies.state.chunks import Box, full_shape, pieces_of, slot_pieces
from strategies.state.kinds_of_state import KindsOfState
from strategies.state.shard import StateShard, name_of
from tests.unit.layouts_in_tests import num_elements

SPEC = OptimizerSpec()
CPU = torch.device("cpu")
SHAPES = [("a.weight", (6, 4), 0, 0), ("b.weight", (4, 10), 1, 1), ("b.bias", (10,), 1, 0), ("c", (3, 2, 5), 2, None),
          ("d", (1,), 2, None), ("e", (), 2, None), ("f", (2, 12, 3), 2, 1)]  # fmt: skip
PACKS = {"f": 2}


def space_of(tensor: int) -> Space:
    return Space.of([(name, torch.Size(shape), block, dim) for name, shape, block, dim in SHAPES], tensor, packs=PACKS)


def spaces_of(space: Space) -> dict[str, Space]:
    return dict.fromkeys(("weights", "exp_avg", "exp_avg_sq"), space)


def contents(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Every element of every tensor has another value."""
    first = 1000.0 * (
        1 + sorted({name_of(k, n) for n, *_ in SHAPES for k in ("weights", "exp_avg", "exp_avg_sq")}).index(name)
    )
    return first + torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


def state_shard_of(space: Space, coordinate: int, ranges: list[tuple[int, int]]) -> StateShard:
    return StateShard(coordinate, FlatRanges.pieces(ranges, space.boundary), SPEC, CPU)


def filled(space: Space, coordinate: int, ranges: list[tuple[int, int]]) -> StateShard:
    """A state shard with the contents that its elements should have."""
    state_shard = state_shard_of(space, coordinate, ranges)
    for slot in space.slots:
        for kind, buffer in state_shard.kinds().items():
            flat = space.share(slot, contents(name_of(kind, slot.name), full_shape(space, slot)), coordinate).reshape(
                -1
            )
            for start, offset, length in state_shard.flat.locate(slot.offset, slot.offset + slot.numel):
                buffer.write(offset, flat[start - slot.offset : start - slot.offset + length])
    return state_shard


def chunks_from(
    space: Space, state_shard: StateShard, spans: Spans, most: int
) -> Iterator[tuple[str, Box, torch.Tensor]]:
    for span in spans:
        for piece in pieces_of(space, span, most):
            (at,) = [offset for _, offset, _ in state_shard.flat.locate(piece.start, piece.start + 1)]
            for kind, buffer in state_shard.kinds().items():
                values = buffer.read(at, piece.box.numel).view(piece.box.sizes)
                yield name_of(kind, piece.slot.name), piece.box, values


@st.composite
def spans_by_rank(draw: st.DrawFn) -> list[Spans]:
    tensors = draw(st.integers(1, 2))
    ends = st.tuples(st.integers(0, tensors - 1), st.integers(0, 200), st.integers(1, 60))
    ranks = draw(st.lists(st.lists(ends, max_size=4), min_size=1, max_size=6))
    return [union([Span(t, start, start + length) for t, start, length in spans]) for spans in ranks]


@given(spans_by_rank(), st.sampled_from([1, 16]))
def test_everything_is_shared_out_once_among_those_that_have_it(held: list[Spans], granule: int) -> None:
    shares = share_out(held, granule)
    assert union(*shares) == union(*held)
    assert sum(num_elements(share) for share in shares) == num_elements(union(*held)), "nothing comes up twice"
    for share, have in zip(shares, held, strict=True):
        assert not subtract(share, have)


def test_what_all_have_is_shared_evenly() -> None:
    loads = [num_elements(share) for share in share_out([whole(1600, 1)] * 5)]
    assert loads == [320] * 5
    # Rank 0 alone has half of it, so the others share the rest.
    held = [whole(1600, 1), *[union([Span(0, 800, 1600)])] * 4]
    assert [num_elements(share) for share in share_out(held)] == [800, 208, 208, 208, 176]


@given(st.integers(1, 2), st.integers(0, 1), st.integers(1, 60), st.randoms(use_true_random=False))
def test_pieces_lie_in_the_flat_state_in_order_and_without_gaps(
    tensor: int, coordinate: int, most: int, chance: random.Random
) -> None:
    space, coordinate = space_of(tensor), coordinate % tensor
    state_shard = filled(space, coordinate, [(0, space.size)])
    start = chance.randrange(space.size)
    span = Span(coordinate, start, chance.randrange(start + 1, space.size + 1))
    for piece in pieces_of(space, span, most):
        assert piece.box.numel <= most
        assert span.start <= piece.start < piece.start + piece.box.numel <= span.stop
        full = contents(name_of("weights", piece.slot.name), full_shape(space, piece.slot))
        expected = piece.box.view_in(Box((0,) * full.dim(), tuple(full.shape)), full)
        found = state_shard.weights[piece.start : piece.start + piece.box.numel].view(piece.box.sizes)
        assert torch.equal(found, expected)


@given(
    st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.integers(1, 5), st.integers(1, 5), st.integers(1, 40),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_what_was_cut_for_one_layout_is_put_together_for_any_other(
    old_tensor: int, new_tensor: int, old_ranks: int, new_ranks: int, most: int, chance: random.Random
) -> None:
    old, new = space_of(old_tensor), space_of(new_tensor)

    def cuts(size: int, ranks: int) -> list[tuple[int, int]]:
        points = sorted({0, size, *(chance.randrange(size) for _ in range(ranks - 1))})
        return list(itertools.pairwise(points))

    chunks = []
    for coordinate in range(old_tensor):
        for low, high in cuts(old.size, old_ranks):
            state_shard = filled(old, coordinate, [(low, high)])
            chunks += list(chunks_from(old, state_shard, union([Span(coordinate, low, high)]), most))
    total = sum(box.numel for _, box, _ in chunks)
    assert total == 3 * sum(math.prod(shape) for _, shape, *_ in SHAPES), "every element is in one chunk"
    for coordinate in range(new_tensor):
        for low, high in cuts(new.size, new_ranks):
            state_shard = state_shard_of(new, coordinate, [(low, high)])
            loader = ChunkLoader(KindsOfState(spaces_of(new)), [state_shard], union([Span(coordinate, low, high)]), {})
            for name, box, values in chunks:
                if loader.wants(name, box):
                    loader.put(name, box, values)
            assert loader.missing == 0
            expected = filled(new, coordinate, [(low, high)])
            for kind, buffer in state_shard.kinds().items():
                assert torch.equal(buffer.values, expected.kinds()[kind].values)


def test_constants_are_taken_whole() -> None:
    table = torch.zeros(3, 2)
    loader = ChunkLoader(KindsOfState(spaces_of(space_of(1))), [], NOTHING, {"table": table})
    assert loader.missing == 6
    loader.put("model.table", Box((0, 0), (2, 2)), torch.ones(2, 2))
    assert loader.missing == 2
    loader.put("model.table", Box((2, 0), (1, 2)), torch.full((1, 2), 2.0))
    assert loader.missing == 0
    assert table.tolist() == [[1, 1], [1, 1], [2, 2]]


def test_a_box_outside_of_what_is_wanted_is_not() -> None:
    space = space_of(1)
    slot = space.slots[0]
    low, high = slot.offset, slot.offset + slot.numel // 2
    shards = [state_shard_of(space, 0, [(low, high)])]
    loader = ChunkLoader(KindsOfState(spaces_of(space)), shards, union([Span(0, low, high)]), {})
    (piece,) = slot_pieces(space, slot, low, high, 0)
    assert loader.wants(f"model.{slot.name}", piece.box)
    assert not loader.wants(f"model.{slot.name}", Box((slot.shape[0] - 1, 0), (1, slot.shape[1])))
    assert not loader.wants("model.other", piece.box)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_an_empty_parameter_has_no_chunks(shape: tuple[int, int]) -> None:
    space = Space.of([("w", torch.Size((2, 2)), 0, None), ("empty", torch.Size(shape), 0, None)], 1)
    assert {piece.slot.name for piece in pieces_of(space, Span(0, 0, space.size))} == {"w"}
