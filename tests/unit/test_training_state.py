"""What a rank has of the training state: its parameters, its updates, its names, and what counts when."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from strategies.comm.fabric import Fabric
from strategies.layout.parallel import ParallelLayout
from strategies.layout.placement import Domain
from strategies.layout.space import ALIGNMENT
from strategies.layout.statemap import NOTHING, NotCovered, whole
from strategies.model.blueprint import Blueprint
from strategies.model.model_part import ModelPart
from strategies.model.values import BuiltValues
from strategies.optim.adamw import ADAMW
from strategies.optim.sgd import SGD
from strategies.optim.spec import OPTIMIZERS, OptimizerSpec
from strategies.state.initial import initial_digest
from strategies.state.shard import StateShard
from strategies.state.training_state import TrainingState, state_digest
from tests.unit.tiny_model import (
    CPU,
    bits,
    load,
    make,
    one_thread,  # noqa: F401 (autouse)
    random_gradient,
    settle,
    state_of,
    tiny,
    update,
)


def settled(spec: OptimizerSpec | None = None, seed: int = 3) -> TrainingState:
    state = make(spec=spec, seed=seed)
    settle(state)
    return state


def own_of(state: TrainingState) -> StateShard:
    assert state.arrangement.own is not None
    return state.arrangement.own


def part_of(state: TrainingState) -> ModelPart:
    part = state.arrangement.part
    assert isinstance(part, ModelPart)
    return part


def saved(state: TrainingState) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.named()}


@pytest.mark.parametrize("kept", [("weights",), ("exp_avg",), ("update.a", "update.a")])
def test_the_state_of_an_update_rule_has_names_of_its_own(kept: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"must begin with 'update\.', and be there once"):
        TrainingState(Blueprint(tiny(), device=CPU), OptimizerSpec(), kept)


# ---------------------------------------------------------------------------------------- parameters and updates


def test_parameters_become_aligned_views_and_keep_their_values() -> None:
    plain = dict(tiny().named_parameters())
    state = settled()
    model = part_of(state).modules[0].module
    weights = own_of(state).weights
    start = weights.data_ptr()
    assert start % 64 == 0
    by_name = dict(model.named_parameters())
    assert [slot.name for slot in state.space.slots] == [
        "embedding.weight", "hidden.weight", "head.weight", "norm.weight", "norm.bias", "hidden.bias", "head.bias",
    ]  # fmt: skip
    for slot in state.space.slots:
        parameter = by_name[slot.name]
        assert slot.offset % ALIGNMENT == 0
        assert parameter.data_ptr() == start + 4 * slot.offset
        assert torch.equal(parameter, plain[slot.name])
    weights.zero_()
    assert all(not p.any() for name, p in model.named_parameters() if name != "frozen")
    assert (list(state.blueprint.frozen), list(state.blueprint.buffers)) == (["frozen"], ["scale"])


def test_gradients_are_accumulated_in_the_buffer_given() -> None:
    part = part_of(settled())
    first, second = torch.zeros(part.size), torch.zeros(part.size)
    ids = torch.tensor([[1, 2, 3]])
    for buffer in (first, second, second):
        part.accumulate_into(buffer)
        part.modules[0](ids).square().sum().backward()
    assert first.any()
    assert torch.allclose(second, 2 * first)
    part.release_gradients()
    assert all(p.grad is None for p in part.modules[0].parameters())


@pytest.mark.parametrize(
    "spec",
    [
        OptimizerSpec(betas=(0.9, 0.99), weight_decay=0.1),
        OptimizerSpec(weight_decay=0.0, kind=SGD),
        OptimizerSpec(momentum=0.9, weight_decay=0.01, kind=SGD),
    ],
    ids=["adamw", "sgd", "sgd with momentum"],
)
def test_updates_are_those_of_torchs_own_optimizer(spec: OptimizerSpec) -> None:
    """Against the same optimizer over ordinary parameters: equal within rounding, of fused kernels and of others."""
    state = settled(spec)
    model = part_of(state).modules[0].module
    rates = [1e-2, 3e-2, 1e-3, 5e-3]
    slots = {slot.name: slot for slot in state.space.slots}
    copies: dict[bool, dict[str, nn.Parameter]] = {}
    for fused in (True, False):
        named = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        copies[fused] = {name: nn.Parameter(value) for name, value in named.items()}
        groups = [
            {"params": [p for p in copies[fused].values() if p.ndim >= 2], "weight_decay": spec.weight_decay},
            {"params": [p for p in copies[fused].values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        other: torch.optim.Optimizer
        if spec.kind is ADAMW:
            other = torch.optim.AdamW(groups, lr=1.0, betas=spec.betas, eps=spec.eps, fused=fused)
        else:
            other = torch.optim.SGD(groups, lr=1.0, momentum=spec.momentum, fused=fused)
        for step, rate in enumerate(rates):
            gradient = random_gradient(state, step)
            for name, parameter in copies[fused].items():
                slot = slots[name]
                parameter.grad = gradient[slot.offset : slot.offset + slot.numel].view(slot.shape).clone()
            for group in other.param_groups:
                group["lr"] = rate
            other.step()
    for step, rate in enumerate(rates):
        update(state, random_gradient(state, step), rate)
    ours = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert state.updates == len(rates)
    for name, parameter in ours.items():
        assert torch.allclose(parameter, copies[False][name], rtol=1e-5, atol=1e-7)
    largest = max(float((p - copies[True][name]).detach().abs().max()) for name, p in ours.items())
    assert largest <= 1e-7, "fused kernels may treat the last elements of a tensor apart, but no more than that"


def test_only_matrices_are_decayed() -> None:
    state = settled(OptimizerSpec(weight_decay=0.5, kind=SGD))
    before = {slot.name: saved(state)[f"model.{slot.name}"] for slot in state.space.slots}
    update(state, torch.zeros(state.space.size), 0.1)
    for slot in state.space.slots:
        factor = 0.95 if len(slot.shape) >= 2 else 1.0
        assert torch.allclose(dict(state.named())[f"model.{slot.name}"], before[slot.name] * factor), slot.name


# ---------------------------------------------------------------------------------------- names, saving, loading


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_saved_state_continues_as_if_it_had_not_been_saved(name: str) -> None:
    spec = OptimizerSpec(momentum=0.9 if name == "sgd" else 0.0, kind=OPTIMIZERS[name])
    first = settled(spec)
    update(first, random_gradient(first, 1))
    kept = saved(first)
    assert list(kept) == sorted(kept)
    second = make(spec=spec, seed=99)
    second.blueprint.buffers["scale"].fill_(7.0)
    assert state_digest(second) != state_digest(first)
    load(second, kept)
    assert second.updates == 1
    assert second.held == whole(second.space.size, 1)
    assert state_digest(second) == state_digest(first)
    for state in (first, second):
        update(state, random_gradient(state, 2))
    assert state_digest(second) == state_digest(first)
    assert second.updates == 2


def test_loading_in_the_middle_of_training_forgets_what_was_there() -> None:
    state = settled()
    update(state, random_gradient(state, 1))
    kept, expected = saved(state), state_digest(state)
    update(state, random_gradient(state, 2))
    load(state, kept)
    assert state_digest(state) == expected
    update(state, random_gradient(state, 2))
    again = settled()
    for step in (1, 2):
        update(again, random_gradient(again, step))
    assert state_digest(state) == state_digest(again)


@pytest.mark.parametrize("tensor", [1, 2])
def test_names_and_shapes_do_not_depend_on_the_tensor_degree(tensor: int) -> None:
    state = splittable(tensor)
    expected = {f"model.{name}": p for name, p in Split().named_parameters()}
    found = dict(state.named())
    assert {name: t.shape for name, t in found.items() if name in expected} == {n: p.shape for n, p in expected.items()}
    assert state_digest(state) == state_digest(splittable(1))
    there = {name: (tensor.dtype, tensor.shape) for name, tensor in found.items() if name != "optimizer.updates"}
    assert state.tensors() == there, "a checkpoint of one degree is one of every degree"


class Split(nn.Module):
    """A model that says how tensor parallelism splits it."""

    tp_plan: dict[str, str] = {"up": "colwise", "down": "rowwise"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)
        self.norm = nn.LayerNorm(6)


def splittable(tensor: int, seed: int = 3) -> TrainingState:
    torch.manual_seed(seed)
    blueprint = Blueprint(Split(), tensor=tensor, device=CPU)
    return TrainingState(blueprint, OptimizerSpec())


@settings(deadline=None, print_blob=True, max_examples=40)
@given(data=st.data())
def test_the_digest_tells_any_single_changed_element(data: st.DataObject) -> None:
    state = settled()
    before = state_digest(state)
    assert before == state_digest(state)
    assert before.startswith("sha256:")
    tensors = dict(state.named())
    name = data.draw(st.sampled_from(sorted(set(tensors) - {"optimizer.updates"})))
    flat = tensors[name].detach().reshape(-1)
    index = data.draw(st.integers(0, flat.numel() - 1))
    raw = flat[index : index + 1].view(torch.int32)
    raw ^= 1 << data.draw(st.integers(0, 30))
    assert state_digest(state) != before
    other = settled()
    other.updates = 1
    assert state_digest(other) != before


def test_the_digest_of_step_0_tells_values_names_and_constants() -> None:
    digest = initial_digest(make().blueprint)
    assert digest == initial_digest(make().blueprint)
    assert digest != initial_digest(make(seed=4).blueprint)
    for name in ("frozen", "scale"):
        state = make()
        state.blueprint.constants[name].view(-1)[0] += 1
        assert initial_digest(state.blueprint) != digest, name
    renamed = tiny()
    renamed.extra = renamed.hidden
    del renamed.hidden
    assert initial_digest(state_of(renamed).blueprint) != digest


# ---------------------------------------------------------------------------------------- models


def test_models_that_nothing_could_make_reproducible_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"module '1' \(BatchNorm1d\) keeps running statistics"):
        state_of(model)
    state_of(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)))
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        state_of(frozen)


def test_models_of_vectors_only_and_tied_models_have_a_state() -> None:
    bias_only = nn.Linear(3, 5)
    bias_only.weight.requires_grad_(False)
    state = state_of(bias_only)
    settle(state)
    update(state, torch.ones(state.space.size), 0.1)
    assert state.updates == 1
    tied = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    tied[1].weight = tied[0].weight
    state = state_of(tied)
    settle(state)
    assert [slot.name for slot in state.space.slots] == ["0.weight"]
    own_of(state).weights.fill_(4.0)
    assert float(tied[1].get_parameter("weight").detach().min()) == 4.0


# ---------------------------------------------------------------------------------------- what counts when


def test_everything_is_here_until_the_first_step_and_after_starting_over() -> None:
    state = make()
    everything = whole(state.space.size, 1)
    first = state_digest(state)
    assert state.held == everything
    settle(state)
    assert state.held == everything
    assert state_digest(state) == first, "taking a place changes nothing"
    update(state, random_gradient(state, 1))
    assert state_digest(state) != first
    state.start_over()
    assert state.updates == 0
    settle(state)
    assert state_digest(state) == first, "also what the optimizer remembers is that of step 0"


def test_a_torn_state_is_nowhere() -> None:
    state = settled()
    update(state, random_gradient(state, 1))
    state.invalidate()
    assert state.held == NOTHING
    with pytest.raises(NotCovered, match="no living holder"):
        settle(state)


@pytest.mark.parametrize("when", ["initial", "trained"])
def test_until_everyone_has_what_they_need_what_was_here_counts(when: str) -> None:
    """The others' trouble is told by the barrier; the layout is then tried again, here or elsewhere."""
    state = make()
    if when != "initial":
        settle(state)
        update(state, random_gradient(state, 1))
    before, held = state_digest(state), state.held

    def fail() -> None:
        raise ConnectionError("a peer is gone")

    for _ in range(2):
        with pytest.raises(ConnectionError):
            take(state, fail)
        assert state.held == held
        assert state_digest(state) == before
    take(state, lambda: None)
    assert state_digest(state) == before


def take(state: TrainingState, barrier: Callable[[], None]) -> None:
    layout = ParallelLayout(data=1, assignment=((0,),))
    fabric = Fabric(rank=0, layout=layout, device=CPU)
    state.adopt_layout(layout, fabric, [state.held], [Domain("", "node")], 1, state.updates, barrier)


def test_the_same_place_again_is_the_same_memory() -> None:
    """Relayouts of large models must not need room for two states where nothing changes."""
    state = settled()
    own, part = own_of(state), part_of(state)
    settle(state)
    assert own_of(state) is own
    assert part_of(state) is part


def test_initial_values_are_made_again_when_they_are_needed_again() -> None:
    made: list[int] = []

    def build() -> nn.Module:
        made.append(1)
        return tiny()

    model = tiny()
    state = TrainingState(Blueprint(model, device=CPU, values=BuiltValues(model, build)), OptimizerSpec())
    first = state_digest(state)
    settle(state)
    assert not made
    update(state, random_gradient(state, 1))
    state_digest(state)
    assert not made, "frozen parameters are kept"
    state.start_over()
    settle(state)
    assert state_digest(state) == first
    assert made == [1]


def test_not_all_of_a_state_has_no_names() -> None:
    state = settled()
    update(state, random_gradient(state, 1))
    assert bits(dict(state.named())["model.head.bias"]) == bits(
        part_of(state).modules[0].module.get_parameter("head.bias")
    )
    state.invalidate()
    with pytest.raises(RuntimeError, match="not all of the state is on this rank"):
        state_digest(state)
