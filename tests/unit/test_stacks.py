"""Plans that split stacks of experts in a wrong way are put right, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from strategies.model.tensor_plan import TensorPlan, read_tensor_plan
from strategies.trial.derive import tensor_plan_of
from strategies.trial.stacks import with_tried_stacks
from tests.small_models import family

EXPERTS = "model.layers.0.mlp.experts"


def plan_with(stacks: Mapping[str, tuple[int, int]]) -> tuple[Any, TensorPlan]:
    """Of a mixture of experts, changed."""
    model = family("qwen3_moe")
    plan = read_tensor_plan(model)
    return model, replace(plan, stacks={**plan.stacks, **{f"{EXPERTS}.{key}": value for key, value in stacks.items()}})


def test_the_two_matrices_of_a_gated_network_are_found_in_one() -> None:
    """Split in the middle, a rank would have one network's gate and none of what it lets through."""
    model, wrong = plan_with({"gate_up_proj": (1, 1)})
    tried = with_tried_stacks(model, wrong)
    assert tried == read_tensor_plan(model)
    assert tried.stacks[f"{EXPERTS}.gate_up_proj"] == (1, 2)
    assert tensor_plan_of(model) == tried


class Experts(nn.Module):
    """All are chosen, and one gives what it is given."""

    def __init__(self, *, needs_more: bool, mixes: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 16, 8)), nn.Parameter(torch.randn(3, 8, 16))
        self.same = nn.Identity()
        self.needs_more, self.mixes = needs_more, mixes

    def forward(self, hidden: torch.Tensor, weights: torch.Tensor, more: Any = None) -> torch.Tensor:
        if self.needs_more and more is None:
            raise TypeError("more is missing")
        total = self.same(hidden)
        for expert in range(3):
            inner = hidden @ self.up[expert].t()
            inner = inner.softmax(-1) if self.mixes else torch.tanh(inner)
            total = total + (inner * weights[..., expert : expert + 1]) @ self.down[expert].t()
        return total


class Mixture(nn.Module):
    def __init__(self, *, needs_more: bool = False, mixes: bool = False, divides: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Experts(needs_more=needs_more, mixes=mixes)])
        self.tp_plan = {"layers.*": "all_reduce", "layers.*.up": "colwise", "layers.*.down": "rowwise"}
        self.tp_plan |= {"layers.*.same": "moe_identity_expert"} if divides else {}


def test_an_expert_that_is_the_same_on_all_ranks_counts_once() -> None:
    assert with_tried_stacks(model := Mixture(), plan := read_tensor_plan(model)) == plan
    assert plan.styles["layers.0.same"] == "moe_identity_expert"
    with pytest.raises(ValueError, match=r"the parts of two ranks do not add up"):
        with_tried_stacks(model := Mixture(divides=False), read_tensor_plan(model))


def test_what_cannot_add_up_is_refused() -> None:
    with pytest.raises(ValueError, match=r"splits layers\.0 \(up, down\) in a way in which the parts of two ranks"):
        with_tried_stacks(model := Mixture(mixes=True), read_tensor_plan(model))


def test_a_module_that_cannot_be_tried_apart_is_as_its_plan_says() -> None:
    assert with_tried_stacks(model := Mixture(needs_more=True), plan := read_tensor_plan(model)) == plan
