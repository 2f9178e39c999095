"""What a step is made of: the tree, the dealing, schedules and streams."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from strategies.comm.gloo import Gloo
from strategies.comm.groups import Groups
from strategies.layout.assignment import deal, even
from strategies.layout.parallel import ParallelLayout
from strategies.model.randomness import Streams, stream_key
from strategies.optim.schedule import ScheduleSpec
from strategies.reduction.reducer import Reducer
from strategies.reduction.tree import Subtree, cover, fold, split
from strategies.reduction.tree_sum import TreeSum
from tests.unit.tiny_model import (
    CPU,
    bits,
    one_thread,  # noqa: F401 (autouse)
)

# ---------------------------------------------------------------------------------------- the tree


def add_in_order(values: Sequence[torch.Tensor], node: Subtree) -> torch.Tensor:
    """The sum as one holder of everything computes it."""
    if node[1] - node[0] == 1:
        return values[node[0]]
    left, right = split(node)
    return add_in_order(values, left) + add_in_order(values, right)


def test_a_node_splits_after_the_largest_power_of_two() -> None:
    assert split((0, 8)) == ((0, 4), (4, 8))
    assert split((0, 5)) == ((0, 4), (4, 5))
    assert split((4, 7)) == ((4, 6), (6, 7))
    with pytest.raises(ValueError, match="no children"):
        split((3, 4))


@settings(deadline=None, print_blob=True, max_examples=200)
@given(data=st.data(), virtual_workers=st.integers(1, 33), ranks=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_any_partition_folds_to_the_bits_of_the_single_holder(
    data: st.DataObject, virtual_workers: int, ranks: int, seed: int
) -> None:
    """Values span the whole range of fp32, subnormals, infinities from overflow and negative zero included."""
    owner = data.draw(st.lists(st.integers(0, ranks - 1), min_size=virtual_workers, max_size=virtual_workers))
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 2**32, size=(virtual_workers, 40), dtype=np.uint32).view(np.float32)
    values = torch.from_numpy(np.nan_to_num(patterns, nan=-0.0, posinf=3e38, neginf=-3e38).copy())
    values[:, :4] = torch.tensor([1e-45, -0.0, 1e30, 1.0]) * torch.from_numpy(
        rng.choice([-1.0, 1.0], size=(virtual_workers, 4)).astype(np.float32)
    )
    expected = add_in_order(list(values), (0, virtual_workers))
    pieces: dict[Subtree, torch.Tensor] = {}
    for rank in range(ranks):
        for node in cover([i for i in range(virtual_workers) if owner[i] == rank], (0, virtual_workers)):
            pieces[node] = add_in_order(list(values), node).clone()
    order = list(pieces)
    np.random.default_rng(seed).shuffle(order)
    folded = fold({node: pieces[node] for node in order}, (0, virtual_workers), torch.Tensor.add_)
    assert bits(folded) == bits(expected)


@given(data=st.data(), virtual_workers=st.integers(1, 33))
def test_a_cover_is_disjoint_complete_and_of_whole_subtrees_that_no_larger_one_holds(
    data: st.DataObject, virtual_workers: int
) -> None:
    held = data.draw(st.sets(st.integers(0, virtual_workers - 1)))
    nodes = cover(held, (0, virtual_workers))
    assert sorted(index for start, stop in nodes for index in range(start, stop)) == sorted(held)
    tree: set[Subtree] = set()

    def visit(node: Subtree) -> None:
        tree.add(node)
        if node[1] - node[0] > 1:
            for child in split(node):
                visit(child)

    visit((0, virtual_workers))
    assert set(nodes) <= tree
    for parent in (node for node in tree if node[1] - node[0] > 1):
        assert not set(split(parent)) <= set(nodes), f"{split(parent)} should be sent as one sum, {parent}"


def test_a_cover_refuses_unknown_virtual_workers() -> None:
    with pytest.raises(ValueError, match=r"\[2, 9\].*\[0, 8\)"):
        cover([2, 9], (0, 8))


def test_a_fold_refuses_gaps_and_overlaps() -> None:
    def add(a: int, b: int) -> int:
        return a + b

    with pytest.raises(ValueError, match="no piece covers virtual worker 2"):
        fold({(0, 2): 1, (3, 4): 1}, (0, 4), add)
    with pytest.raises(ValueError, match="overlap"):
        fold({(0, 4): 1, (0, 2): 1}, (0, 4), add)


# ---------------------------------------------------------------------------------------- dealing


@given(
    virtual_workers=st.integers(1, 64),
    speeds=st.lists(st.one_of(st.just(0.0), st.floats(0.01, 100.0)), min_size=1, max_size=9).filter(any),
)
def test_every_virtual_worker_is_dealt_once_in_runs_and_in_proportion(
    virtual_workers: int, speeds: list[float]
) -> None:
    dealt = deal(virtual_workers, speeds)
    assert [index for held in dealt for index in held] == list(range(virtual_workers))
    assert all(not held for held, speed in zip(dealt, speeds, strict=True) if speed == 0)
    slowest = max(len(held) / speed for held, speed in zip(dealt, speeds, strict=True) if speed > 0)
    for held, speed in zip(dealt, speeds, strict=True):
        if speed > 0:
            assert (len(held) + 1) / speed >= slowest - 1e-9, "one more here would have spared the slowest rank"


def test_equal_ranks_get_shares_that_differ_by_one_at_most() -> None:
    for ranks in range(1, 9):
        sizes = [len(held) for held in deal(8, [1.0] * ranks)]
        assert max(sizes) - min(sizes) <= 1


def test_dealing_to_nobody_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"speeds \[0.0, 0.0\]"):
        deal(8, [0.0, 0.0])


@given(total=st.integers(0, 10_000), parts=st.integers(1, 12), multiple=st.integers(1, 500))
def test_even_cuts_are_whole_multiples_of_nearly_equal_size(total: int, parts: int, multiple: int) -> None:
    sizes = even(total, parts, multiple)
    assert len(sizes) == parts
    assert sum(sizes) == total
    ends = np.cumsum(sizes).tolist()
    assert all(end % multiple == 0 or end == total for end in ends)
    units = [-(-size // multiple) for size in sizes]
    assert max(units) - min(units) <= 1


def test_even_refuses_no_parts() -> None:
    with pytest.raises(ValueError, match="0 parts"):
        even(3, 0)


def test_the_layouts_errors_name_every_operand() -> None:
    with pytest.raises(ValueError, match="data 2 replicas, but 3 are dealt work"):
        ParallelLayout(data=2, tensor=3, assignment=((0,), (1,), (2,)))
    for wrong in (((0,), (0,)), ((0,), (2,)), ((), ())):
        with pytest.raises(ValueError, match="exactly once"):
            ParallelLayout(data=2, assignment=wrong)
    with pytest.raises(ValueError, match="ascend"):
        ParallelLayout(data=1, assignment=((1, 0),))


def test_a_layout_knows_its_sizes() -> None:
    layout = ParallelLayout(data=3, assignment=((0, 1), (), (2,)))
    assert (layout.world_size, layout.virtual_workers) == (3, 3)
    assert layout.describe() == {"data": 3, "tensor": 1, "pipeline": 1, "shard": "none"}


# ---------------------------------------------------------------------------------------- schedules and streams


def test_schedules_warm_up_and_decay_as_they_say() -> None:
    cosine = ScheduleSpec("cosine", warmup_steps=4, min_ratio=0.1, total_steps=13)
    assert [cosine.factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert cosine.factor(4) == 1.0
    assert cosine.factor(8) == pytest.approx(0.55)
    assert cosine.factor(12) == pytest.approx(0.1)
    assert cosine.factor(100) == pytest.approx(0.1)
    linear = ScheduleSpec("linear", warmup_steps=0, min_ratio=0.5, total_steps=5)
    assert [linear.factor(step) for step in range(5)] == [1.0, 0.875, 0.75, 0.625, 0.5]
    assert {ScheduleSpec("constant", 2, 0.1, 9).factor(step) for step in range(2, 9)} == {1.0}
    with pytest.raises(ValueError, match="zigzag"):
        ScheduleSpec("zigzag").factor(1)


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules_by_the_convention_of_transformers_are_theirs(name: str, warmup: int) -> None:
    from transformers import get_scheduler

    total = 60
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    given: dict[str, Any] = {"num_warmup_steps": warmup, "num_training_steps": total}
    for min_ratio in (0.0, 0.1) if name == "cosine" else (0.0,):
        theirs = {"constant": "constant_with_warmup", "cosine": "cosine_with_min_lr"}.get(name, name)
        more = {"scheduler_specific_kwargs": {"min_lr_rate": min_ratio}} if name == "cosine" else {}
        scheduler = get_scheduler(theirs, optimizer, **given, **more)
        (factor,) = scheduler.lr_lambdas  # type: ignore[attr-defined]
        ours = ScheduleSpec(name, warmup, min_ratio, total, "transformers")
        assert [ours.factor(step) for step in range(total)] == pytest.approx([factor(step) for step in range(total)])


def test_how_conventions_differ_is_as_the_docs_say() -> None:
    """docs/job-file.md: 60 steps, 10 of them of warm-up, min_ratio 0."""
    found = {}
    for convention in ("own", "transformers"):
        for name in ("linear", "cosine"):
            factor = ScheduleSpec(name, 10, 0.0, 60, convention).factor
            found[convention, name] = [round(factor(step), 4) for step in (0, 9, 10, 59)]
    assert found == {
        ("own", "linear"): [0.1, 1.0, 1.0, 0.0],
        ("own", "cosine"): [0.1, 1.0, 1.0, 0.0],
        ("transformers", "linear"): [0.0, 0.9, 1.0, 0.02],
        ("transformers", "cosine"): [0.0, 0.9, 1.0, 0.001],
    }


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_a_schedule_of_one_step_has_a_rate(name: str) -> None:
    assert ScheduleSpec(name, 0, 0.1, 1).factor(0) == 1.0


def test_random_streams_are_told_apart_by_every_part() -> None:
    keys = [
        stream_key(seed, "step", s, v, m) for seed in range(3) for s in range(5) for v in range(9) for m in range(3)
    ]
    assert len(set(keys)) == len(keys)
    assert stream_key(1, 11) != stream_key(11, 1)
    assert all(0 <= key < 2**63 for key in keys)
    assert stream_key(5, "step", 0, 1, 2) == 1845650695205280241, "the streams of recorded runs must not change"


def test_every_pass_and_every_layer_in_it_draw_numbers_of_their_own() -> None:
    streams, layers = Streams(3), [nn.Identity() for _ in range(2)]
    for number, layer in enumerate(layers):
        streams.install(layer, number)
    drawn = []
    for at in itertools.product(range(2), range(3), range(2)):
        streams.enter(*at)
        drawn.append(float(torch.rand(())))
        for layer in layers:
            layer(torch.zeros(1))
            drawn.append(float(torch.rand(())))
    assert len(set(drawn)) == len(drawn) == 36


@given(st.integers(1, 9).flatmap(lambda count: st.permutations(range(count))), st.data())
def test_what_is_added_from_a_buffer_of_another_is_added_to_the_same_bits(order: Sequence[int], data: Any) -> None:
    """Also that a zero has no sign, as in what is accumulated into zeros."""
    generator = torch.Generator().manual_seed(len(order))
    leaves = [torch.randn(5, generator=generator) * torch.tensor([1.0, -0.0, 0.0, 1e-8, 1e8]) for _ in order]
    taken, left = TreeSum((0, len(order)), []), TreeSum((0, len(order)), pool := [])
    for worker in order:
        taken.add((worker, worker + 1), leaves[worker] + 0.0)
        how = data.draw(st.sampled_from(["taken over", "from another", "in a round"]))
        if how == "in a round":
            left.add_round([((worker, worker + 1), leaves[worker] + 0.0)])
        elif how == "from another":
            left.add_from((worker, worker + 1), leaves[worker])
        else:
            left.add((worker, worker + 1), leaves[worker] + 0.0)
    assert torch.equal(taken.total().view(torch.int32), left.total().view(torch.int32))
    own = {leaf.data_ptr() for leaf in leaves}
    assert own.isdisjoint(buffer.data_ptr() for buffer in (*pool, left.total())), "what is not taken over stays"


@given(st.integers(1, 12), st.integers(1, 4))
def test_what_comes_in_rounds_is_added_to_the_same_bits_with_few_buffers(replicas: int, held: int) -> None:
    count = replicas * held
    leaves = torch.randn((count, 3), generator=torch.Generator().manual_seed(count))
    one, rounds = TreeSum((0, count), []), TreeSum((0, count), pool := [])
    for worker in range(count):
        one.add((worker, worker + 1), leaves[worker].clone())
    for number in range(held):
        workers = range(number * replicas, (number + 1) * replicas)  # As they are dealt in turn.
        rounds.add_round([((worker, worker + 1), leaves[worker].clone()) for worker in workers])
    assert torch.equal(one.total(), rounds.total())
    if replicas & (replicas - 1) == 0:
        assert len(pool) + 1 <= max(1, held.bit_length() - 1), "as is planned with"


def test_a_reducer_refuses_other_pieces_than_its_own() -> None:
    layout = ParallelLayout(data=1, assignment=((0, 1, 2),))
    reducer = Reducer(Groups(rank=0, world_size=1, device=CPU, transport=Gloo()), layout, 5, CPU)
    with pytest.raises(ValueError, match=r"replica 0 must bring the subtrees \(\(0, 3\),\), got \[\(0, 1\)\]"):
        reducer.reduce({(0, 1): torch.zeros(5)})
