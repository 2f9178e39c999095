"""Sets of spans against plain sets, and plans that bring every wanted element with as little as can be moved."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.layout.statemap import (
    NOTHING,
    NotCovered,
    Span,
    Spans,
    Transfer,
    cut_up,
    intersect,
    plan_transfers,
    subtract,
    union,
    whole,
)
from tests.unit.layouts_in_tests import num_elements

quick = settings(deadline=None, print_blob=True, max_examples=200)
Element = tuple[int, int]
SIZE = 24

any_spans = st.lists(
    st.builds(Span, st.integers(0, 2), st.integers(0, SIZE), st.integers(0, SIZE)), max_size=8
)  # some are empty or run backwards, and they overlap
sets_of_spans = any_spans.map(union)
by_rank = st.lists(sets_of_spans, min_size=1, max_size=6)


def elements(spans: list[Span] | Spans) -> set[Element]:
    return {(span.tensor, element) for span in spans for element in range(span.start, span.stop)}


def is_canonical(spans: Spans) -> bool:
    apart = all((a.tensor, a.stop) < (b.tensor, b.start) for a, b in pairwise(spans))
    return apart and all(span.length > 0 for span in spans)


# ---------------------------------------------------------------------------------------- sets of spans


@quick
@given(any_spans, any_spans)
def test_union_is_that_of_sets_in_as_few_spans_as_can_be(first: list[Span], second: list[Span]) -> None:
    merged = union(first, second)
    assert elements(merged) == elements(first) | elements(second)
    assert is_canonical(merged)
    assert num_elements(merged) == len(elements(merged))
    assert union(merged) == merged


@quick
@given(sets_of_spans, sets_of_spans)
def test_intersection_and_difference_are_those_of_sets(first: Spans, second: Spans) -> None:
    both, rest = intersect(first, second), subtract(first, second)
    assert elements(both) == elements(first) & elements(second)
    assert elements(rest) == elements(first) - elements(second)
    assert is_canonical(both)
    assert is_canonical(rest)
    assert intersect(second, first) == both
    assert union(both, rest) == first


@quick
@given(any_spans, any_spans)
def test_sets_are_equal_when_their_elements_are_and_survive_pickling(first: list[Span], second: list[Span]) -> None:
    one, other = union(first), union(second)
    assert (one == other) == (elements(one) == elements(other))
    assert one != tuple(one), "only with their like"
    twin = union(reversed(first))
    assert (twin, hash(twin)) == (one, hash(one))
    assert pickle.loads(pickle.dumps(one)) == one
    assert bool(one) == bool(elements(one))
    with pytest.raises(ValueError, match="read-only"):
        one.bounds[:] = 0


@quick
@given(st.lists(sets_of_spans, max_size=6))
def test_a_piece_is_in_a_group_as_a_whole_or_not_at_all(groups: list[Spans]) -> None:
    pieces = cut_up(groups)
    for own, group in zip(pieces.of, groups, strict=True):
        assert union(list(Spans(pieces.bounds[:, own]))) == group
        assert pieces.lengths[own].sum() == num_elements(group)
    ends = {end for group in groups for span in group for end in ((span.tensor, span.start), (span.tensor, span.stop))}
    assert len(pieces) == max(0, len(ends) - 1), "and is cut nowhere else"


def test_the_whole_state_is_every_coordinates() -> None:
    assert list(whole(5, 2)) == [Span(0, 0, 5), Span(1, 0, 5)]
    assert num_elements(whole(5, 2)) == 10


# ---------------------------------------------------------------------------------------- plans


def after(held: list[Spans], plan: list[Transfer]) -> list[set[Element]]:
    """What each rank has when all transfers are done."""
    got = [elements(spans) for spans in held]
    for transfer in plan:
        got[transfer.target] |= elements([transfer.span])
    return got


@quick
@given(by_rank, st.data(), st.integers(1, 10))
def test_a_plan_brings_what_is_wanted_and_moves_nothing_in_vain(
    held: list[Spans], data: st.DataObject, max_elements: int
) -> None:
    everything = union(*held)
    wanted = [intersect(data.draw(sets_of_spans), everything) for _ in held]
    plan = plan_transfers(held, wanted, max_elements)
    moved: Counter[tuple[int, Element]] = Counter()
    for transfer in plan:
        assert 0 < transfer.span.length <= max_elements
        assert transfer.source != transfer.target
        assert elements([transfer.span]) <= elements(held[transfer.source]), "a source sends what it has"
        moved.update((transfer.target, element) for element in elements([transfer.span]))
    missing = {
        (rank, element) for rank, spans in enumerate(wanted) for element in elements(spans) - elements(held[rank])
    }
    assert moved == Counter(missing), "each missing element once, and nothing that is in place"
    assert all(elements(want) <= got for want, got in zip(wanted, after(held, plan), strict=True))
    assert plan_transfers(held, wanted, max_elements) == plan


@quick
@given(by_rank, st.data())
def test_what_nobody_has_cannot_be_planned(held: list[Spans], data: st.DataObject) -> None:
    wanted = [data.draw(sets_of_spans) for _ in held]
    lost = elements(union(*wanted)) - elements(union(*held))
    if not lost:
        plan_transfers(held, wanted)
        return
    with pytest.raises(NotCovered, match="no living holder of elements") as caught:
        plan_transfers(held, wanted)
    assert any(f"of part {tensor}" in str(caught.value) for tensor, _ in lost)


@quick
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 200), st.integers(1, 12))
def test_sources_that_hold_the_same_share_the_work(holders: int, targets: int, size: int, max_elements: int) -> None:
    state = whole(size, 2)
    held = [state] * holders + [NOTHING] * targets
    plan = plan_transfers(held, [NOTHING] * holders + [state] * targets, max_elements)
    sent = Counter(dict.fromkeys(range(holders), 0))
    for transfer in plan:
        sent[transfer.source] += transfer.span.length
    total = 2 * size * targets
    assert sum(sent.values()) == total
    largest = max(transfer.span.length for transfer in plan)
    assert max(sent.values()) <= -(-total // holders) + largest
    assert max(sent.values()) - min(sent.values()) <= largest


def test_a_piece_that_only_one_rank_has_comes_from_there_and_the_rest_from_others() -> None:
    held = [union([Span(0, 0, 100)]), union([Span(0, 50, 100)]), NOTHING]
    plan = plan_transfers(held, [NOTHING, NOTHING, union([Span(0, 0, 100)])])
    assert plan == [Transfer(Span(0, 0, 50), 0, 2), Transfer(Span(0, 50, 100), 1, 2)]


def test_nothing_moves_when_everything_is_in_place() -> None:
    held = [union([Span(0, 0, 10)]), union([Span(0, 10, 20)])]
    assert plan_transfers(held, held) == []
    assert plan_transfers([whole(20, 1)] * 2, held) == []
    assert plan_transfers([NOTHING, NOTHING], [NOTHING, NOTHING]) == []


def test_held_and_wanted_are_of_the_same_ranks() -> None:
    with pytest.raises(ValueError, match="zip"):
        plan_transfers([NOTHING], [NOTHING, NOTHING])
