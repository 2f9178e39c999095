"""Codes of sums: what they stand for, what they leave out, and that they are always those of the same elements."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.comm.gloo import Gloo
from strategies.comm.groups import Groups
from strategies.layout.parallel import ParallelLayout
from strategies.layout.space import FlatRanges, Space
from strategies.reduction.coded import CodedSum, Residual, Rounding
from strategies.reduction.power import PowerReducer, matrices_of
from strategies.reduction.residuals import Residuals, rounded_nodes
from strategies.reduction.tree import Subtree
from strategies.state.virtual_shard import VirtualShard
from strategies.wire.blocks import Blocks, from_message, to_message
from strategies.wire.codecs import Codec, Int8, TopK, codec_of
from strategies.wire.format import WireFormat

FORMATS = [
    WireFormat("bf16"), WireFormat("int8"), WireFormat("int4"), WireFormat("top_k", fraction=0.01),
    WireFormat("top_k", fraction=0.3),
]  # fmt: skip
MOST_SENT = {"bf16": 0.5, "int8": 0.27, "int4": 0.15, "top_k": 0.02}
ids = [f"{wire.name} {wire.fraction or ''}".strip() for wire in FORMATS]


def blocks_of_noise(codec: Codec, rows: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn((rows, codec.block), generator=generator) * torch.logspace(-9, 3, rows)[:, None]


@pytest.mark.parametrize("wire", FORMATS[:4], ids=ids[:4])
def test_no_more_is_sent_than_promised(wire: WireFormat) -> None:
    codec = codec_of(wire)
    assert codec.encode(blocks_of_noise(codec)).numel() == 5 * codec.words
    assert codec.ratio <= MOST_SENT[wire.name]


@pytest.mark.parametrize("wire", FORMATS, ids=ids)
def test_errors_are_within_the_formats_bounds_and_blocks_are_coded_by_themselves(wire: WireFormat) -> None:
    codec = codec_of(wire)
    values = blocks_of_noise(codec)
    found = codec.decode(codec.encode(values))
    largest = values.abs().amax(dim=1, keepdim=True)
    match wire.name:
        case "bf16":
            assert torch.equal(found, values.to(torch.bfloat16).float())
        case "top_k":
            kept = round(wire.fraction * codec.block)
            assert (found != 0).sum(dim=1).tolist() == [kept] * len(values)
            assert torch.equal(found[found != 0], values[found != 0]), "what is sent is sent as it is"
            left = torch.where(found == 0, values.abs(), 0).amax(dim=1)
            assert bool((left <= torch.where(found != 0, values.abs(), math.inf).amin(dim=1)).all())
        case name:
            most = {"int8": 127, "int4": 7}[name]
            assert bool(((found - values).abs() <= largest / most * 0.5001).all())
    one_by_one = torch.cat([codec.decode(codec.encode(row[None])) for row in values])
    assert torch.equal(one_by_one, found)
    assert not codec.decode(codec.encode(torch.zeros_like(values))).any()


def test_of_equal_values_those_come_first_that_are_first() -> None:
    codec = TopK(0.01)
    values = torch.full((1, codec.block), -2.0)
    values[0, [7, 100, 4000]] = torch.tensor([3.0, -3.0, 0.5])
    places = codec.decode(codec.encode(values)).nonzero()[:, 1].tolist()
    assert places == [*range(codec.kept - 1), 100][: codec.kept]
    tied = torch.ones((2, codec.block))
    assert codec.decode(codec.encode(tied)).nonzero()[:, 1].tolist() == [*range(codec.kept)] * 2


@pytest.mark.parametrize("wire", FORMATS, ids=ids)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so_and_its_neighbours_are_fine(wire: WireFormat, bad: float) -> None:
    codec = codec_of(wire)
    values = blocks_of_noise(codec)
    sound = codec.decode(codec.encode(values))
    values[2, 5] = bad
    found = codec.decode(codec.encode(values))
    assert not found[2].isfinite().all()
    assert torch.equal(found[[0, 1, 3, 4]], sound[[0, 1, 3, 4]])


def test_the_smallest_numbers_do_not_become_infinite() -> None:
    for wire in FORMATS:
        codec = codec_of(wire)
        tiny = torch.full((1, codec.block), 1e-44)
        assert codec.decode(codec.encode(tiny)).isfinite().all(), wire


# ---------------------------------------------------------------------------------------- blocks of a model

SHAPES = [("a", (24, 100)), ("norm", (40,)), ("b", (3, 5)), ("c", (64, 64))]


def space_of(wire_block: int) -> Space:
    return Space.of(
        ((name, shape, number, None) for number, (name, shape) in enumerate(SHAPES)), 1, wire_block=wire_block
    )  # fmt: skip


@given(parts=st.integers(1, 5), stage=st.sampled_from([None, [(0, 2)], [(2, 4)]]), wire=st.sampled_from(FORMATS[:4]))
def test_wherever_a_model_is_cut_the_same_elements_are_coded_together(
    parts: int, stage: list[tuple[int, int]] | None, wire: WireFormat
) -> None:
    codec = codec_of(wire)
    space = space_of(codec.block)
    everything = FlatRanges.of([(0, space.size)], space.boundary)
    values = torch.randn(space.size, generator=torch.Generator().manual_seed(3))
    for slot in space.slots:
        values[slot.offset + slot.numel : slot.stop] = 0
    expected = values.clone()
    whole = Blocks.of(space, everything, codec.block)
    whole.put(codec.decode(codec.encode(whole.take(values))), expected)

    flat = FlatRanges.of(space.ranges_of(stage), space.boundary)
    own, found = torch.zeros(flat.size), torch.zeros(flat.size)
    for start, stop in flat.ranges:
        for first, offset, length in flat.locate(start, stop):
            own[offset : offset + length] = values[first : first + length]
    blocks = Blocks.of(space, flat, codec.block)
    codes = codec.encode(blocks.take(own))
    sizes = space.slices(flat, parts)
    bounds = [sum(sizes[:part]) for part in range(parts + 1)]
    sent = 0
    for start, stop in pairwise(bounds):
        part = blocks.cut(start, stop)
        low, high = blocks.numbers(start, stop)
        message = torch.cat(to_message(part, codes[low:high], own[start:stop]))
        assert len(message) == part.num_words(codec)
        sent += len(message)
        arrived = from_message(part, codec, message, found[start:stop])
        assert arrived is not None
        assert torch.equal(arrived, codes[low:high])
    assert sent == blocks.num_words(codec), "no block is sent twice"
    for start, stop in flat.ranges:
        for first, offset, length in flat.locate(start, stop):
            assert torch.equal(found[offset : offset + length], expected[first : first + length])
    vectors = [slot for slot in space.slots if len(slot.shape) < 2]
    for slot in vectors:
        assert torch.equal(expected[slot.offset : slot.stop], values[slot.offset : slot.stop]), "sent as they are"


# ---------------------------------------------------------------------------------------- what is rounded off


WITH_FEEDBACK = [
    WireFormat("int8", feedback=True), WireFormat("int4", feedback=True, across=2),
    WireFormat("top_k", fraction=0.01, feedback=True),
]  # fmt: skip


@pytest.mark.parametrize("wire", WITH_FEEDBACK, ids=lambda wire: wire.name)
def test_what_is_sent_and_what_is_left_are_together_what_was_computed(wire: WireFormat) -> None:
    """In every step: the sum that is applied, and all that nodes have kept, are the sum of all gradients so far."""
    count, size, root = 6, 4096, (0, 6)
    blocks = Blocks([(0, size)], codec_of(wire).block, size)
    nodes = rounded_nodes(root, wire)
    now = {node: torch.zeros(size) for node in nodes}
    after = {node: torch.zeros(size) for node in nodes}
    applied, computed = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for step in range(8):
        kept_of = {node: Residual(now[node], after[node]) for node in nodes}
        rounding = Rounding(wire, blocks, kept_of.__getitem__)
        total = CodedSum(root, [], rounding)
        for leaf in range(count):
            gradient = torch.randn(size, generator=generator)
            computed += gradient
            total.add((leaf, leaf + 1), gradient)
        applied += total.total()
        now, after = after, now
        kept = torch.stack([each.double() for each in now.values()]).sum(dim=0)
        error = (applied + kept - computed).abs().max()
        assert error < 1e-5 * (1 + step), f"step {step}: {error}"
        assert kept.abs().max() > 1e-3, "something is rounded off"


def test_what_power_sgd_sends_and_keeps_is_together_what_was_computed() -> None:
    shapes = [("a", (40, 24)), ("norm", (24,)), ("b", (16, 100))]
    space = Space.of(((name, shape, 0, None) for name, shape in shapes), 1)
    flat = FlatRanges.of([(0, space.size)], space.boundary)
    layout = ParallelLayout(1, (tuple(range(5)),))
    matrices = matrices_of(space, flat, 2, lambda name: len(name))
    kept = {(v, v + 1): [torch.zeros(flat.size), torch.zeros(flat.size)] for v in range(5)}
    factor = [torch.zeros(flat.size), torch.zeros(flat.size)]
    groups = Groups(rank=0, world_size=1, device=torch.device("cpu"), transport=Gloo())
    reducer = PowerReducer(
        groups, layout, flat, matrices, 2, torch.device("cpu"), [flat.size], lambda: Residual(*factor),
        lambda node: Residual(*kept[node]), 1,
    )  # fmt: skip
    applied, computed = torch.zeros(flat.size), torch.zeros(flat.size)
    generator = torch.Generator().manual_seed(1)
    errors = []
    for step in range(6):
        # Low rank, and noise: what is sent gets better with every step.
        base = torch.randn(flat.size, generator=torch.Generator().manual_seed(9))
        pieces = {}
        for node in kept:
            gradient = base + 0.3 * torch.randn(flat.size, generator=generator)
            for slot in space.slots:
                gradient[slot.offset + slot.numel : slot.stop] = 0
            computed += gradient
            pieces[node] = gradient
        reducer.begin(step)
        found = torch.empty(flat.size)
        reducer.gather_sum(reducer.reduce(pieces), found)
        applied += found
        if step:
            factor.reverse()
            for pair in kept.values():
                pair.reverse()
        left = torch.stack([now for now, _ in kept.values()]).sum(dim=0)
        assert (applied + left - computed).abs().max() < 1e-4, f"step {step}"
        errors.append(float((applied - computed).norm() / computed.norm()))
    assert errors[0] < 1e-6, "the first step is sent as it is"
    assert errors[1] > 0.05, "and later ones are not"
    vectors = next(slot for slot in space.slots if slot.name == "norm")
    inside = slice(vectors.offset, vectors.stop)
    assert (applied[inside] - computed[inside]).abs().max() < 1e-4


def test_the_nodes_that_round_are_fixed_by_the_job() -> None:
    assert rounded_nodes((0, 4), WireFormat("int8")) == ((0, 1), (1, 2), (0, 2), (2, 3), (3, 4), (2, 4), (0, 4))
    assert rounded_nodes((0, 4), WireFormat("int8", across=2)) == ((0, 2), (2, 4), (0, 4))
    assert rounded_nodes((0, 4), WireFormat()) == ()
    residuals = Residuals((0, 3), WireFormat("int4", feedback=True))
    assert residuals.number == 5
    assert [residuals.index(node) for node in residuals.nodes] == list(range(5))


def test_codes_are_kept_of_the_sums_that_are_sent_only() -> None:
    wire = WireFormat("int8")
    total = CodedSum((0, 4), [], Rounding(wire, Blocks([(0, 256)], Int8.block, 256), _no_residual))
    for leaf in (0, 1, 3):
        total.add((leaf, leaf + 1), torch.randn(256))
    assert total.codes.keys() == total.pieces.keys() == {(0, 2), (3, 4)}


def test_a_sum_is_not_gone_on_with_when_what_it_rounded_off_is_gone() -> None:
    """A rank may give virtual workers away and get them back before it computes again: then they are as they were."""
    wire = WireFormat("int8", feedback=True)
    blocks = Blocks([(0, 256)], Int8.block, 256)
    shards = {node: shard_of_256() for node in rounded_nodes((0, 4), wire)}

    def residual(node: Subtree) -> Residual:
        is_put = shards[node].has_prepared(("residual",))
        return Residual(shards[node].now("residual"), shards[node].prepared("residual"), is_put)

    rounding = Rounding(wire, blocks, residual)
    sums = rounding.start((0, 4), [])
    for leaf in (0, 1, 2):
        sums.add((leaf, leaf + 1), torch.randn(256))
    assert rounding.go_on(sums)
    for lost in ((0, 2), (1, 2), (2, 3)):
        before, shards[lost] = shards[lost], shard_of_256()
        assert not rounding.go_on(sums), f"of {lost}"
        shards[lost] = before
    shards[3, 4] = shard_of_256()
    assert rounding.go_on(sums), "what was not rounded yet makes no difference"
    assert Rounding(WireFormat("int8"), blocks, _no_residual).go_on(sums)


def shard_of_256() -> VirtualShard:
    return VirtualShard(1, FlatRanges.of([(0, 256)], 256), ("residual",), torch.device("cpu"), is_made=True)


def test_what_is_prepared_counts_from_the_commit_on_and_not_if_that_never_comes() -> None:
    shard = shard_of_256()
    shard.prepared("residual").fill_(1.0)
    assert not shard.now("residual").any()
    shard.discard()
    shard.commit()
    assert not shard.now("residual").any(), "the step was skipped"
    shard.prepared("residual").fill_(2.0)
    shard.commit()
    assert bool((shard.now("residual") == 2).all())
    assert torch.equal(shard.to_send("residual"), shard.now("residual")), "a step that changes nothing"
    shard.commit()
    assert bool((shard.now("residual") == 2).all())


def _no_residual(node: Subtree) -> Residual:
    raise AssertionError(f"nobody asked for feedback at {node}")


@pytest.mark.parametrize("wire", FORMATS, ids=ids)
def test_the_planner_knows_what_is_sent(wire: WireFormat) -> None:
    assert wire.share == codec_of(wire).ratio
