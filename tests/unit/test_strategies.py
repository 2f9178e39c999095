"""What a step is made of: the tree, the dealing, schedules and streams, the flat state, the plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import (
    CPU,
    VOCABULARY,
    TinyModel,
    bits,
    make,
    one_thread,  # noqa: F401 (autouse)
)
from torch import nn

from strategies.flat import ALIGNMENT, FlatState, state_digest
from strategies.groups import Groups
from strategies.layout import ParallelLayout, deal, even
from strategies.optimizers import OptimizerSpec, ScheduleSpec, build_optimizer
from strategies.randomness import stream_key
from strategies.reduction import Reducer
from strategies.state import Chunk, chunks_of, plan_transfers
from strategies.tree import Node, cover, fold, split

# ---------------------------------------------------------------------------------------- the tree


def add_in_order(values: Sequence[torch.Tensor], node: Node) -> torch.Tensor:
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
    pieces: dict[Node, torch.Tensor] = {}
    for rank in range(ranks):
        for node in cover([i for i in range(virtual_workers) if owner[i] == rank], virtual_workers):
            pieces[node] = add_in_order(list(values), node).clone()
    order = list(pieces)
    np.random.default_rng(seed).shuffle(order)
    folded = fold({node: pieces[node] for node in order}, virtual_workers, torch.Tensor.add_)
    assert bits(folded) == bits(expected)


@given(data=st.data(), virtual_workers=st.integers(1, 33))
def test_a_cover_is_disjoint_complete_and_of_whole_subtrees_that_no_larger_one_holds(
    data: st.DataObject, virtual_workers: int
) -> None:
    held = data.draw(st.sets(st.integers(0, virtual_workers - 1)))
    nodes = cover(held, virtual_workers)
    assert sorted(index for start, stop in nodes for index in range(start, stop)) == sorted(held)
    tree: set[Node] = set()

    def visit(node: Node) -> None:
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
        cover([2, 9], 8)


def test_a_fold_refuses_gaps_and_overlaps() -> None:
    def add(a: int, b: int) -> int:
        return a + b

    with pytest.raises(ValueError, match="no piece covers virtual worker 2"):
        fold({(0, 2): 1, (3, 4): 1}, 4, add)
    with pytest.raises(ValueError, match="overlap"):
        fold({(0, 4): 1, (0, 2): 1}, 4, add)


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
    with pytest.raises(ValueError, match="data 2 x tensor 3 x pipeline 1 = 6 ranks, but 2 are dealt work"):
        ParallelLayout(data=2, tensor=3, assignment=((0,), (1,)))
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


# ---------------------------------------------------------------------------------------- the flat state


def random_gradient(state: FlatState, seed: int) -> torch.Tensor:
    """Random where parameters are, zero in the gaps between them, as backward passes leave it."""
    gradient = torch.zeros(state.size)
    generator = torch.Generator().manual_seed(seed)
    for slot in state.slots:
        gradient[slot.offset : slot.offset + slot.numel] = torch.randn(slot.numel, generator=generator)
    return gradient


def test_parameters_become_aligned_views_and_keep_their_values() -> None:
    torch.manual_seed(3)
    plain = TinyModel()
    model, state = make()
    start = state.weights.data_ptr()
    assert start % 64 == 0
    by_name = dict(model.named_parameters())
    assert [slot.name for slot in state.slots] == [
        "embedding.weight", "hidden.weight", "head.weight", "norm.weight", "norm.bias", "hidden.bias", "head.bias",
    ]  # fmt: skip
    for slot in state.slots:
        parameter = by_name[slot.name]
        assert slot.offset % ALIGNMENT == 0
        assert parameter.data_ptr() == start + 4 * slot.offset
        assert torch.equal(parameter, dict(plain.named_parameters())[slot.name])
    state.weights.zero_()
    assert all(not p.any() for name, p in model.named_parameters() if name != "frozen")
    assert set(state.constants) == {"frozen", "scale"}


def test_gradients_are_accumulated_in_the_buffer_given() -> None:
    model, state = make()
    first, second = torch.zeros(state.size), torch.zeros(state.size)
    ids = torch.tensor([[1, 2, 3]])
    for buffer in (first, second, second):
        state.accumulate_into(buffer)
        model(input_ids=ids).square().sum().backward()
    assert first.any()
    assert torch.allclose(second, 2 * first)
    state.release_gradients()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "spec",
    [
        OptimizerSpec("adamw", betas=(0.9, 0.99), weight_decay=0.1),
        OptimizerSpec("sgd", weight_decay=0.0),
        OptimizerSpec("sgd", momentum=0.9, weight_decay=0.01),
    ],
    ids=["adamw", "sgd", "sgd with momentum"],
)
def test_updates_are_those_of_torchs_own_optimizer(spec: OptimizerSpec) -> None:
    """Against the same optimizer over ordinary parameters: equal bits with fused kernels, close without."""
    model, state = make(spec=spec)
    rates = [1e-2, 3e-2, 1e-3, 5e-3]
    copies: dict[bool, list[nn.Parameter]] = {}
    for fused in (True, False):
        copies[fused] = [nn.Parameter(p.detach().clone()) for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in copies[fused] if p.ndim >= 2], "weight_decay": spec.weight_decay},
            {"params": [p for p in copies[fused] if p.ndim < 2], "weight_decay": 0.0},
        ]
        other: torch.optim.Optimizer
        if spec.name == "adamw":
            other = torch.optim.AdamW(groups, lr=1.0, betas=spec.betas, eps=spec.eps, fused=fused)
        else:
            other = torch.optim.SGD(groups, lr=1.0, momentum=spec.momentum, fused=fused)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        slots = {slot.name: slot for slot in state.slots}
        for step, rate in enumerate(rates):
            gradient = random_gradient(state, step)
            for name, parameter in zip(names, copies[fused], strict=True):
                slot = slots[name]
                parameter.grad = gradient[slot.offset : slot.offset + slot.numel].view(slot.shape).clone()
            for group in other.param_groups:
                group["lr"] = rate
            other.step()
    for step, rate in enumerate(rates):
        state.gradient.copy_(random_gradient(state, step))
        state.apply(rate)
    ours = [p for p in model.parameters() if p.requires_grad]
    assert state.updates == len(rates)
    for parameter, plain in zip(ours, copies[False], strict=True):
        assert torch.allclose(parameter, plain, rtol=1e-5, atol=1e-7)
    largest = max(float((p - q).detach().abs().max()) for p, q in zip(ours, copies[True], strict=True))
    print(f"{spec.name}: largest difference from torch's fused kernels over separate parameters: {largest}")
    assert largest <= 1e-7, "fused kernels may treat the last elements of a tensor apart, but no more than that"


def test_only_matrices_are_decayed() -> None:
    model, state = make(spec=OptimizerSpec("sgd", weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state.gradient.zero_()
    state.apply(0.1)
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.ndim >= 2 else 1.0
        assert torch.allclose(parameter, before[name] * factor), name


def test_the_gaps_between_parameters_stay_zero() -> None:
    _, state = make()
    used = torch.zeros(state.size, dtype=torch.bool)
    for slot in state.slots:
        used[slot.offset : slot.offset + slot.numel] = True
    for step in range(3):
        state.gradient.copy_(random_gradient(state, step))
        state.apply(1e-2)
    assert used.any()
    assert not used.all()
    for buffer in (state.weights, *state.moments.values()):
        assert not buffer[~used].any()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_saved_state_continues_as_if_it_had_not_been_saved(name: str) -> None:
    spec = OptimizerSpec(name, momentum=0.9 if name == "sgd" else 0.0)
    _, first = make(spec=spec)
    first.gradient.copy_(random_gradient(first, 1))
    first.apply(1e-2)
    saved = {key: tensor.clone() for key, tensor in first.tensors()}
    assert list(saved) == sorted(saved)
    torch.manual_seed(99)
    second = FlatState(TinyModel(), spec, CPU)
    second.constants["scale"].fill_(7.0)
    assert state_digest(second) != state_digest(first)
    second.load(saved)
    assert second.updates == 1
    assert state_digest(second) == state_digest(first)
    for state in (first, second):
        state.gradient.copy_(random_gradient(state, 2))
        state.apply(1e-2)
    assert state_digest(second) == state_digest(first)


def test_the_ranges_are_the_whole_state() -> None:
    """What moves between ranks (with the count of updates) makes another state the same."""
    _, first = make()
    first.gradient.copy_(random_gradient(first, 1))
    first.apply(1e-2)
    torch.manual_seed(99)
    second = FlatState(TinyModel(), OptimizerSpec(), CPU)
    second.constants["frozen"].zero_()
    assert second.ranges().keys() == first.ranges().keys()
    for name, tensor in second.ranges().items():
        tensor.copy_(first.ranges()[name])
    second.updates = first.updates
    assert state_digest(second) == state_digest(first)


def test_what_does_not_fit_is_named() -> None:
    _, state = make()
    saved = dict(state.tensors())
    del saved["model.norm.bias"]
    saved["model.extra"] = torch.zeros(1)
    saved["model.head.bias"] = torch.zeros(2)
    saved["optimizer.exp_avg.head.bias"] = torch.zeros(VOCABULARY, dtype=torch.float64)
    before = state_digest(state)
    with pytest.raises(ValueError) as caught:
        state.load(saved)
    for part in (
        "missing model.norm.bias",
        "unknown model.extra",
        "model.head.bias is torch.float32[2], needed torch.float32[11]",
        "optimizer.exp_avg.head.bias is torch.float64[11], needed torch.float32[11]",
    ):
        assert part in str(caught.value)
    assert state_digest(state) == before, "a refused state changes nothing"


def test_models_that_nothing_could_make_reproducible_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"module '1' \(BatchNorm1d\) keeps running statistics"):
        FlatState(model, OptimizerSpec(), CPU)
    FlatState(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)), OptimizerSpec(), CPU)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        FlatState(frozen, OptimizerSpec(), CPU)


def test_unknown_optimizers_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'lion'"):
        OptimizerSpec("lion").moments  # noqa: B018
    with pytest.raises(ValueError, match="unknown optimizer 'lion'"):
        build_optimizer(OptimizerSpec("lion"), [torch.zeros(1)], [])


def test_models_of_vectors_only_and_tied_models_have_a_state() -> None:
    bias_only = nn.Linear(3, 5)
    bias_only.weight.requires_grad_(False)
    state = FlatState(bias_only, OptimizerSpec(), CPU)
    state.gradient.fill_(1.0)
    state.apply(0.1)
    assert state.updates == 1
    tied = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    tied[1].weight = tied[0].weight
    state = FlatState(tied, OptimizerSpec(), CPU)
    assert [slot.name for slot in state.slots] == ["0.weight"]
    state.weights.fill_(4.0)
    assert float(tied[1].get_parameter("weight").detach().min()) == 4.0


@settings(deadline=None, print_blob=True, max_examples=40)
@given(data=st.data())
def test_the_digest_tells_any_single_changed_element(data: st.DataObject) -> None:
    _, state = make()
    before = state_digest(state)
    assert before == state_digest(state)
    assert before.startswith("sha256:")
    tensors = dict(state.tensors())
    name = data.draw(st.sampled_from(sorted(set(tensors) - {"optimizer.updates"})))
    flat = tensors[name].detach().reshape(-1)
    index = data.draw(st.integers(0, flat.numel() - 1))
    raw = flat[index : index + 1].view(torch.int32)
    raw ^= 1 << data.draw(st.integers(0, 30))
    assert state_digest(state) != before
    state2 = make()[1]
    state2.updates = 1
    assert state_digest(state2) != before


# ---------------------------------------------------------------------------------------- chunks


@given(data=st.data(), ranks=st.integers(1, 7), sizes=st.lists(st.integers(0, 200), min_size=1, max_size=5))
def test_a_plan_brings_all_that_is_wanted_once_and_moves_nothing_that_is_there(
    data: st.DataObject, ranks: int, sizes: list[int]
) -> None:
    ranges = {f"range{index}": torch.zeros(size) for index, size in enumerate(sizes)}
    chunks = chunks_of(ranges, chunk_bytes=64)
    for name, tensor in ranges.items():
        pieces = [c for c in chunks if c.name == name]
        assert [i for c in pieces for i in range(c.offset, c.offset + c.length)] == list(range(tensor.numel()))
        assert all(c.num_bytes == 4 * c.length <= 64 for c in pieces)
    anyone = st.integers(0, ranks - 1)
    holders = {chunk: set(data.draw(st.lists(anyone, min_size=1, max_size=4))) for chunk in chunks}
    wanted = {chunk: set(data.draw(st.lists(anyone, max_size=4))) for chunk in chunks}
    plan = plan_transfers(chunks, holders, wanted)
    arrivals = Counter((t.chunk, t.target) for t in plan)
    assert set(arrivals) == {(c, target) for c in chunks for target in wanted[c] - holders[c]}
    assert set(arrivals.values()) <= {1}
    assert all(t.source in holders[t.chunk] for t in plan)
    assert plan == plan_transfers(reversed(chunks), holders, wanted), "every rank must come to the same plan"


@given(num_holders=st.integers(1, 6), num_targets=st.integers(1, 6), num_chunks=st.integers(1, 40))
def test_sources_that_hold_the_same_share_the_bytes(num_holders: int, num_targets: int, num_chunks: int) -> None:
    chunks = [Chunk("weights", 16 * i, 16, 64) for i in range(num_chunks)]
    holders = dict.fromkeys(chunks, range(num_holders))
    wanted = dict.fromkeys(chunks, range(num_holders, num_holders + num_targets))
    sent = Counter(t.source for t in plan_transfers(chunks, holders, wanted))
    counts = [sent[rank] for rank in range(num_holders)]
    assert max(counts) - min(counts) <= 1


def test_a_chunk_nobody_holds_is_named() -> None:
    chunk = Chunk("weights", 32, 16, 64)
    with pytest.raises(ValueError, match=r"no living holder of weights\[32:\+16\]"):
        plan_transfers([chunk], {chunk: ()}, {chunk: (0,)})


def test_a_reducer_refuses_other_pieces_than_its_own() -> None:
    layout = ParallelLayout(data=1, assignment=((0, 1, 2),))
    reducer = Reducer(Groups(rank=0, world_size=1, device=CPU), layout, 5, CPU)
    with pytest.raises(ValueError, match=r"rank 0 must bring the subtrees \(\(0, 3\),\), got \[\(0, 1\)\]"):
        reducer.reduce({(0, 1): torch.zeros(5)})
