"""Cutting and splitting networks: a chain of stages is the network, and what cannot be done is said with a way out."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.models.validation import LayoutReasons
from strategies.model.blueprint import Blueprint
from strategies.model.model_part import ModelPart, Runs
from strategies.model.randomness import Streams
from strategies.model.stage import PassThrough
from strategies.state.training_state import TrainingState
from tests.small_models import DO_MORE, FAMILIES, LAYERS, Own, family, own
from tests.unit.tiny_model import (
    CPU,
    TinyModel,
    bits,
    one_thread,  # noqa: F401 (autouse)
    state_of,
)

CUTS: list[tuple[tuple[int, int], ...]] = [
    ((0, 3), (3, 6)),
    ((0, 1), (1, 5), (5, 6)),
    ((0, 2), (2, 3), (3, 4), (4, 6)),
]
"""Of an embedding, four layers, norm and head: in the middle, both ends alone, single layers alone."""
# ---------------------------------------------------------------------------------------- a chain of stages


def part_of(state: TrainingState, runs: Runs) -> ModelPart:
    """A part of the model with the weights of step 0."""
    part = ModelPart(state.blueprint, 0, runs)
    with torch.no_grad():
        for slot, offset in part.slots:
            part.weights[offset : offset + slot.numel] = state.blueprint.values.read(slot.name).reshape(-1)
    return part


def tokens() -> torch.Tensor:
    return torch.randint(0, 70, (2, 9), generator=torch.Generator().manual_seed(1))


def gradients(part: ModelPart, streams: Streams | None = None) -> dict[str, bytes]:
    """Of all parameters, and the logits, after one pass through the modules one after another."""
    buffer = torch.zeros(part.size)
    part.accumulate_into(buffer)
    if streams is not None:
        for module in part.modules:
            for number, layer in part.blueprint.numbered_layers(module):
                streams.install(layer, number)
            if module.cut.is_last:
                streams.install_behind(module.layers[-1], LAYERS)
        streams.enter(0, 0, 0)
    logits: torch.Tensor = tokens()[:, :-1]
    for module in part.modules:
        logits = module(logits)
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens()[:, 1:].flatten()).backward()
    found = {slot.name: bits(buffer[offset : offset + slot.numel]) for slot, offset in part.slots}
    assert all(buffer[offset : offset + slot.numel].any() for slot, offset in part.slots)
    return {**found, "logits": bits(logits)}


def assert_the_chain_is_the_model(model: nn.Module, cut: tuple[tuple[int, int], ...], dropout: bool = False) -> None:
    state = state_of(model, cuts=True)
    expected = gradients(part_of(state, None), Streams(7) if dropout else None)
    assert set(expected) == {*state.blueprint.initial_shapes, "logits"}
    found = gradients(part_of(state, cut), Streams(7) if dropout else None)
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.parametrize("cut", CUTS, ids=["2 stages", "3 stages", "4 stages"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_chain_of_stages_is_the_model_to_the_last_bit(name: str, cut: tuple[tuple[int, int], ...]) -> None:
    assert_the_chain_is_the_model(family(name), cut)


@pytest.mark.parametrize("cut", CUTS, ids=["2 stages", "3 stages", "4 stages"])
def test_a_chain_of_a_users_own_stages_is_the_model_to_the_last_bit(cut: tuple[tuple[int, int], ...]) -> None:
    assert_the_chain_is_the_model(own(), cut)


@pytest.mark.parametrize(
    ("name", "dropouts"),
    [("own", {}), ("llama", {"attention_dropout": 0.3}), ("gpt_neox", {"hidden_dropout": 0.3})],
)
def test_stages_draw_the_random_numbers_of_the_model(name: str, dropouts: dict[str, float]) -> None:
    model = own(0.3) if name == "own" else family(name, **dropouts)
    assert_the_chain_is_the_model(model, CUTS[1], dropout=True)


def test_stages_share_what_is_constant_and_have_no_parameters_of_others() -> None:
    blueprint = state_of(own()).blueprint
    first, last = blueprint.stages.make((0, 3)), blueprint.stages.make((3, 6))
    memory = {stage.get_buffer("module.scale").data_ptr() for stage in (first, last)}
    assert memory == {blueprint.buffers["scale"].data_ptr()}
    assert not any(name.startswith(("module.head", "module.blocks.2")) for name, _ in first.named_parameters())
    assert not any(name.startswith(("module.embedding", "module.blocks.1")) for name, _ in last.named_parameters())
    assert isinstance(first.get_submodule("module.head"), PassThrough)
    assert [number for number, _ in blueprint.numbered_layers(last)] == [2, 3]
    assert all(parameter.is_meta for parameter in first.parameters()), "memory comes with the weights"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [*FAMILIES, "own"])
def test_activations_are_those_that_stages_hand_on(name: str, precision: str) -> None:
    def context() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")

    state = state_of(own() if name == "own" else family(name))
    first, last = part_of(state, CUTS[0]).modules
    before = torch.get_rng_state()
    sizes = state.blueprint.stages.activations(context())
    assert torch.equal(torch.get_rng_state(), before)
    with context():
        hidden = first(tokens()[:, :-1])
        logits = last(hidden)
    assert (hidden.shape, hidden.dtype) == ((2, 8, *sizes.hidden_size), sizes.hidden_dtype)
    assert (logits.shape, logits.dtype) == ((2, 8, *sizes.logits_size), sizes.logits_dtype)


def test_blocks_are_numbered_from_the_embedding_to_the_head() -> None:
    blueprint = state_of(own()).blueprint
    blocks = {slot.name: slot.block for slot in blueprint.space.slots}
    assert blueprint.stages.num_layers == LAYERS
    assert blocks["embedding.weight"] == 0
    assert [blocks[f"blocks.{number}.up.weight"] for number in range(LAYERS)] == [1, 2, 3, 4]
    assert blocks["norm.weight"] == blocks["head.weight"] == blocks["head.bias"] == 5


# ---------------------------------------------------------------------------------------- what cannot be cut


def test_a_model_without_layers_cannot_be_cut() -> None:
    expected = "pipeline 2 needs to know where the model can be cut: TinyModel has no torch.nn.ModuleList of layers"
    with pytest.raises(ValueError, match=expected):
        Blueprint(TinyModel(), device=CPU, cuts=True).check_pipeline(2)


def test_layers_that_are_not_computed_one_after_another_cannot_be_cut() -> None:
    class Twice(Own):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            hidden = self.embedding(input_ids)
            for block in (*self.blocks, *self.blocks):
                hidden = block(hidden)
            output: torch.Tensor = self.head(self.norm(hidden))
            return output

    with pytest.raises(ValueError, match=r"the layers of Twice \(blocks\) are not computed one after another"):
        Blueprint(Twice(), device=CPU, cuts=True).check_pipeline(2)


def test_layers_that_are_given_something_trained_beside_hidden_states_cannot_be_cut() -> None:
    class Biased(Own):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(16))
            self.blocks = nn.ModuleList(_TakesMore() for _ in range(2))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            hidden = self.embedding(input_ids)
            for block in self.blocks:
                hidden = block(hidden, bias=self.bias)
            output: torch.Tensor = self.head(self.norm(hidden))
            return output

    with pytest.raises(ValueError, match=r"the layers of Biased are given what is trained outside of them \(bias\)"):
        Blueprint(Biased(), device=CPU, cuts=True).check_pipeline(2)


def test_layers_that_are_given_what_the_first_one_was_given_cannot_be_cut() -> None:
    """It is not trained outside of them, and yet a later stage does not have it."""

    class Skipping(Own):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(_TakesMore() for _ in range(3))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            hidden = first = self.embedding(input_ids)
            for block in self.blocks:
                hidden = block(hidden, bias=first.detach())
            output: torch.Tensor = self.head(self.norm(hidden))
            return output

    with pytest.raises(ValueError, match="pipeline 2 cannot be used with Skipping: its layers are given more than"):
        Blueprint(Skipping(), device=CPU, cuts=True).check_pipeline(2)


def test_what_is_used_before_the_layers_and_again_after_them_cannot_be_cut() -> None:
    class Shifted(Own):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(16))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            hidden = self.embedding(input_ids) + self.shift
            for block in self.blocks:
                hidden = block(hidden)
            output: torch.Tensor = self.head(self.norm(hidden + self.shift))
            return output

    with pytest.raises(ValueError, match="Shifted uses shift before its layers and again after them"):
        Blueprint(Shifted(), device=CPU, cuts=True).check_pipeline(2)


class _TakesMore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = hidden + self.linear(hidden) * bias
        return output


def test_a_trained_parameter_of_two_layers_cannot_be_sharded_and_any_other_can() -> None:
    def shared(frozen: bool) -> Own:
        model: Any = own()
        model.blocks[1].down.weight = model.blocks[0].down.weight
        model.blocks[0].down.weight.requires_grad_(not frozen)
        return model  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"two layers share.*own: blocks\.0\.down\.weight, blocks\.1\.down\.weight\."):
        Blueprint(shared(frozen=False), device=CPU).check_sharded()
    kept_whole = Blueprint(shared(frozen=True), device=CPU)
    kept_whole.check_sharded()
    assert kept_whole.frozen.divisible == ["blocks.0.down.weight"]
    assert kept_whole.divisible_frozen == [], "each layer would gather its own"
    Blueprint(family("llama", tie_word_embeddings=True), device=CPU).check_sharded()


def test_layers_that_are_not_computed_once_in_a_pass_are_not_sharded_whether_it_is_known_or_tried() -> None:
    class Twice(Own):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            hidden = self.embedding(input_ids)
            for block in (*self.blocks, self.blocks[0]):
                hidden = block(hidden)
            output: torch.Tensor = self.head(self.norm(hidden))
            return output

    expected = r"Twice, which does not compute each of its layers \(blocks\) once in a pass"
    with pytest.raises(ValueError, match=expected):
        Blueprint(Twice(), device=CPU, order=(0, 1, 2, 3, 0)).check_sharded()
    assert re.search(expected, LayoutReasons(Twice()).of_shard("parameters") or "")
    assert LayoutReasons(own()).of_shard("parameters") is None


def test_the_activations_are_found_with_one_layer_and_leave_all_where_they_were() -> None:
    blueprint = Blueprint(own(), device=CPU)
    layers = list(blueprint.model.get_submodule("blocks"))
    calls: list[int] = []
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *unused, number=number: calls.append(number))
    blueprint.stages.activations(torch.autocast("cpu", enabled=False))
    assert calls == [0]
    assert all(now is before for now, before in zip(blueprint.model.get_submodule("blocks"), layers, strict=True))


def test_a_head_that_is_the_embedding_is_a_use_of_its_own_and_what_else_is_shared_is_refused() -> None:
    tied = Blueprint(family("llama", tie_word_embeddings=True), device=CPU, cuts=True)
    tied.check_pipeline(2)
    (alias,) = tied.space.aliases
    assert (alias.name, alias.slot.name, alias.block) == ("lm_head.weight", "model.embed_tokens.weight", LAYERS + 1)
    (alias,) = Blueprint(family("llama", tie_word_embeddings=True), tensor=2, device=CPU).space.aliases
    assert alias.slot.dim == 0
    assert not Blueprint(own(), device=CPU).space.aliases

    def shared() -> nn.Module:
        model: Any = own()
        model.blocks[1].down.weight = model.blocks[0].down.weight
        return model  # type: ignore[no-any-return]

    expected = (
        r"{} 2 cannot be used with parameters that two modules share: blocks.0.down.weight. "
        r"Untie them \(for transformers: tie_word_embeddings: false; for a directory, model.untie: true\)"
    )
    with pytest.raises(ValueError, match=expected.format("pipeline")):
        Blueprint(shared(), device=CPU, cuts=True).check_pipeline(2)
    with pytest.raises(ValueError, match=expected.format("tensor")):
        Blueprint(shared(), tensor=2, device=CPU)


@pytest.mark.parametrize("name", [*FAMILIES, *DO_MORE, "own"])
def test_models_can_be_cut_and_their_check_leaves_all_as_it_was(name: str) -> None:
    blueprint = Blueprint(own() if name == "own" else family(name), device=CPU, cuts=True)
    before = torch.get_rng_state()
    blueprint.check_pipeline(2)
    assert torch.equal(torch.get_rng_state(), before), "a check draws no random numbers of the model's"


@pytest.mark.parametrize("cut", CUTS, ids=["2 stages", "3 stages", "4 stages"])
@pytest.mark.parametrize("name", DO_MORE)
def test_what_a_forward_does_beside_its_layers_is_done_once(name: str, cut: tuple[tuple[int, int], ...]) -> None:
    """Every stage runs the forward; scaled or capped once more on every stage, the model would be another."""
    assert_the_chain_is_the_model(family(name), cut)


@pytest.mark.parametrize("cut", CUTS, ids=["2 stages", "3 stages", "4 stages"])
def test_dropout_between_modules_draws_the_same_in_every_cut(cut: tuple[tuple[int, int], ...]) -> None:
    class Dropping(Own):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            hidden = nn.functional.dropout(self.embedding(input_ids), 0.5)
            for block in self.blocks:
                hidden = block(hidden)
            output: torch.Tensor = self.head(nn.functional.dropout(self.norm(hidden), 0.5))
            return output

    torch.manual_seed(5)
    assert_the_chain_is_the_model(Dropping().train(), cut, dropout=True)


def test_a_model_that_cannot_be_traced_is_computed_once() -> None:
    class Peeking(Own):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            assert self.embedding.weight.sum().item() < 1e9
            return super().forward(input_ids)

    sizes = Blueprint(Peeking(), device=CPU).stages.activations(torch.autocast("cpu", enabled=False))
    assert sizes == Blueprint(Own(), device=CPU).stages.activations(torch.autocast("cpu", enabled=False))


def test_layers_that_do_not_hand_on_one_tensor_cannot_be_cut() -> None:
    class Pair(nn.Module):
        def forward(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"hidden": hidden}

    class Pairs(Own):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Pair(), Pair()])

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            hidden = self.blocks[1](self.blocks[0](self.embedding(input_ids))["hidden"])["hidden"]
            output: torch.Tensor = self.head(self.norm(hidden))
            return output

    with pytest.raises(ValueError, match="the layers of Pairs do not hand on one tensor"):
        Blueprint(Pairs(), device=CPU, cuts=True).check_pipeline(2)


# ---------------------------------------------------------------------------------------- what cannot be split


def test_a_model_without_a_plan_cannot_be_split() -> None:
    with pytest.raises(ValueError, match=r"TinyModel has no tp_plan.*use tensor: 1, or a model with one.*factory"):
        Blueprint(TinyModel(), tensor=2, device=CPU)
    Blueprint(TinyModel(), tensor=1, device=CPU)


def test_an_unknown_style_is_named_with_those_that_are_known() -> None:
    model = own()
    model.tp_plan = {**Own.tp_plan, "blocks.*.up": "diagonal"}
    with pytest.raises(
        ValueError,
        match=r"the tp_plan gives blocks\.0\.up the style 'diagonal', which is not supported; supported: ",
    ):
        Blueprint(model, tensor=2, device=CPU)


def test_dimensions_that_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match=r"tensor 3 does not divide .*k_proj.weight \[16, 32\] in dimension 0"):
        Blueprint(family("llama"), tensor=3, device=CPU)


def test_a_split_model_has_the_shares_its_plan_asks_for() -> None:
    model = own()
    shapes = {slot.name: list(slot.shape) for slot in Blueprint(model, tensor=2, device=CPU).space.slots}
    assert shapes["blocks.0.up.weight"] == [12, 16]
    assert shapes["blocks.0.up.bias"] == [12]
    assert shapes["blocks.0.down.weight"] == [16, 12]
    assert shapes["head.weight"] == [35, 16]
    assert shapes["embedding.weight"] == [70, 16]
    assert shapes["norm.weight"] == [16]


def test_norms_of_single_heads_are_whole_and_their_gradients_added_up() -> None:
    blueprint = Blueprint(family("qwen3"), tensor=2, device=CPU)
    norms = [slot for slot in blueprint.space.slots if "q_norm" in slot.name]
    assert len(norms) == LAYERS
    assert all(list(slot.shape) == [8] and blueprint.plan.is_reduced(slot.name) for slot in norms)
    assert not blueprint.plan.is_reduced("model.layers.0.self_attn.q_proj.weight")
