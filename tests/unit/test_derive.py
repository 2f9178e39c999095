"""Tensor plans that models do not state: found by trying, or refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.models.initialisation import without_parameters
from strategies.model.tensor_plan import NothingSaid, read_tensor_plan
from strategies.trial.derive import CannotDerive, check_tensor, derive, tensor_plan_of
from tests.ranks.architectures import tiny
from tests.small_models import LAYERS, family

FOUND: dict[str, dict[str, tuple[int, int]]] = {
    "opt": {
        **{f"self_attn.{name}_proj.weight": (0, 1) for name in "qkv"}, "self_attn.out_proj.weight": (1, 1),
        "fc1.weight": (0, 1), "fc1.bias": (0, 1), "fc2.weight": (1, 1),
    },
    "gpt2": {
        "attn.c_attn.weight": (1, 3), "attn.c_attn.bias": (0, 3), "attn.c_proj.weight": (0, 1),
        "mlp.c_fc.weight": (1, 1), "mlp.c_proj.weight": (0, 1),
    },
}  # fmt: skip


@pytest.mark.parametrize("is_empty", [False, True], ids=["with weights", "without"])
@pytest.mark.parametrize("name", FOUND)
def test_attention_and_networks_of_models_without_a_plan_are_split(name: str, is_empty: bool) -> None:
    if is_empty:
        with without_parameters():
            model: Any = family(name)
    else:
        model = family(name)
    plan = tensor_plan_of(model)
    layers = "model.decoder.layers" if name == "opt" else "transformer.h"
    for number in range(LAYERS):
        for inner, expected in FOUND[name].items():
            assert plan.stacks[f"{layers}.{number}.{inner}"] == expected
    heads = {attribute for attributes in plan.counts.values() for attribute in attributes}
    assert "num_heads" in heads
    assert "head_dim" not in heads
    assert len(plan.sums) == 2 * LAYERS
    check_tensor(model, 2)


def test_a_plan_that_splits_only_the_head_is_made_up_for_or_refused_with_both_reasons() -> None:
    llama: Any = family("llama")
    llama._tp_plan = {"lm_head": "colwise_gather_output"}
    llama.model._tp_plan = {}
    with pytest.raises(NothingSaid, match="splits lm_head and nothing in its layers"):
        read_tensor_plan(llama)
    plan = tensor_plan_of(llama)
    assert plan.stacks["model.layers.0.mlp.gate_proj.weight"] == (0, 1)
    assert plan.stacks["model.layers.3.self_attn.o_proj.weight"] == (1, 1)
    with pytest.raises(ValueError, match=r"has no tp_plan.*has not found a way either"):
        check_tensor(family("mamba"), 2)


class Crossing(nn.Module):
    """Mixes what the first linear gives before the second: no half of it is enough."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 8)
        self.temperature = nn.Parameter(torch.ones(()))
        self.blocks = nn.ModuleList(CrossingLayer(kind, self.temperature) for _ in range(2))
        self.head = nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        output: torch.Tensor = self.head(hidden)
        return output


class CrossingLayer(nn.Module):
    def __init__(self, kind: str, temperature: nn.Parameter) -> None:
        super().__init__()
        self.kind, self.temperature = kind, [temperature]
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = self.up(hidden)
        wide = self.norm(wide) if self.kind == "norm" else wide.softmax(-1) if self.kind == "mix" else torch.tanh(wide)
        if self.kind == "gate":
            wide = wide * hidden[..., :1]
        if self.kind == "shared":
            wide = wide * self.temperature[0]
        output: torch.Tensor = hidden + self.down(wide)
        return output


def test_what_mixes_or_has_weights_between_is_not_split() -> None:
    torch.manual_seed(0)
    assert derive(Crossing("plain")).sums == {"blocks.0.down", "blocks.1.down"}
    for kind in ("mix", "norm", "gate", "shared"):
        with pytest.raises(CannotDerive, match="no linear modules"):
            derive(Crossing(kind))


def test_a_way_is_not_found_by_what_is_zero_at_first() -> None:
    """Queries, keys and values in one, behind which a projection begins with zeros: any way to split it gives zeros."""
    model: Any = family("gpt2")
    for layer in model.transformer.h:
        nn.init.zeros_(layer.attn.c_proj.weight)
        nn.init.zeros_(layer.mlp.c_proj.weight)
    plan = tensor_plan_of(model)
    assert plan.stacks["transformer.h.0.attn.c_attn.weight"] == (1, 3)
    assert "num_heads" in plan.counts["transformer.h.0.attn"]


@pytest.mark.parametrize(
    ("changes", "degree", "said"),
    [
        ({"num_attention_heads": 2}, 4, r"tensor 4 does not divide .*num_heads = 2"),
        ({"num_attention_heads": 2, "ffn_dim": 42}, 2, None),
        ({"ffn_dim": 42}, 4, r"tensor 4 does not divide .*fc1.weight \[42, 32\] in dimension 0"),
    ],
)
def test_a_degree_that_does_not_divide_what_is_split_is_refused(
    changes: dict[str, Any], degree: int, said: str | None
) -> None:
    model: Any = family("opt", **changes)
    model.requires_grad_(False)
    model.model.decoder.final_layer_norm.weight.requires_grad_()
    if said is None:
        check_tensor(model, degree)
        return
    with pytest.raises(ValueError, match=said):
        check_tensor(model, degree)


def test_trying_leaves_the_model_as_it_was() -> None:
    model: Any = family("gpt2")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    derive(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    attention = model.transformer.h[0].attn
    assert (attention.num_heads, attention.split_size, attention.c_attn.nf) == (4, 32, 96)
    assert "forward" not in vars(attention.c_proj)


def test_an_activation_with_numbers_of_its_own_sees_a_part_of_the_activations() -> None:
    """Apertus has one between what its plan splits, and the plan is silent about it: each rank has a part of its
    gradient."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = tiny("apertus")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(sizes.pop("model_type"), **sizes))
    plan = read_tensor_plan(model)
    reduced = {name for name, _ in model.named_parameters() if plan.is_reduced(name)}
    layers = [f"model.layers.{number}" for number in range(4)]
    kinds = ("mlp.act_fn.alpha_p", "mlp.act_fn.alpha_n", "self_attn.q_norm.weight", "self_attn.k_norm.weight")
    assert reduced == {f"{layer}.{kind}" for layer in layers for kind in kinds}
