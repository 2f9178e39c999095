"""Every layout, and every way from one to another, gives the losses, norms and state of one rank to the last bit."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

import strategies.state.training_state
from strategies.comm.fabric import Fabric
from strategies.compat import HANDS_ON_UNUSED
from strategies.gradient.router_loss import RouterLossSpec
from strategies.layout.parallel import SHARDS, ParallelLayout
from strategies.layout.placement import Domain
from strategies.layout.schedule import SCHEDULES
from strategies.layout.statemap import plan_transfers, whole
from strategies.model.fsdp import ShardedModelPart
from strategies.model.recompute import Recompute
from strategies.state.reshard import WINDOW
from strategies.update.engine import StepEngine
from tests.ranks.laid_out import (
    CPU,
    SPEC,
    VIRTUAL_WORKERS,
    Stretch,
    Trained,
    as_numbers,
    barrier,
    layout_of,
    make_engine,
    model_of,
    run_stretch,
    train,
    train_each,
)
from tests.ranks.local_ranks import HOST, PATIENCE_S, Endpoint, run_ranks
from tests.selection import nightly

TWO_PARTS = ("interleaved-1f1b", "zero-bubble")
"""Schedules that have two model parts on a stage."""
Numbers = tuple[list[float], list[float], str]


@functools.cache
def expected(
    steps: int = 2, dropout: float = 0.0, precision: str = "fp32", model: str = "llama",
    router_loss: RouterLossSpec | None = None, loss_chunk: int = SPEC.loss_chunk,
) -> Numbers:  # fmt: skip
    """What one rank computes."""
    settings = {"precision": precision, "model": model, "router_loss": router_loss, "loss_chunk": loss_chunk}
    (alone,) = run_ranks(1, train_with, [Stretch(layout_of(), steps)], dropout, settings)
    assert len(set(alone.losses)) == steps
    return as_numbers(alone)  # type: ignore[return-value]


def train_with(
    rank: int, address: Endpoint, stretches: Sequence[Stretch], dropout: float, settings: dict[str, Any]
) -> Trained:
    return train(rank, address, stretches, dropout, **settings)


def assert_all_give(numbers: Numbers, layouts: list[ParallelLayout], **settings: Any) -> None:
    """Losses and norms on every rank, the digest on the one that collects."""
    by_rank = run_ranks(max(layout.world_size for layout in layouts), train_each, layouts, settings, timeout_s=240.0)
    for number, layout in enumerate(layouts):
        for rank in range(layout.world_size):
            losses, norms, digest = by_rank[rank][number]
            where = f"rank {rank} of {layout.describe()} {layout.schedule}"
            assert (losses, norms) == numbers[:2], where
            assert digest == (numbers[2] if rank == 0 else ""), where


# ---------------------------------------------------------------------------------------- each by itself


def schedules_of(pipeline: int) -> tuple[str, ...]:
    """Five blocks can be cut into four parts, but not into six."""
    if pipeline == 1:
        return ("1f1b",)
    return SCHEDULES if pipeline == 2 else ("gpipe", "1f1b")


@pytest.mark.parametrize(
    ("data", "pipeline", "shard"),
    [
        (2, 2, "none"),
        (2, 2, "parameters"),
        *nightly((2, 2, shard) for shard in ("optimizer", "gradients")),
        *nightly((*sizes, shard) for sizes in [(2, 1), (3, 1), (1, 2), (1, 3), (2, 3)] for shard in SHARDS),
    ],
)
def test_any_layout_with_dropout_is_one_rank(data: int, pipeline: int, shard: str) -> None:
    if data == 1 and shard not in ("none", "parameters"):
        pytest.skip("one replica has nobody to shard with")
    layouts = [layout_of(data, pipeline, 1, shard, schedule) for schedule in schedules_of(pipeline)]
    assert_all_give(expected(dropout=0.1), layouts, dropout=0.1)


def test_layouts_without_dropout_are_one_rank() -> None:
    layouts = [layout_of(3, 1, 1, shard) for shard in SHARDS]
    layouts += [layout_of(2, 2, 1, shard, schedule) for shard, schedule in zip(SHARDS, SCHEDULES, strict=True)]
    assert_all_give(expected(), layouts)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layouts_whose_losses_fit_into_one_chunk_are_one_rank(precision: str) -> None:
    """As with the default chunk and short rows. Autograd has such a loss where its backward pass comes next; where it
    waits (gpipe, zero bubble) its gradients are made at once, to the same bits."""
    chunk = 1024
    layouts = [layout_of(3), layout_of(2, shard="parameters")]
    layouts += [layout_of(1, 2, 1, "none", schedule) for schedule in SCHEDULES]
    layouts += [layout_of(2, 2, 1, "gradients", "gpipe"), layout_of(2, 2, 1, "parameters", "zero-bubble")]
    assert_all_give(expected(precision=precision, loss_chunk=chunk), layouts, precision=precision, loss_chunk=chunk)


def test_layouts_of_a_model_whose_head_is_its_embedding_are_one_rank() -> None:
    """In a pipeline its two uses are on two ranks, or with zero bubble on one; with shards each rank has rows of
    both."""
    layouts = [layout_of(3, 1, 1, shard) for shard in SHARDS]
    layouts += [layout_of(2, 2, 1, shard, schedule) for shard, schedule in zip(SHARDS, SCHEDULES, strict=True)]
    layouts += [layout_of(1, 3), layout_of(2, 2, 1, "none", "zero-bubble")]
    assert_all_give(expected(model="tied"), layouts, model="tied")


@pytest.mark.parametrize("mode", ["full", *nightly(["selective"])])
def test_layers_that_recompute_give_what_they_give_otherwise(mode: Any) -> None:
    layouts = [layout_of(), layout_of(2, 1, 1, "parameters"), layout_of(2, 2, 1, "gradients")]
    layouts += [layout_of(1, 2, 1, "none", "zero-bubble"), layout_of(2, 2, 1, "parameters", "interleaved-1f1b")]
    assert_all_give(expected(dropout=0.1), layouts, dropout=0.1, recompute=Recompute(mode))


@pytest.mark.parametrize("over", ["step", *nightly(["micro-batch", "virtual-worker"])])
def test_layouts_of_a_mixture_whose_routers_add_to_the_loss_are_one_rank(over: Any) -> None:
    """Of the whole step, or of layers that other ranks have, choices are counted before; a spare takes part in that."""
    loss = RouterLossSpec(VIRTUAL_WORKERS, over, z=0.05, is_asking=True)
    settings: dict[str, Any] = {"dropout": 0.1, "model": "mixtral", "router_loss": loss}
    layouts = [layout_of(2, 2, 1, "gradients", "zero-bubble"), layout_of(3, spares=1), uneven(1, "parameters")]
    alone = expected(dropout=0.1, model="mixtral", router_loss=loss)
    assert_all_give(alone, layouts, **settings)


@pytest.mark.nightly
@pytest.mark.parametrize("over", ["micro-batch", "virtual-worker", "step"])
def test_more_layouts_of_such_a_mixture_are_one_rank(over: Any) -> None:
    loss = RouterLossSpec(VIRTUAL_WORKERS, over, z=0.05, is_asking=True)
    settings: dict[str, Any] = {"dropout": 0.1, "model": "mixtral", "router_loss": loss}
    layouts = [layout_of(2, 1, 1, "parameters"), layout_of(1, 2, 1, "none", "interleaved-1f1b")]
    alone = expected(dropout=0.1, model="mixtral", router_loss=loss)
    assert alone != expected(dropout=0.1, model="mixtral")
    assert_all_give(alone, layouts, **settings)
    layouts = [layout_of(2, 2, 1, "gradients", "zero-bubble"), layout_of(1, 2, 1, "none", "interleaved-1f1b")]
    assert_all_give(alone, layouts, recompute=Recompute("full"), **settings)


def uneven(pipeline: int, shard: str) -> ParallelLayout:
    """Replicas with five, none and three virtual workers."""
    even = layout_of(3, pipeline, 1, shard)
    return ParallelLayout(3, ((0, 2, 3, 6, 7), (), (1, 4, 5)), 1, pipeline, shard, "1f1b", even.parts)


@pytest.mark.parametrize("shard", ["none", "gradients", *nightly(["optimizer", "parameters"])])
def test_replicas_may_have_any_virtual_workers_or_none(shard: str) -> None:
    assert_all_give(expected(dropout=0.1), [uneven(1, shard), uneven(2, shard)], dropout=0.1)


@pytest.mark.parametrize("shard", ["parameters", *nightly(["none"])])
def test_stages_may_have_any_blocks(shard: str) -> None:
    """Also the embedding alone, and norm and head alone."""
    cuts = [((0, 1), (1, 6)), ((0, 5), (5, 6)), ((0, 1), (1, 2), (2, 5), (5, 6))]
    layouts = [layout_of(2, 2, 1, shard, "1f1b" if len(parts) == 2 else "zero-bubble", parts=parts) for parts in cuts]
    assert_all_give(expected(dropout=0.1), layouts, dropout=0.1)


@pytest.mark.parametrize("model", ["own", *nightly(["qwen3"])])
def test_layouts_of_other_models_are_one_rank(model: str) -> None:
    layouts = [layout_of(2, 2, 1, "parameters"), layout_of(2, 2, 1, "gradients", "zero-bubble"), layout_of(3)]
    assert_all_give(expected(dropout=0.1, model=model), layouts, dropout=0.1, model=model)


def possible(layouts: list[ParallelLayout]) -> list[ParallelLayout]:
    """Those in which the torch at hand can have parameters that a pass does not use (`hand_on_unused`)."""
    return [layout for layout in layouts if layout.shard != "parameters" or hasattr(FSDPModule, HANDS_ON_UNUSED)]


def test_parameters_that_no_loss_depends_on_stay_what_they_were_in_every_layout() -> None:
    """As torch leaves those that have no gradient: neither moved nor decayed, wherever they are held."""
    model = model_of("spare")
    initial = {name: p.detach().clone() for name, p in model.named_parameters() if ".spare." in f".{name}"}
    assert len(initial) == 6
    layouts = [layout_of(3), layout_of(3, 1, 1, "parameters"), layout_of(2, 2, 1, "optimizer", "zero-bubble")]
    assert_all_give(expected(dropout=0.1, model="spare"), possible(layouts), dropout=0.1, model="spare")
    alone = run_ranks(1, spares_after, Stretch(layout_of()))[0]
    assert alone.keys() == initial.keys()
    assert all(torch.equal(alone[name], initial[name]) for name in initial)


@pytest.mark.nightly
def test_parameters_that_no_loss_depends_on_stay_what_they_were_in_many_layouts() -> None:
    layouts = [layout_of(3, 1, 1, shard) for shard in SHARDS]
    layouts += [layout_of(2, 2, 1, shard, schedule) for shard, schedule in zip(SHARDS, SCHEDULES, strict=True)]
    layouts += [layout_of(1, 3), layout_of(2, 2, 1, "parameters", parts=((0, 1), (1, 6)))]
    assert_all_give(expected(dropout=0.1, model="spare"), possible(layouts), dropout=0.1, model="spare")


@pytest.mark.nightly
def test_parameters_that_no_loss_depends_on_stay_what_they_were_in_tensor_parallel_groups() -> None:
    layouts = possible([layout_of(2, tensor=2, shard="parameters"), layout_of(1, 2, 2)])
    split = run_ranks(4, train, [Stretch(layout) for layout in layouts], 0.0, 2, "fp32", None, "spare")
    once = run_ranks(2, train, [Stretch(layout_of(tensor=2), 2 * len(layouts))], 0.0, 2, "fp32", None, "spare")
    assert as_numbers(split[0]) == as_numbers(once[0])


def test_random_numbers_belong_to_layers_though_the_model_says_neither_that_it_draws_nor_its_order() -> None:
    """Its layers give more than hidden states, too."""
    layouts = [layout_of(3), layout_of(1, 2), layout_of(2, shard="parameters")]
    assert_all_give(expected(model="noisy"), layouts, model="noisy")


def test_gradients_of_what_many_layers_use_are_added_up_alike() -> None:
    assert_all_give(
        expected(model="remembering"), [layout_of(3, shard="parameters"), layout_of(2)], model="remembering"
    )


def test_frozen_parameters_are_sharded_and_change_nothing() -> None:
    layouts = [layout_of(3), layout_of(3, shard="parameters"), layout_of(2, 2, 1, "parameters")]
    assert_all_give(expected(dropout=0.1, model="frozen"), layouts, dropout=0.1, model="frozen")


def test_frozen_parameters_are_split_in_tensor_parallel_groups_and_change_nothing() -> None:
    layouts = possible([layout_of(2, tensor=2, shard="parameters"), layout_of(1, 2, 2)])
    split = run_ranks(4, train, [Stretch(layout, 1) for layout in layouts], 0.0, 2, "fp32", None, "frozen")
    once = run_ranks(2, train, [Stretch(layout_of(tensor=2), len(layouts))], 0.0, 2, "fp32", None, "frozen")
    assert as_numbers(split[0]) == as_numbers(once[0])
    alone = expected(model="frozen")[0]
    assert as_numbers(split[0])[0][: len(alone)] == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize(
    ("layout", "shares"),
    [
        (layout_of(tensor=2), {"model.embed_tokens": 2, "model.layers.0.mlp.down_proj": 2}),
        (layout_of(1, 2), {"model.embed_tokens": 1, "model.layers.0.mlp.down_proj": 1}),
        (layout_of(2, tensor=2, shard="parameters"), {"model.embed_tokens": 4, "model.layers.0.mlp.down_proj": 4}),
    ],
)
def test_a_rank_has_no_more_of_frozen_parameters_than_it_computes_with(
    layout: ParallelLayout, shares: dict[str, int]
) -> None:
    """The second stage has none of those of the first. Rows that do not divide are padded."""
    (layout,) = possible([layout])
    found = run_ranks(layout.world_size, frozen_sizes, layout, list(shares))
    model = model_of("frozen")
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in shares}
    first = {name: -(-len(each) // shares[name]) * each.shape[1] for name, each in weights.items()}
    second = first if layout.pipeline == 1 else dict.fromkeys(shares, 1)
    assert found == [first if layout.place(rank).stage == 0 else second for rank in range(layout.world_size)]


def frozen_sizes(rank: int, address: Endpoint, layout: ParallelLayout, names: Sequence[str]) -> dict[str, int]:
    """The elements that this rank has in memory of the weights of frozen modules, in the model and what it computes
    with."""
    engine = make_engine(model="frozen", tensor=layout.tensor, cuts=layout.pipeline > 1)
    fabric = Fabric(rank=rank, layout=layout, device=CPU)
    fabric.form(store_address=address, prefix="sizes", host=HOST, timeout_s=PATIENCE_S)
    held = [whole(engine.state.space.size, engine.state.space.tensor)] * layout.world_size
    nodes = [Domain("", str(each)) for each in range(layout.world_size)]
    engine.state.adopt_layout(layout, fabric, held, nodes, 2, 0, lambda: barrier(fabric))
    part = engine.state.arrangement.part
    assert part is not None
    models = [engine.state.blueprint.model, *(stage.module for stage in part.modules)]
    sizes = {name: max(_elements(model, name) for model in models) for name in names}
    fabric.drop()
    return sizes


def test_sharded_parameters_are_gathered_from_where_they_are_trained_and_no_gradient_stays() -> None:
    """Between steps a rank has its share of weights and moments; only the last one, whose rows may have to be padded to
    be as many as the others', has some twice."""
    found = run_ranks(3, left_over, layout_of(3, shard="parameters"))
    assert [twice > 0 for _, twice, _ in found] == [False, False, True]
    assert found[2][1] < found[2][0]
    assert [gradients for *_, gradients in found] == [[], [], []]
    whole_model = sum(parameter.numel() for parameter in model_of("llama").parameters())
    assert sum(rows for rows, _, _ in found) == whole_model


def left_over(rank: int, address: Endpoint, layout: ParallelLayout) -> tuple[int, int, list[str]]:
    """After a step: the elements of this rank's share, those of them that it has twice, and which parameters have a
    gradient."""
    engine = make_engine()
    state = engine.state
    fabric = Fabric(rank=rank, layout=layout, device=CPU)
    fabric.form(store_address=address, prefix="left over", host=HOST, timeout_s=PATIENCE_S)
    held = [whole(state.space.size, state.space.tensor)] * 3
    run_stretch(engine, fabric, Stretch(layout, 1), held, [Domain("", str(each)) for each in range(3)], 1, 0, Trained())
    part, own = state.arrangement.part, state.arrangement.own
    assert isinstance(part, ShardedModelPart)
    assert own is not None
    trained = own.weights.untyped_storage().data_ptr()
    rows = {slot.name: part.rows_of(slot.name) for slot, *_ in part.rows()}
    twice = sum(each.numel() for each in rows.values() if each.untyped_storage().data_ptr() != trained)
    of_stages = [p for stage in part.modules for p in stage.module.named_parameters()]
    return sum(each.numel() for each in rows.values()), twice, [name for name, p in of_stages if p.grad is not None]


def _elements(model: torch.nn.Module, name: str) -> int:
    weight: Any = getattr(_module_in(model, name), "weight", None)
    while hasattr(weight, "_local_tensor"):
        weight = weight._local_tensor
    return 0 if weight is None or weight.is_meta else weight.untyped_storage().nbytes() // weight.element_size()


def _module_in(model: torch.nn.Module, name: str) -> torch.nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


@pytest.mark.nightly
def test_a_compiled_model_is_compiled_in_every_layout() -> None:
    """Its kernels are others, and so are its bits."""
    layouts = [layout_of(2), layout_of(2, shard="optimizer"), layout_of(2, shard="gradients")]
    plain, alone = (run_ranks(1, compiled, [layout_of()], compiles)[0][0] for compiles in (False, True))
    assert alone != plain
    for rank in run_ranks(2, compiled, layouts, True):
        for losses, norms, _ in rank:
            assert (losses, norms) == alone[:2]
        assert {digest for *_, digest in rank} <= {alone[2], ""}


def compiled(rank: int, address: Endpoint, layouts: Sequence[ParallelLayout], compiles: bool) -> list[Numbers]:
    # Ranks of tests may have no processes of their own, which the compiler would have for its work.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    spec = replace(SPEC, compile=compiles, loss_chunk=1024)
    found = []
    for number, layout in enumerate(layouts):
        engine = make_engine(spec=spec, model="llama of two layers")
        fabric = Fabric(rank=rank, layout=layout, device=CPU)
        fabric.form(store_address=address, prefix=f"compiled{number}", host=HOST, timeout_s=PATIENCE_S)
        held = [whole(engine.state.space.size, 1)] * layout.world_size
        nodes = [Domain("", str(each)) for each in range(layout.world_size)]
        seen = Trained()
        run_stretch(engine, fabric, Stretch(layout, 2), held, nodes, 2, 0, seen)
        fabric.drop()
        found.append(as_numbers(seen))
    return found  # type: ignore[return-value]


def test_frozen_parameters_may_be_shared_and_be_all_that_a_stage_has() -> None:
    """By two layers, by the first and the last stage, and with nothing trained in the first."""
    parts = ((0, 2), (2, 6))
    layouts = [layout_of(2, shard="parameters"), layout_of(2, 2, 1, "parameters", parts=parts)]
    layouts += [layout_of(2, 2, 1, "gradients", parts=parts)]
    assert_all_give(expected(model="shared"), layouts, model="shared")


def test_frozen_parameters_stay_where_they_are_until_all_ranks_have_the_layout() -> None:
    """A rank that is interrupted before goes on computing with them."""
    found = run_ranks(2, moved_off, layout_of(2, shard="parameters"))
    assert found == 2 * [([], ["model.embed_tokens.weight"])]


def moved_off(rank: int, address: Endpoint, layout: ParallelLayout) -> tuple[list[str], list[str]]:
    """The frozen parameters with rows that were dropped before an interrupted barrier, and after a passed one."""
    engine = make_engine(model="shared")
    state, frozen = engine.state, engine.state.blueprint.frozen
    fabric = Fabric(rank=rank, layout=layout, device=CPU)
    fabric.form(store_address=address, prefix="moved", host=HOST, timeout_s=PATIENCE_S)
    held = [whole(state.space.size, state.space.tensor)] * 2
    nodes = [Domain("", "0"), Domain("", "1")]
    moved: list[str] = []

    def drop(names: Sequence[str]) -> None:
        moved.extend(name for name in names if "embed" in name)

    def interrupted() -> None:
        raise RuntimeError("interrupted")

    frozen.drop = drop  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="interrupted"):
        state.adopt_layout(layout, fabric, held, nodes, 2, 0, interrupted)
    before = list(moved)
    state.adopt_layout(layout, fabric, held, nodes, 2, 0, lambda: barrier(fabric))
    fabric.drop()
    return before, moved


def test_the_fault_of_a_nan_reaches_what_is_trained() -> None:
    """Also where the first block is frozen, and is reduced no gradient."""
    for layout in (layout_of(2, shard="parameters"), layout_of(2)):
        assert run_ranks(2, spoilt_step, layout) == 2 * [(2, expected(model="shared")[0][:1])]


def spoilt_step(rank: int, address: Endpoint, layout: ParallelLayout) -> tuple[int, list[float]]:
    """How often a step is computed whose gradient is made NaN once, and its loss."""
    engine = make_engine(model="shared")
    fabric = Fabric(rank=rank, layout=layout, device=CPU)
    fabric.form(store_address=address, prefix=layout.shard, host=HOST, timeout_s=PATIENCE_S)
    held = [whole(engine.state.space.size, engine.state.space.tensor)] * 2
    nodes = [Domain("", "0"), Domain("", "1")]
    engine.state.adopt_layout(layout, fabric, held, nodes, 2, 0, lambda: barrier(fabric))
    engine.bind(fabric, layout, 0)
    computed, compute = [], engine.work.run

    def counted(*arguments: Any) -> None:
        computed.append(arguments)
        compute(*arguments)

    engine.work.run = counted  # type: ignore[method-assign]
    engine.nan_step = 0
    (record,), _ = engine.run(0)
    fabric.drop()
    return len(computed), [record.loss]


def test_a_rank_has_its_rows_of_frozen_parameters_and_reads_them_again_in_another_layout() -> None:
    found = run_ranks(3, frozen_rows, [layout_of(3, shard="parameters"), layout_of(2, shard="parameters")])
    model = model_of("frozen")
    embedding = model.get_submodule("model.embed_tokens").weight
    by_three = [rows[0] for rows in found]
    assert [len(rows) for rows in by_three] == [len(part) for part in embedding.chunk(3)]
    assert torch.equal(torch.cat(by_three), embedding)
    assert torch.equal(torch.cat([rows[1] for rows in found[:2]]), embedding)


def frozen_rows(rank: int, address: Endpoint, layouts: Sequence[ParallelLayout]) -> list[torch.Tensor]:
    """What this rank computes with of the frozen embedding, in each layout that it is in."""
    engine = make_engine(model="frozen")
    return [
        rows_in(engine, Fabric(rank=rank, layout=layout, device=CPU), address)
        for layout in layouts
        if rank < layout.world_size
    ]


def rows_in(engine: StepEngine, fabric: Fabric, address: Endpoint) -> torch.Tensor:
    ranks = fabric.layout.world_size
    fabric.form(store_address=address, prefix=f"frozen{ranks}", host=HOST, timeout_s=PATIENCE_S)
    held = [whole(engine.state.space.size, engine.state.space.tensor)] * ranks
    nodes = [Domain("", str(each)) for each in range(ranks)]
    engine.state.adopt_layout(fabric.layout, fabric, held, nodes, 2, 0, lambda: barrier(fabric))
    part = engine.state.arrangement.part
    assert part is not None
    weight: Any = part.modules[0].module.get_parameter("model.embed_tokens.weight")
    rows: torch.Tensor = weight.to_local().clone()
    fabric.drop()
    return rows


def spares_after(rank: int, address: Endpoint, stretch: Stretch) -> dict[str, torch.Tensor]:
    """The unused parameters after some steps of one rank."""
    engine = make_engine(model="spare")
    fabric = Fabric(rank=rank, layout=stretch.layout, device=CPU)
    fabric.form(store_address=address, prefix="spares", host=HOST, timeout_s=PATIENCE_S)
    try:
        held = [whole(engine.state.space.size, engine.state.space.tensor)]
        run_stretch(engine, fabric, stretch, held, [Domain("", "0")], 1, 0, Trained())
    finally:
        fabric.drop()
    values = {name.removeprefix("model."): tensor.clone() for name, tensor in engine.state.named()}
    return {name: values[name] for name in engine.state.blueprint.unused}


@pytest.mark.parametrize(
    "layout",
    [
        layout_of(2, 1, 1, "parameters"),
        layout_of(1, 2, schedule="zero-bubble"),
        *nightly([layout_of(2), layout_of(tensor=2)]),
    ],
    ids=ParallelLayout.describe,
)
def test_a_model_that_changes_itself_after_many_steps_ends_its_step_in_every_layout(layout: ParallelLayout) -> None:
    found = run_ranks(layout.world_size, changes, Stretch(layout, 20))
    assert any("ModelChanged: the model has changed 'model.layers.1.self_attn.rate'" in text for text, _ in found), (
        found
    )
    assert all(steps == found[0][1] and 0 < steps < 20 for _, steps in found), "no rank has more steps than another"


def changes(rank: int, address: Endpoint, stretch: Stretch) -> tuple[str, int]:
    """How training ends, and how many steps were made until then."""
    engine = make_engine(model="drifting", tensor=stretch.layout.tensor)
    seen = Trained()
    fabric = Fabric(rank=rank, layout=stretch.layout, device=CPU)
    fabric.form(store_address=address, prefix="changes", host=HOST, timeout_s=PATIENCE_S)
    held = [whole(engine.state.space.size, engine.state.space.tensor)] * stretch.layout.world_size
    try:
        run_stretch(engine, fabric, stretch, held, [Domain("", str(n)) for n in range(len(held))], 1, 0, seen)
    except Exception as error:
        return f"{type(error).__name__}: {error}", len(seen.losses)
    finally:
        fabric.drop()
    return "", len(seen.losses)


def test_layouts_in_bf16_are_one_rank() -> None:
    layouts = [layout_of(3), layout_of(2, 1, 1, "parameters"), layout_of(2, 1, 1, "gradients")]
    layouts += [layout_of(1, 2, 1, "none", "zero-bubble"), layout_of(2, 2, 1, "optimizer", "gpipe")]
    layouts += [layout_of(2, 2, 1, "parameters", "interleaved-1f1b")]
    assert expected(precision="bf16") != expected()
    assert_all_give(expected(precision="bf16"), layouts, precision="bf16")


# ---------------------------------------------------------------------------------------- tensor parallelism


@functools.cache
def expected_split(model: str = "llama", precision: str = "fp32") -> Numbers:
    """What one replica of one stage computes at tensor degree 2; the same to rounding as without."""
    alone, other = run_ranks(2, train, [Stretch(layout_of(tensor=2))], 0.0, 2, precision, None, model)
    assert (alone.losses, alone.norms) == (other.losses, other.norms)
    losses, norms, digest = expected(precision=precision, model=model)
    assert digest != alone.digest or model == "own"
    assert alone.losses == pytest.approx(losses, rel=1e-5 if precision == "fp32" else 1e-2)
    assert alone.norms == pytest.approx(norms, rel=1e-4 if precision == "fp32" else 2e-2)
    return as_numbers(alone)  # type: ignore[return-value]


@pytest.mark.parametrize("shard", ["parameters", *nightly(["none", "optimizer", "gradients"])])
def test_layouts_of_tensor_parallel_groups_are_one_such_group(shard: str) -> None:
    model = "llama of two layers"
    assert_all_give(expected_split(model), [layout_of(2, 1, 2, shard)], model=model)


@pytest.mark.nightly
@pytest.mark.parametrize("shard", SHARDS)
def test_pipelines_of_tensor_parallel_groups_are_one_such_group(shard: str) -> None:
    assert_all_give(expected_split(), [layout_of(1, 2, 2, shard, "zero-bubble")])


@pytest.mark.nightly
@pytest.mark.parametrize("shard", SHARDS)
def test_layouts_of_all_axes_are_one_tensor_parallel_group(shard: str) -> None:
    assert_all_give(expected_split(), [layout_of(2, 2, 2, shard), layout_of(1, 2, 2, shard, "1f1b")])


@pytest.mark.nightly
@pytest.mark.parametrize("model", ["mixtral", "gpt_neox", "olmo2", "qwen3", "own", "deepseek_v3", "opt", "gpt2"])
def test_other_models_are_split_by_their_own_plans(model: str) -> None:
    """Among them norms of single heads (qwen3) and of all heads (olmo2), one matrix for all inputs of attention, a part
    of each expert (mixtral), and keys of which a part is every head's (deepseek_v3)."""
    assert_all_give(expected_split(model), [layout_of(1, 2, 2)], model=model)


@pytest.mark.nightly
@pytest.mark.parametrize("model", ["gpt_neox", "olmo2", "qwen3", "own", "mixtral", "deepseek_v3", "gpt2", "opt"])
def test_other_models_that_are_split_are_sharded(model: str) -> None:
    assert_all_give(expected_split(model), [layout_of(2, 1, 2, "parameters")], model=model)


@pytest.mark.nightly
@pytest.mark.parametrize("over", ["step", "micro-batch", "virtual-worker"])
def test_a_mixture_that_is_split_is_balanced_alike(over: Any) -> None:
    loss = RouterLossSpec(VIRTUAL_WORKERS, over, z=0.05, is_asking=True)
    alone, _ = run_ranks(2, train_with, [Stretch(layout_of(tensor=2))], 0.0, {"model": "mixtral", "router_loss": loss})
    whole_model = expected(model="mixtral", router_loss=loss)
    assert alone.losses == pytest.approx(whole_model[0], rel=1e-5)
    assert alone.norms == pytest.approx(whole_model[1], rel=1e-4)
    layouts = [layout_of(1, 2, 2), layout_of(2, 1, 2)]
    assert_all_give(as_numbers(alone), layouts, model="mixtral", router_loss=loss)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["own", *nightly(["llama"])])
def test_tensor_parallel_groups_in_bf16_are_one_such_group(model: str) -> None:
    layouts = [layout_of(1, 2, 2), layout_of(2, 1, 2, "parameters")]
    assert_all_give(expected_split(model, "bf16"), layouts, precision="bf16", model=model)


# ---------------------------------------------------------------------------------------- from layout to layout


def journey(seed: int, tensor: int, processes: int = 6, legs: int = 5) -> list[Stretch]:
    """Random layouts one after another, a step each, on random ranks. Between two of them one of the ranks that have
    state is lost, if it is not the only one; who has state and is left over is a spare, which hands it over.
    """
    rng = random.Random(seed)
    stretches: list[Stretch] = []
    for _ in range(legs):
        placed = tensor * rng.choice([n for n in (1, 2, 3, 4, 5, 6) if n * tensor <= processes])
        members = rng.sample(range(processes), placed)
        if stretches:
            before = stretches[-1]
            had_state = list(before.ranks or ())[: before.layout.num_placed]
            lost = rng.choice(had_state) if len(had_state) > 1 else None
            members = [process for process in had_state if process != lost]
            others = [process for process in range(processes) if process not in members and process != lost]
            members += rng.sample(others, min(len(others), max(0, placed - len(members))))
            placed = min(placed, len(members)) // tensor * tensor
            rng.shuffle(members)
        units = placed // tensor
        pipeline = rng.choice([stages for stages in (1, 2, 3) if units % stages == 0])
        schedule = rng.choice(schedules_of(pipeline))
        layout = layout_of(
            units // pipeline, pipeline, tensor, rng.choice(SHARDS), schedule, spares=len(members) - placed
        )
        stretches.append(Stretch(layout, 1, tuple(members)))
    return stretches


def travel(stretches: list[Stretch], **settings: Any) -> list[Trained]:
    print([(*stretch.layout.describe().values(), stretch.layout.schedule, stretch.ranks) for stretch in stretches])
    return run_ranks(6, functools.partial(train, **settings), stretches, timeout_s=240.0)


def assert_arrived(stretches: list[Stretch], seen: list[Trained], numbers: Numbers) -> None:
    """The digest, and the losses and norms of the steps that each process took part in."""
    losses, norms, digest = numbers
    members = [stretch.ranks or () for stretch in stretches for _ in range(stretch.steps)]
    assert seen[members[-1][0]].digest == digest
    for process, trained in enumerate(seen):
        steps = [step for step, ranks in enumerate(members) if process in ranks]
        assert trained.losses == [losses[step] for step in steps]
        assert trained.norms == [norms[step] for step in steps]


@pytest.mark.parametrize("seed", [0, 1, *nightly(range(2, 16))])
def test_layouts_may_change_and_ranks_be_lost_after_every_step(seed: int) -> None:
    stretches = journey(seed, tensor=1)
    assert_arrived(stretches, travel(stretches, dropout=0.1), expected(5, 0.1))


@functools.cache
def expected_journey(tensor: int, legs: int, model: str) -> Numbers:
    stretch = Stretch(layout_of(tensor=tensor), legs)
    return as_numbers(run_ranks(tensor, train, [stretch], 0.0, 2, "fp32", None, model)[0])  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("seed", "processes", "legs", "model"),
    [(0, 4, 4, "own"), *nightly([(seed, 6, 5, "llama") for seed in range(6)])],
)
def test_layouts_of_tensor_parallel_groups_may_change_too(seed: int, processes: int, legs: int, model: str) -> None:
    stretches = journey(seed, 2, processes, legs)
    assert_arrived(stretches, travel(stretches, model=model), expected_journey(2, legs, model))


@pytest.mark.parametrize("shard", ["none", "parameters", *nightly(["optimizer", "gradients"])])
def test_a_state_with_three_copies_outlives_two_of_three_nodes(shard: str) -> None:
    nodes = ["a", "a", "b", "b", "c", "c"]
    stretches = [
        Stretch(layout_of(3, 2, 1, shard), 2, (0, 1, 2, 3, 4, 5)),
        Stretch(layout_of(2, 1, 1, shard), 2, (5, 4)),
        Stretch(layout_of(), 1, (4,)),
    ]
    seen = travel(stretches, dropout=0.1, copies=3, domains=nodes, model="own")
    assert_arrived(stretches, seen, expected(5, 0.1, model="own"))


# ---------------------------------------------------------------------------------------- what moves


@dataclass(frozen=True)
class Change:
    """From a layout to another, and the processes that may receive anything."""

    before: Stretch
    after: Stretch
    receive: tuple[int, ...] = ()


STILL = {
    "the same layout": Change(Stretch(layout_of(2, 2, 1, "parameters")), Stretch(layout_of(2, 2, 1, "parameters"))),
    "another schedule": Change(Stretch(layout_of(2, 2)), Stretch(layout_of(2, 2, schedule="gpipe"))),
    "the next ZeRO stage": Change(Stretch(layout_of(3, 1, 1, "optimizer")), Stretch(layout_of(3, 1, 1, "gradients"))),
    "a replica less": Change(Stretch(layout_of(3)), Stretch(layout_of(2), ranks=(2, 0))),
    "other stages of the same blocks": Change(Stretch(layout_of(2)), Stretch(layout_of(1, 2))),
    "a replica more": Change(Stretch(layout_of(2)), Stretch(layout_of(3), ranks=(1, 2, 0)), (2,)),
    "a replica of two stages more": Change(
        Stretch(layout_of(1, 2, 1)), Stretch(layout_of(2, 2), ranks=(0, 1, 2, 3)), (2, 3)
    ),
    "a spare": Change(Stretch(layout_of(2)), Stretch(layout_of(2, spares=1))),
}


@pytest.mark.parametrize("name", STILL)
def test_nothing_moves_that_is_where_it_is_wanted(name: str) -> None:
    change = STILL[name]
    program = functools.partial(train, model="own")
    seen = run_ranks(4, program, [change.before, change.after], 0.0, 1, timeout_s=240.0)
    for process, trained in enumerate(seen):
        for number, received in enumerate(trained.received):
            is_new = number == len(trained.received) - 1 and process in change.receive
            assert (received > 0) == is_new, f"process {process} received {trained.received}"


def test_a_new_replica_receives_the_state_once() -> None:
    size = make_engine().state.space.size
    seen = run_ranks(3, train, [Stretch(layout_of(2)), Stretch(layout_of(3))])
    assert [trained.received for trained in seen] == [[0, 0], [0, 0], [4 * 3 * size]]


MAX_ELEMENTS = 1000


def train_in_small_transfers(rank: int, address: Endpoint, stretches: list[Stretch]) -> Trained:
    """The tests' models are smaller than the largest transfer; here it is smaller than they are."""
    small = functools.partial(plan_transfers, max_elements=MAX_ELEMENTS)
    strategies.state.training_state.plan_transfers = small  # type: ignore[assignment]
    return train(rank, address, stretches)


@pytest.mark.parametrize("shard", ["none", "parameters"])
def test_a_reshard_needs_buffers_for_a_few_transfers_only(shard: str) -> None:
    after = layout_of(3, 1, 1, shard, spares=2)
    stretches = [Stretch(layout_of(2, 2, 1, shard)), Stretch(after, 1, (3, 4, 1, 5, 2))]
    seen = run_ranks(6, train_in_small_transfers, stretches)
    most = WINDOW * 4 * (3 * MAX_ELEMENTS + 4)
    assert most / 2 < max(max(trained.buffers, default=0) for trained in seen) <= most
    assert max(sum(trained.received) for trained in seen) > 10 * most, "a state of many transfers"
    assert seen[3].digest == expected(3)[2]
