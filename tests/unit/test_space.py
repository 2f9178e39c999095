"""Where values live: slots of a space, flat ranges of it in buffers, and updates that do not depend on either."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.layout.assignment import even
from strategies.layout.placement import row_ranges
from strategies.layout.space import ALIGNMENT, FlatRanges, Slot, Space, merge, round_up
from strategies.layout.statemap import NOTHING, Span, union
from strategies.optim.rounding import FP8_BLOCK
from strategies.optim.sgd import SGD
from strategies.optim.spec import OptimizerSpec
from strategies.state.shard import StateShard
from tests.unit.tiny_model import (
    CPU,
    bits,
    one_thread,  # noqa: F401 (autouse)
)

quick = settings(deadline=None, print_blob=True, max_examples=150)

OPTIMIZERS = [
    OptimizerSpec(betas=(0.9, 0.99), weight_decay=0.1),
    OptimizerSpec(weight_decay=0.2, kind=SGD),
    OptimizerSpec(momentum=0.9, weight_decay=0.01, kind=SGD),
    OptimizerSpec(betas=(0.9, 0.99), weight_decay=0.1, state="bf16"),
    OptimizerSpec(momentum=0.9, weight_decay=0.01, kind=SGD, state="bf16", offload=True),
    OptimizerSpec(betas=(0.9, 0.99), weight_decay=0.1, offload=True),
    OptimizerSpec(betas=(0.9, 0.99), weight_decay=0.1, state="fp8"),
]
"""Every kind, each with weight decay, so that a wrong boundary shows."""
IDS = ["adamw", "sgd", "momentum", "adamw in bf16", "momentum in bf16", "adamw offloaded", "adamw in fp8"]

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(torch.Size)
models = st.lists(st.tuples(shapes, st.integers(0, 4)), min_size=1, max_size=10)
"""(shape, block) of every parameter."""


def space_of(model: Sequence[tuple[torch.Size, int]]) -> Space:
    return Space.of([(f"p{index}", shape, block, None) for index, (shape, block) in enumerate(model)], tensor=1)


def random_space(rng: random.Random, row: int = 1) -> Space:
    """Sizes that are no multiple of anything but for rows of matrices, which are of `row`; matrices large enough for
    whole vectors."""
    model = []
    for block in range(4):
        for _ in range(rng.randint(1, 4)):
            dims = rng.choice([(rng.randint(1, 70),), (rng.randint(1, 40), row * rng.randint(1, 40 // row))])
            model.append((torch.Size(dims), block))
    return space_of(model)


# ---------------------------------------------------------------------------------------- slots


@quick
@given(models)
def test_slots_are_aligned_and_apart_matrices_of_all_blocks_first(model: list[tuple[torch.Size, int]]) -> None:
    space = space_of(model)
    assert sorted(slot.name for slot in space.slots) == sorted(f"p{index}" for index in range(len(model)))
    assert all(slot.offset % ALIGNMENT == 0 for slot in space.slots)
    assert space.slots[0].offset == 0
    assert all(a.stop == b.offset for a, b in pairwise(space.slots))
    assert all(0 <= slot.stop - slot.offset - slot.numel < ALIGNMENT for slot in space.slots)
    assert space.size == space.slots[-1].stop
    keys = [(not slot.decays, slot.block) for slot in space.slots]
    assert keys == sorted(keys)
    assert all((slot.offset < space.boundary) == slot.decays for slot in space.slots)


def test_within_a_block_slots_are_in_the_order_of_the_model() -> None:
    space = Space.of(
        [
            ("b", torch.Size([2, 3]), 1, None), ("bias", torch.Size([5]), 0, None), ("a", torch.Size([4, 4]), 1, None),
            ("embedding", torch.Size([3, 7]), 0, None),
        ],
        tensor=1,
    )  # fmt: skip
    assert [(slot.name, slot.offset) for slot in space.slots] == [("embedding", 0), ("b", 32), ("a", 48), ("bias", 64)]
    assert (space.boundary, space.size) == (64, 80)


@pytest.mark.parametrize("packs", [1, 2])
@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("tensor", [1, 2, 3])
def test_the_shares_of_all_coordinates_make_the_whole(dim: int | None, tensor: int, packs: int) -> None:
    whole = torch.arange(144.0).reshape(12, 12)
    space = Space.of([("w", whole.shape, 0, dim)], tensor, packs={"w": packs})
    (slot,) = space.slots
    shares = [space.share(slot, whole, coordinate) for coordinate in range(tensor)]
    assert all(share.shape == slot.shape for share in shares)
    assert torch.equal(space.assemble(slot, shares), whole)
    assert slot.numel == 144 // (tensor if dim is not None else 1)
    if dim is not None and packs == 2:
        first, second = whole.chunk(2, dim)
        halves = [half.chunk(tensor, dim)[0] for half in (first, second)]
        assert torch.equal(shares[0], torch.cat(halves, dim)), "a part of each matrix"


def test_dimensions_that_do_not_divide_are_all_named() -> None:
    parameters = [
        ("q", torch.Size([6, 8]), 1, 0), ("k", torch.Size([3, 8]), 1, 0), ("o", torch.Size([6, 5]), 1, 1),
        ("norm", torch.Size([5]), 1, None),
    ]  # fmt: skip
    with pytest.raises(ValueError) as caught:
        Space.of(parameters, tensor=2)
    assert str(caught.value) == "tensor 2 does not divide k [3, 8] in dimension 0; o [6, 5] in dimension 1"
    Space.of(parameters, tensor=1)


@quick
@given(models, st.sets(st.integers(1, 4)))
def test_runs_of_blocks_cut_the_space_into_ranges_of_whole_slots(
    model: list[tuple[torch.Size, int]], cuts: set[int]
) -> None:
    space = space_of(model)
    runs = list(pairwise([0, *sorted(cuts), 5]))
    by_run = [space.ranges_of([run]) for run in runs]
    assert merge(part for ranges in by_run for part in ranges) == [(0, space.size)] == space.ranges_of(None)
    assert sum(stop - start for ranges in by_run for start, stop in ranges) == space.size
    for run, ranges in zip(runs, by_run, strict=True):
        assert len(ranges) <= 2, "a stage is a run of matrices and a run of others"
        for slot in space.slots:
            inside = any(start <= slot.offset and slot.stop <= stop for start, stop in ranges)
            assert inside == (run[0] <= slot.block < run[1])
    assert space.ranges_of(runs) == [(0, space.size)]


# ---------------------------------------------------------------------------------------- flats

ranges_of_120 = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 120)).map(sorted).map(tuple), max_size=6)


def elements(ranges: Sequence[tuple[int, int]]) -> set[int]:
    return {element for start, stop in ranges for element in range(start, stop)}


@quick
@given(ranges_of_120)
def test_merged_ranges_are_the_same_elements_in_as_few_ranges_as_can_be(ranges: list[tuple[int, int]]) -> None:
    merged = merge(ranges)
    assert elements(merged) == elements(ranges)
    assert all(start < stop for start, stop in merged)
    assert all(a[1] < b[0] for a, b in pairwise(merged))


def disjoint(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending ranges that may touch but do not overlap, none empty."""
    kept: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if start < stop and (not kept or kept[-1][1] <= start):
            kept.append((start, stop))
    return kept


@quick
@given(ranges_of_120, st.integers(0, 8).map(lambda units: 16 * units), st.booleans(), st.data())
def test_a_strip_has_every_element_once_from_multiples_of_64_bytes_on(
    ranges: list[tuple[int, int]], boundary: int, apart: bool, data: st.DataObject
) -> None:
    """As every maker of pieces does, none of them crosses the boundary."""
    cut = [(a, b) for a, b in disjoint(ranges) if not a < boundary < b]
    flat = FlatRanges.pieces(cut, boundary) if apart else FlatRanges.of(ranges, boundary)
    assert elements(flat.ranges) == elements(cut if apart else ranges)
    if apart:
        assert list(flat.ranges) == cut
    assert flat.size % ALIGNMENT == flat.boundary % ALIGNMENT == 0
    places: dict[int, int] = {}
    for start, stop in flat.ranges:
        ((first, offset, length),) = list(flat.locate(start, stop))
        assert (first, length) == (start, stop - start)
        assert offset % ALIGNMENT == 0, "no range begins in the middle of a vector"
        for index in range(length):
            assert places.setdefault(offset + index, start + index) == start + index, "two elements in one place"
            assert (offset + index < flat.boundary) == (start + index < boundary), "weight decay stops elsewhere"
    assert max(places, default=-1) < flat.size == sum(round_up(stop - start) for start, stop in flat.ranges)
    low = data.draw(st.integers(0, 120))
    high = data.draw(st.integers(low, 120))
    found = {first + index: offset + index for first, offset, n in flat.locate(low, high) for index in range(n)}
    assert found == {element: place for place, element in places.items() if low <= element < high}
    low = data.draw(st.integers(0, flat.size))
    high = data.draw(st.integers(low, flat.size))
    assert elements(flat.cut(low, high)) == {element for place, element in places.items() if low <= place < high}


# ---------------------------------------------------------------------------------------- state shards


def values_of(size: int, space: Space, seed: int) -> torch.Tensor:
    """Of very different magnitudes where parameters are, zero between them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.zeros(size)
    for slot in space.slots:
        drawn = torch.randn(slot.numel, generator=generator)
        drawn *= 10.0 ** torch.randint(-6, 3, (slot.numel,), generator=generator)
        values[slot.offset : slot.offset + slot.numel] = drawn
    return values


def train(space: Space, flat: FlatRanges, spec: OptimizerSpec, seed: int) -> StateShard:
    """Five updates of what flat ranges have, at changing rates."""
    state_shard = StateShard(0, flat, spec, CPU)
    fill(state_shard, state_shard.weights, values_of(space.size, space, seed))
    for step in range(5):
        fill(state_shard, state_shard.gradient, values_of(space.size, space, seed + 1 + step))
        state_shard.apply(1e-2 / (1 + step))
    return state_shard


def fill(state_shard: StateShard, buffer: torch.Tensor, values: torch.Tensor) -> None:
    for start, offset, length in state_shard.flat.locate(0, len(values)):
        buffer[offset : offset + length] = values[start : start + length]


def values_in(state_shard: StateShard, kind: str) -> torch.Tensor:
    """All of a kind's values, as fp32."""
    return state_shard.kinds()[kind].read(0, state_shard.flat.size).float()


def gathered(space: Space, state_shards: Sequence[StateShard], kind: str) -> torch.Tensor:
    """A kind of tensor of the whole space, from state shards that have all of it."""
    values = torch.full((space.size,), torch.nan)
    for state_shard in state_shards:
        for start, offset, length in state_shard.flat.locate(0, space.size):
            values[start : start + length] = state_shard.kinds()[kind].read(offset, length)
    return values


def cut_at_rows(space: Space, rng: random.Random) -> list[list[tuple[int, int]]]:
    """Every parameter's rows dealt to three ranks in runs of any length."""
    parts: list[list[tuple[int, int]]] = [[], [], []]
    for slot in space.slots:
        width = slot.numel // slot.shape[0]
        cuts = sorted(rng.randint(0, slot.shape[0]) for _ in parts[1:])
        for part, (first, last) in zip(parts, pairwise([0, *cuts, slot.shape[0]]), strict=True):
            if first < last:
                stop = slot.stop if last == slot.shape[0] else slot.offset + last * width
                part.append((slot.offset + first * width, stop))
    return parts


@pytest.mark.parametrize("spec", OPTIMIZERS, ids=IDS)
@pytest.mark.parametrize("seed", range(6))
def test_updates_have_the_same_bits_however_the_state_is_cut(seed: int, spec: OptimizerSpec) -> None:
    """In even slices as optimizer sharding makes them, in rows as FSDP makes them, and in rows of any number."""
    rng = random.Random(seed)
    space = random_space(rng, FP8_BLOCK if spec.state == "fp8" else 1)
    whole = train(space, FlatRanges.of([(0, space.size)], space.boundary), spec, seed)
    ranks = rng.randint(2, 5)
    sizes = even(space.size, ranks, ALIGNMENT)
    slices = [(sum(sizes[:rank]), sum(sizes[: rank + 1])) for rank in range(ranks)]
    everything = [(0, space.size)]
    ways = {
        "slices": [FlatRanges.of([part], space.boundary) for part in slices],
        "rows": [FlatRanges.pieces(row_ranges(space, everything, ranks, r), space.boundary) for r in range(ranks)],
        "any rows": [FlatRanges.pieces(ranges, space.boundary) for ranges in cut_at_rows(space, rng)],
        "blocks": [FlatRanges.of(space.ranges_of([(b, b + 1)]), space.boundary) for b in range(4)],
    }
    for way, flats in ways.items():
        state_shards = [train(space, flat, spec, seed) for flat in flats]
        for kind in whole.kinds():
            assert bits(gathered(space, state_shards, kind)) == bits(values_in(whole, kind)), (
                f"{kind} in {way}, seed {seed}"
            )


@pytest.mark.parametrize("spec", OPTIMIZERS, ids=IDS)
def test_padding_stays_zero(spec: OptimizerSpec) -> None:
    space = random_space(random.Random(1), FP8_BLOCK if spec.state == "fp8" else 1)
    rows = FlatRanges.pieces(row_ranges(space, [(0, space.size)], 3, 1), space.boundary)
    for flat in (FlatRanges.of([(0, space.size)], space.boundary), rows):
        state_shard = train(space, flat, spec, 7)
        used = torch.zeros(flat.size, dtype=torch.bool)
        for slot in space.slots:
            for _, offset, length in flat.locate(slot.offset, slot.offset + slot.numel):
                used[offset : offset + length] = True
        assert used.any()
        assert not used.all()
        assert not any(values_in(state_shard, kind)[~used].any() for kind in state_shard.kinds())


@pytest.mark.parametrize("spec", OPTIMIZERS, ids=IDS)
def test_updates_go_on_where_another_shard_stopped(spec: OptimizerSpec) -> None:
    """Bias correction counts updates, so a state shard must be told how many its state has seen."""
    space = random_space(random.Random(2))
    flat = FlatRanges.of([(0, space.size)], space.boundary)
    first, second = train(space, flat, spec, 3), StateShard(0, flat, spec, CPU)
    third = train(space, flat, spec, 99)  # has updated something else before
    for other in (second, third):
        for kind, buffer in other.kinds().items():
            buffer.write(0, values_in(first, kind))
        other.set_updates(5)
    gradient = values_of(space.size, space, 50)
    for state_shard in (first, second, third):
        state_shard.gradient.copy_(gradient)
        state_shard.apply(1e-3)
    for kind in first.kinds():
        assert bits(values_in(first, kind)) == bits(values_in(second, kind)) == bits(values_in(third, kind))


def test_what_is_offloaded_is_updated_as_if_it_were_not(monkeypatch: Any) -> None:
    """Some at a time, wherever that cuts."""
    space = random_space(random.Random(3))
    flat = FlatRanges.of([(0, space.size)], space.boundary)
    expected = train(space, flat, OPTIMIZERS[0], 4)
    for elements in (16, 48, 1 << 20):
        monkeypatch.setattr("strategies.state.shard.CHUNK_ELEMENTS", elements)
        found = train(space, flat, OPTIMIZERS[5], 4)
        for kind in expected.kinds():
            assert bits(values_in(found, kind)) == bits(values_in(expected, kind)), (kind, elements)


def test_moments_in_bf16_are_rounded_and_take_half_the_memory() -> None:
    space = random_space(random.Random(3))
    flat = FlatRanges.of([(0, space.size)], space.boundary)
    exact, rounded = train(space, flat, OPTIMIZERS[0], 4), train(space, flat, OPTIMIZERS[3], 4)
    assert (exact.num_bytes, rounded.num_bytes) == (12 * flat.size, 8 * flat.size)
    for name, moment in rounded.moments.items():
        assert moment.values.dtype == torch.bfloat16
        difference = (values_in(rounded, name) - values_in(exact, name)).abs()
        assert float(difference.mean()) < 0.01 * float(values_in(exact, name).abs().mean())
    assert not torch.equal(rounded.weights, exact.weights)
    torch.testing.assert_close(rounded.weights, exact.weights, rtol=1e-2, atol=1e-2)


def test_a_shard_says_what_it_has() -> None:
    flat = FlatRanges.of([(0, 20), (32, 48)], 32)
    state_shard = StateShard(1, flat, OptimizerSpec(), CPU)
    assert state_shard.spans == union([Span(1, 0, 20), Span(1, 32, 48)])
    assert state_shard.num_bytes == 4 * 3 * 48
    assert list(state_shard.locate(Span(1, 16, 40))) == [(16, 16, 4), (32, 32, 8)]
    assert list(state_shard.locate(Span(0, 0, 48))) == [], "another coordinate's"


def test_a_shard_of_nothing_can_be_updated() -> None:
    nothing = StateShard(0, FlatRanges.of([], 0), OptimizerSpec(), CPU)
    nothing.apply(1e-2)
    assert nothing.spans == NOTHING


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    slots = Space.of([("w", torch.Size([3, 3]), 0, None), ("b", torch.Size([3]), 0, None)], 1).slots
    assert [(slot.name, slot.decays) for slot in slots] == [("w", True), ("b", False)]
    assert Slot("e", 0, 0, torch.Size([0]), 0).stop == 0
