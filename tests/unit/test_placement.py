"""Who trains what: everything exactly once, copies where they outlive the most, and rows as FSDP2 cuts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.layout.assignment import deal
from strategies.layout.parallel import SHARDS, ParallelLayout
from strategies.layout.placement import Domain, Shard, place_state, row_ranges, trained_spans
from strategies.layout.schedule import SCHEDULES
from strategies.layout.space import ALIGNMENT, Space
from strategies.layout.statemap import NOTHING, Span, intersect, subtract, union, whole
from tests.unit.layouts_in_tests import num_elements

quick = settings(deadline=None, print_blob=True, max_examples=50)
BLOCKS = 10


def space_of(tensor: int) -> Space:
    """Matrices and vectors in every block, of odd sizes; some are split by tensor parallelism (12 is for all)."""
    parameters: list[tuple[str, torch.Size, int, int | None]] = []
    for block in range(BLOCKS):
        parameters += [
            (f"{block}.up", torch.Size([12, 3 + block]), block, 0),
            (f"{block}.down", torch.Size([5, 12]), block, 1),
            (f"{block}.odd", torch.Size([3, 7]), block, None),
            (f"{block}.norm", torch.Size([5 + block]), block, None),
        ]
    return Space.of(parameters, tensor)


@st.composite
def layouts(draw: st.DrawFn) -> ParallelLayout:
    data, pipeline, tensor = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    schedule = draw(st.sampled_from(SCHEDULES))
    parts: tuple[tuple[int, int], ...] = ()
    if pipeline > 1:
        number = pipeline * (2 if schedule in ("interleaved-1f1b", "zero-bubble") else 1)
        bounds = [BLOCKS * part // number for part in range(number + 1)]
        parts = tuple(pairwise(bounds))
    shard = draw(st.sampled_from(SHARDS))
    spares = draw(st.integers(0, 2))
    return ParallelLayout(data, deal(8, [1.0] * data), tensor, pipeline, shard, schedule, parts, spares)


def domains_of(draw: st.DrawFn, ranks: int) -> list[Domain]:
    zones, nodes = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    drawn = [draw(st.integers(0, nodes - 1)) for _ in range(ranks)]
    return [Domain(f"zone{node % zones}", f"node{node}") for node in drawn]


@st.composite
def placements(draw: st.DrawFn) -> tuple[ParallelLayout, Space, list[Domain], int, list[Shard]]:
    layout = draw(layouts())
    space = space_of(layout.tensor)
    domains = domains_of(draw, layout.world_size)
    copies = draw(st.integers(1, 4))
    return layout, space, domains, copies, place_state(layout, space, domains, copies)


def holders_of(shards: Sequence[Shard], span: Span) -> set[int]:
    """The ranks that train all of a span."""
    return {
        rank for shard in shards for rank in (shard.owner, *shard.mirrors) if not subtract(union([span]), shard.spans)
    }


# ---------------------------------------------------------------------------------------- shards


@quick
@given(placements())
def test_shards_are_everything_once_in_every_replica_that_has_its_own(
    placed: tuple[ParallelLayout, Space, list[Domain], int, list[Shard]],
) -> None:
    layout, space, _, _, shards = placed
    everything = whole(space.size, space.tensor)
    assert [shard.owner for shard in shards] == list(range(layout.num_placed))
    groups = [shards]
    if layout.effective_shard == "none":
        replica = layout.pipeline * layout.tensor
        groups = [shards[first : first + replica] for first in range(0, layout.num_placed, replica)]
    for group in groups:
        assert union(*(shard.spans for shard in group)) == everything
        assert sum(num_elements(shard.spans) for shard in group) == num_elements(everything), "some twice"


@quick
@given(placements())
def test_ranks_train_only_what_they_compute_with_and_what_they_mirror(
    placed: tuple[ParallelLayout, Space, list[Domain], int, list[Shard]],
) -> None:
    layout, space, _, _, shards = placed
    for shard in shards:
        place = layout.place(shard.owner)
        assert place is not None
        assert shard.coordinate == place.tensor
        part = union(Span(place.tensor, *ends) for ends in space.ranges_of(layout.blocks_of(place.stage)))
        assert intersect(shard.spans, part) == shard.spans
        if layout.effective_shard == "none":
            assert shard.spans == part
    trained = trained_spans(layout, shards)
    assert len(trained) == layout.world_size
    assert trained[layout.num_placed :] == [NOTHING] * layout.spares, "spares train nothing"
    for rank, spans in enumerate(trained[: layout.num_placed]):
        assert spans == union(*(shard.spans for shard in shards if rank in (shard.owner, *shard.mirrors)))


@quick
@given(st.integers(1, 4), st.integers(1, 2), st.sampled_from(["optimizer", "gradients"]))
def test_slices_are_even_and_whole_vectors(data: int, tensor: int, shard: str) -> None:
    space = space_of(tensor)
    layout = ParallelLayout(data, deal(8, [1.0] * data), tensor, shard=shard)
    sizes = [num_elements(s.spans) for s in place_state(layout, space, [Domain("", "")] * layout.world_size, 1)]
    assert max(sizes) - min(sizes) <= ALIGNMENT
    assert all(size % ALIGNMENT == 0 for size in sizes)


# ---------------------------------------------------------------------------------------- copies


@settings(quick, max_examples=20)
@given(placements())
def test_every_element_has_as_many_holders_as_wanted_or_as_there_are_ranks(
    placed: tuple[ParallelLayout, Space, list[Domain], int, list[Shard]],
) -> None:
    layout, _, _, copies, shards = placed
    natural = layout.data if layout.effective_shard == "none" else 1
    for shard in shards:
        assert len({shard.owner, *shard.mirrors}) == 1 + len(shard.mirrors), "nobody holds the same twice"
        for span in shard.spans:
            assert len(holders_of(shards, span)) == max(natural, min(copies, layout.num_placed))


@quick
@given(placements())
def test_copies_are_with_others_who_do_not_fail_together_while_there_are_any(
    placed: tuple[ParallelLayout, Space, list[Domain], int, list[Shard]],
) -> None:
    """In the order zone, node, tensor-parallel group, counted against all holders so far."""
    layout, _, domains, _, shards = placed
    natural = layout.effective_shard == "none"
    for shard in shards:
        holders = list(layout.data_group(shard.owner)) if natural else [shard.owner]
        for mirror in shard.mirrors:
            others = [rank for rank in range(layout.num_placed) if rank not in holders]
            zones = {domains[rank].zone for rank in holders}
            nodes = {domains[rank] for rank in holders}
            groups = {rank // layout.tensor for rank in holders}

            def repeats(
                rank: int, zones: set[str] = zones, nodes: set[Domain] = nodes, groups: set[int] = groups
            ) -> tuple[bool, bool, bool]:
                return domains[rank].zone in zones, domains[rank] in nodes, rank // layout.tensor in groups

            assert repeats(mirror) == min(repeats(rank) for rank in others)
            holders.append(mirror)


@quick
@given(placements())
def test_a_placement_depends_on_its_arguments_only(
    placed: tuple[ParallelLayout, Space, list[Domain], int, list[Shard]],
) -> None:
    layout, space, domains, copies, shards = placed
    assert place_state(layout, space, list(domains), copies) == shards


@pytest.mark.parametrize("shard", ["optimizer", "gradients", "parameters"])
@pytest.mark.parametrize(("data", "copies"), [(4, 2), (8, 2), (6, 3), (2, 5)])
def test_copies_are_spread_evenly_where_nodes_are_alike(data: int, copies: int, shard: str) -> None:
    layout = ParallelLayout(data, deal(8, [1.0] * data), shard=shard)
    shards = place_state(layout, space_of(1), [Domain("", str(rank)) for rank in range(data)], copies)
    mirrored = Counter(mirror for placed in shards for mirror in placed.mirrors)
    assert set(mirrored.values()) == {min(copies, data) - 1}


def test_the_loss_of_a_zone_leaves_a_holder_of_everything() -> None:
    domains = [Domain(f"zone{rank // 4}", f"node{rank // 2}") for rank in range(8)]
    space = space_of(2)
    layout = ParallelLayout(2, deal(8, [1.0, 1.0]), 2, 2, "parameters", parts=((0, 5), (5, BLOCKS)))
    trained = trained_spans(layout, place_state(layout, space, domains, 2))
    for lost in ("zone0", "zone1"):
        left = [spans for spans, domain in zip(trained, domains, strict=True) if domain.zone != lost]
        assert union(*left) == whole(space.size, 2)


def test_one_replica_has_nobody_to_shard_with() -> None:
    space, alone = space_of(1), [Domain("", "")]
    shards = [place_state(ParallelLayout(1, ((0,),), shard=shard), space, alone, 3) for shard in SHARDS]
    assert all(placed == shards[0] for placed in shards)
    assert shards[0] == [Shard(0, 0, ((0, space.size),))]


def test_fewer_than_one_copy_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one holder, got copies 0"):
        place_state(ParallelLayout(1, ((0,),)), space_of(1), [Domain("", "")], 0)


# ---------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("parts", range(1, 9))
def test_rows_are_those_of_torchs_chunks(parts: int, tensor: int) -> None:
    """FSDP2 shards dimension 0 by torch.chunk; also where there are fewer rows than ranks."""
    space = space_of(tensor)
    expected: list[list[int]] = [[] for _ in range(parts)]
    for slot in space.slots:
        numbers = torch.arange(slot.offset, slot.offset + slot.numel).view(slot.shape)
        for rank, chunk in enumerate(numbers.chunk(parts)):
            expected[rank] += chunk.reshape(-1).tolist()
    real = {element for slot in space.slots for element in range(slot.offset, slot.offset + slot.numel)}
    seen: list[int] = []
    for rank in range(parts):
        ranges = row_ranges(space, [(0, space.size)], parts, rank)
        assert all(start < stop for start, stop in ranges)
        has = [element for start, stop in ranges for element in range(start, stop)]
        seen += has
        assert [element for element in has if element in real] == expected[rank]
    assert sorted(seen) == list(range(space.size)), "padding has a holder too"


def test_rows_are_of_the_parameters_of_a_stage_only() -> None:
    space = space_of(1)
    stage = space.ranges_of([(2, 5)])
    rows = [row_ranges(space, stage, 3, rank) for rank in range(3)]
    assert union(Span(0, *ends) for ranges in rows for ends in ranges) == union(Span(0, *ends) for ends in stage)
