"""Models that begin at random: a parameter is a function of the seed and its name, distributed as the model's own class
would have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.models.initialisation import KeyedValues, without_parameters
from tests.small_models import family

NAMES = ("llama", "gpt2", "mixtral", "mamba", "opt", "gpt_neox", "rwkv")
"""(The initialisers of rwkv make values where the module's other parameters are.)"""


def skeleton(name: str) -> Any:
    with without_parameters():
        return family(name)


def values(name: str, seed: int = 3, build: Callable[[], nn.Module] | None = None) -> KeyedValues:
    def never() -> nn.Module:
        raise AssertionError("all parameters have initialisers")

    return KeyedValues(skeleton(name), seed, build or never)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_parameters_has_its_buffers(name: str) -> None:
    model, real = skeleton(name), family(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    expected = dict(real.named_buffers())
    assert {key for key, _ in model.named_buffers()} == set(expected)
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[key]), key
    assert not any(parameter.is_meta for parameter in family(name).parameters()), "it holds in here only"


@pytest.mark.parametrize("name", NAMES)
def test_values_are_distributed_as_the_models_class_would_have_them(name: str) -> None:
    made = values(name)
    for key, parameter in family(name).named_parameters():
        expected, found = parameter.detach(), made.read(key)
        assert (found.shape, found.dtype) == (expected.shape, torch.float32)
        spread = float(expected.std()) if expected.numel() > 1 else 0.0
        assert float(found.mean()) == pytest.approx(
            float(expected.mean()), abs=8 * spread / expected.numel() ** 0.5 + 1e-6
        )
        if expected.numel() > 500:
            assert float(found.std()) == pytest.approx(spread, rel=0.2), key
        if not spread:
            assert torch.equal(found, expected), key


def test_values_depend_on_seed_and_name_and_on_nothing_else() -> None:
    names = [name for name, _ in skeleton("llama").named_parameters()]
    forward, backward = values("llama"), values("llama")
    first = {name: forward.read(name).clone() for name in names}
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = {name: backward.read(name).clone() for name in reversed(names)}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in names)
    other = values("llama", seed=4)
    drawn = [name for name in names if first[name].std() > 0]
    assert not any(torch.equal(first[name], other.read(name)) for name in drawn)
    gate, up = (first[f"model.layers.0.mlp.{each}_proj.weight"] for each in ("gate", "up"))
    assert not torch.equal(gate, up), "each parameter has a stream of its own"
    found = backward.read_range(names[0], 5, 40)
    assert torch.equal(found, first[names[0]].reshape(-1)[5:40])


@pytest.mark.parametrize("name", NAMES)
def test_values_are_the_same_while_the_model_is_computed_with(name: str) -> None:
    """Initialisers of mamba change a parameter beside that which is asked for, in place."""
    model = skeleton(name)
    made = KeyedValues(model, 3, lambda: family(name))
    names = [key for key, _ in model.named_parameters()]
    first = {key: made.read(key).clone() for key in names}
    for key in names:
        owner, _, inner = key.rpartition(".")
        model.get_submodule(owner)._parameters[inner] = nn.Parameter(first[key].clone())
    assert all(torch.equal(made.read(key), first[key]) for key in names)
    assert all(torch.equal(parameter, first[key]) for key, parameter in model.named_parameters())


def test_the_model_is_left_without_memory_and_without_marks() -> None:
    model = skeleton("llama")
    made = KeyedValues(model, 3, lambda: family("llama"))
    made.read("model.layers.1.mlp.up_proj.weight")
    assert all(parameter.is_meta for parameter in model.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors)


def test_a_parameter_that_no_initialiser_knows_is_as_the_constructor_makes_it() -> None:
    built: list[int] = []

    def build() -> nn.Module:
        built.append(1)
        model: Any = family("llama")
        model.model.shift = nn.Parameter(torch.linspace(0, 1, 32))
        return model  # type: ignore[no-any-return]

    with without_parameters():
        model = build()
    built.clear()
    made = KeyedValues(model, 3, build)
    assert torch.equal(made.read("model.shift"), torch.linspace(0, 1, 32))
    made.read("model.norm.weight")
    made.read("model.shift")
    assert built == [1]
    made.forget()
    made.read("model.shift")
    assert built == [1, 1]
