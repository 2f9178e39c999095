"""The trial of a model before training: what it keeps for itself, what it foresees, what it does not use."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.job.lengths import positions_of, too_long
from strategies.gradient.spec import StepSpec
from strategies.model.blueprint import Blueprint
from strategies.optim.schedule import ScheduleSpec
from strategies.optim.sgd import SGD
from strategies.optim.spec import OptimizerSpec
from strategies.state.training_state import TrainingState
from strategies.trial.trial import ModelChanged, Trial, try_model, unused_of
from strategies.update.engine import StepEngine
from tests import small_models
from tests.small_models import family, own
from tests.unit.test_step import fetch_for
from tests.unit.tiny_model import (
    CPU,
    VOCABULARY,
    TinyModel,
    bits,
    one_thread,  # noqa: F401 (autouse)
    settle,
    state_of,
    tiny,
)

SPEC = StepSpec(seed=1, micro_batch=1, micro_batches=1, base_lr=1e-2, schedule=ScheduleSpec("constant"))


def tried(model: nn.Module, vocabulary: int = VOCABULARY, length: int = 8, **more: Any) -> Trial:
    return try_model(model, SPEC, vocabulary=vocabulary, length=length, device=CPU, **more)


Forward = Callable[[Any, torch.Tensor], torch.Tensor]
CALLS: dict[str, int] = {"forward": 0}


def scales_by_a_buffer(model: Any, output: torch.Tensor) -> torch.Tensor:
    model.get_buffer("scratch").add_(1.0)
    scaled: torch.Tensor = output * (1.0 + model.get_buffer("scratch")[0])
    return scaled


def counts(model: Any, output: torch.Tensor) -> torch.Tensor:
    """Reads it much later only, when no trial looks on."""
    model.calls = getattr(model, "calls", 0) + 1
    return output * 2.0 if model.calls > 100 else output


def counts_in_a_global(model: Any, output: torch.Tensor) -> torch.Tensor:
    CALLS["forward"] += 1
    return output


def follows_the_mean(model: Any, output: torch.Tensor) -> torch.Tensor:
    held = model.__dict__.setdefault("held", {"mean": [torch.zeros(())]})
    held["mean"][0] = 0.9 * held["mean"][0] + 0.1 * output.detach().mean()
    return output


def remembers_the_first(model: Any, output: torch.Tensor) -> torch.Tensor:
    if not hasattr(model, "first"):
        model.first = output.detach().std()
    return output / model.first


def remembers_the_last(model: Any, output: torch.Tensor) -> torch.Tensor:
    last = getattr(model, "last", torch.ones(()))
    model.last = output.detach().std()
    return output / last


def draws_by_its_own(model: Any, output: torch.Tensor) -> torch.Tensor:
    generator = model.__dict__.setdefault("generator", np.random.default_rng(0))
    return output * float(generator.random())


def draws_from_python(model: Any, output: torch.Tensor) -> torch.Tensor:
    return output * random.random()


def draws_from_numpy(model: Any, output: torch.Tensor) -> torch.Tensor:
    return output * float(np.random.random())


def clamps_its_weights(model: Any, output: torch.Tensor) -> torch.Tensor:
    model.head.weight.data.mul_(0.99)
    return output


IMPURE: dict[Forward, str] = {
    scales_by_a_buffer: r"changes 'scratch' in a forward pass: .*persistent=False .* is no way around it",
    counts: "changes 'calls' in a forward pass",
    follows_the_mean: r"changes .*held.*mean.* in a forward pass",
    remembers_the_first: r"same tokens.*It changes 'first'",
    remembers_the_last: r"same tokens.*It changes 'last'",
    draws_by_its_own: "changes 'generator' in a forward pass",
    draws_from_python: "draws from Python's module random",
    draws_from_numpy: "draws from numpy.random",
    clamps_its_weights: "changes 'head.weight' in a forward pass",
}


class Doing(TinyModel):
    """The usual output, and what `what` makes of it."""

    def __init__(self, what: Forward) -> None:
        torch.manual_seed(3)
        super().__init__()
        self.what = what

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.what(self, super().forward(input_ids))


@pytest.mark.parametrize("what", IMPURE, ids=lambda what: what.__name__)
def test_models_that_keep_what_is_no_function_of_the_input_are_refused(what: Forward) -> None:
    with pytest.raises(ValueError, match=IMPURE[what]):
        tried(Doing(what))


def test_what_a_hook_or_a_global_keeps_is_found_too() -> None:
    counted = [0]

    def hook(module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
        counted[0] += 1

    model = tiny()
    model.hidden.register_forward_hook(hook)
    with pytest.raises(ValueError, match=r"changes 'hidden\.hook 0 with counted\[0\]' in a forward pass"):
        tried(model)
    with pytest.raises(ValueError, match="CALLS"):
        tried(Doing(counts_in_a_global))


def test_a_models_own_torch_generator_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)

    def forward(model: Any, output: torch.Tensor) -> torch.Tensor:
        return output + torch.rand(output.shape, generator=generator)

    with pytest.raises(ValueError, match="changes 'what with generator' in a forward pass"):
        tried(Doing(forward))


def caches_by_length(model: Any, output: torch.Tensor) -> torch.Tensor:
    """Makes a table once for each length, which says nothing of the tokens."""
    tables = model.__dict__.setdefault("tables", {})
    length = output.shape[1]
    if length not in tables:
        tables[length] = torch.linspace(1.0, 2.0, length)[None, :, None]
    scaled: torch.Tensor = output * tables[length]
    return scaled


@pytest.mark.parametrize("is_ragged", [False, True])
def test_caches_that_are_functions_of_the_input_pass(is_ragged: bool) -> None:
    trial = tried(Doing(caches_by_length), is_ragged=is_ragged)
    assert any("tables" in name for name in trial.caches)
    rope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = family("llama", rope_scaling=rope, original_max_position_embeddings=8)
    assert "model.rotary_emb.inv_freq" in tried(model, small_models.VOCABULARY, 24, is_ragged=is_ragged).caches


@pytest.mark.parametrize("name", [*small_models.FAMILIES, "own", "dropout"])
def test_usual_models_pass_and_are_left_as_they_were(name: str) -> None:
    """Bits of weights and buffers, random numbers, the model's mode."""
    model = {"own": own, "dropout": lambda: own(0.1)}.get(name, lambda: family(name))()
    before = {key: bits(tensor) for key, tensor in model.state_dict().items()}
    kept = set(vars(model))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    states = random.getstate(), np.random.get_state()[2]
    found = tried(model, small_models.VOCABULARY)
    body = "gpt_neox" if name == "gpt_neox" else "model" if name in small_models.FAMILIES else None
    assert found == Trial(body=body, order=tuple(range(small_models.LAYERS)), draws=name == "dropout")
    assert torch.equal(torch.rand(3), expected)
    assert (random.getstate(), np.random.get_state()[2]) == states
    assert {key: bits(tensor) for key, tensor in model.state_dict().items()} == before
    assert set(vars(model)) == kept
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


# ---------------------------------------------------------------------------------------- foresight


def sees_the_next(model: Any, output: torch.Tensor) -> torch.Tensor:
    return output + output.roll(-1, dims=1)


def sees_the_mean(model: Any, output: torch.Tensor) -> torch.Tensor:
    return output + output.mean(dim=1, keepdim=True)


def bert(**more: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(5)
    config = AutoConfig.for_model("bert", vocab_size=VOCABULARY, **sizes, use_cache=False, **more)
    model: nn.Module = AutoModelForCausalLM.from_config(config).float().train()
    return model


@pytest.mark.parametrize("length", [2, 8, 33])
def test_models_that_see_later_tokens_are_refused(length: int) -> None:
    for model in (bert(), Doing(sees_the_next), Doing(sees_the_mean)):
        with pytest.raises(ValueError, match="predicted at a position depends on tokens after it"):
            tried(model, length=length)
    assert tried(bert(is_decoder=True), length=length).caches == frozenset()


def test_what_is_zero_at_first_hides_nothing() -> None:
    class Gated(TinyModel):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(()))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            output = super().forward(input_ids)
            return output + self.gate * output.roll(-1, dims=1)

    model = Gated()
    with pytest.raises(ValueError, match="depends on tokens after it"):
        tried(model)
    assert float(model.gate.detach()) == 0.0


# ---------------------------------------------------------------------------------------- first passes


def test_what_fails_in_a_first_pass_is_the_jobs_fault() -> None:
    def fails(model: Any, output: torch.Tensor) -> torch.Tensor:
        raise KeyError("shape")

    with pytest.raises(ValueError, match="the model Doing fails in its first pass, over 8 tokens: KeyError: 'shape'"):
        tried(Doing(fails))

    class Short(TinyModel):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Embedding(4, VOCABULARY)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            places: torch.Tensor = self.places(torch.arange(input_ids.shape[1]))
            return super().forward(input_ids) + places

    with pytest.raises(ValueError, match=r"IndexError: .*positions for the 8 tokens of data\.sequence_length"):
        tried(Short())
    tried(Short(), length=4)


def test_memory_that_is_short_is_not() -> None:
    def is_short(model: Any, output: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        tried(Doing(is_short))


def test_positions_are_read_from_any_configuration() -> None:
    from transformers import AutoConfig

    assert positions_of(AutoConfig.for_model("gpt2", n_positions=32)) == 32
    assert positions_of(AutoConfig.for_model("mpt", max_seq_len=48)) == 48
    assert positions_of({"max_position_embeddings": 16}) == 16
    assert positions_of({"text_config": {"max_position_embeddings": 24}}) == 24
    assert positions_of(AutoConfig.for_model("mamba")) is None
    assert positions_of(None) is None
    assert too_long(32, {"n_positions": 32}) is None
    reason = too_long(33, {"n_positions": 32})
    assert reason is not None
    assert "data.sequence_length 33 is more than the 32 positions of the model" in reason


class Halving(small_models.OwnLayer):
    """Changes what it is given, which by itself autograd allows."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden *= 0.5
        return super().forward(hidden)


@pytest.mark.parametrize("says_its_order", [True, False])
def test_a_layer_that_changes_what_it_is_given_is_refused_where_that_cannot_be(says_its_order: bool) -> None:
    """Where a model does not say the order of its modules, gradients of what layers are given are taken as one."""
    model = own()
    for number, layer in enumerate(model.blocks):
        changing = Halving()
        changing.load_state_dict(layer.state_dict())
        model.blocks[number] = changing
    if says_its_order:
        assert tried(model).order == (0, 1, 2, 3)
        return
    model.pp_plan = ()
    with pytest.raises(ValueError, match=r"fails in its first pass.* Let that make a new tensor"):
        tried(model)
    model.blocks = torch.nn.ModuleList(small_models.OwnLayer() for _ in model.blocks)
    assert tried(model).order == (0, 1, 2, 3), "nothing of it is left"


# ---------------------------------------------------------------------------------------- while it trains


@pytest.mark.parametrize("how", ["in place", "anew", "number", "frozen"])
def test_a_change_that_comes_later_ends_the_step(how: str) -> None:
    calls = iter(range(1000))

    def forward(model: Any, output: torch.Tensor) -> torch.Tensor:
        if next(calls) == 20:  # In the third of steps of 8 passes.
            match how:
                case "in place":
                    model.scratch.add_(1.0)
                case "anew":
                    model.scratch = torch.ones(2)
                case "number":
                    model.what_counts += 1
                case "frozen":
                    with torch.no_grad():
                        model.frozen.add_(1.0)
        return output

    made = Doing(forward)
    made.what_counts = 0
    state = state_of(made)
    engine = StepEngine(state, replace(SPEC, micro_batches=2), fetch_for(4))
    fabric = settle(state, 4)
    engine.bind(fabric, fabric.layout, 0)
    engine.run(0)
    engine.run(1)
    with pytest.raises(
        ModelChanged, match=r"the model has changed '(scratch|what_counts|frozen)' while it computed a step"
    ):
        engine.run(2)
    assert state.updates == 2, "it has changed nothing of the state"
    with pytest.raises(ModelChanged):
        engine.bind(fabric, fabric.layout, 1)


# ---------------------------------------------------------------------------------------- unused parameters


class Spare(TinyModel):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(7, 7)


@pytest.mark.parametrize("spec", [OptimizerSpec(), OptimizerSpec(momentum=0.9, weight_decay=0.1, kind=SGD)])
def test_unused_parameters_are_left_alone_as_in_torch(spec: OptimizerSpec) -> None:
    torch.manual_seed(3)
    model = Spare()
    usual = {name: p.detach().clone() for name, p in model.named_parameters()}
    trial = tried(model)
    assert trial.unused == {"spare.weight", "spare.bias"}
    blueprint = Blueprint(model, device=CPU, unused=trial.unused)
    state = TrainingState(blueprint, spec)
    engine = StepEngine(state, replace(SPEC, micro_batches=2), fetch_for(4))
    fabric = settle(state, 4)
    engine.bind(fabric, fabric.layout, 0)
    for step in range(3):
        engine.run(step)
    after = {name.removeprefix("model."): tensor.clone() for name, tensor in state.named()}
    for name in trial.unused:
        assert bits(after[name]) == bits(usual[name])
        assert all(not after[f"optimizer.{moment}.{name}"].any() for moment in spec.moments)
    assert bits(after["hidden.weight"]) != bits(usual["hidden.weight"])


def test_an_expert_that_no_token_was_sent_to_is_not_unused() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))

    model = nn.Module()
    model.layers = nn.ModuleList(Layer() for _ in range(2))
    used = {"layers.0.experts.1.weight"}
    assert unused_of(model, used) == {f"layers.1.experts.{number}.weight" for number in range(3)}
