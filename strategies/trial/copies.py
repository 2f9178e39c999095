"""Copies of a model to try things with, whether it has values or not."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from strategies.model.anatomy import find_layers, kinds_of, representatives, set_aside
from strategies.model.parameters import made_up_values
from strategies.model.randomness import stream_key


class Copies:
    """Copies of a model to try, with buffers and attributes of their own. A model that has no values yet is tried with
    made-up ones, and so is any that `makes_up`; of one without values two layers of each kind stand for all, or with
    `all_layers` each for itself; `everywhere` says of names in these what holds in all."""

    def __init__(
        self, model: nn.Module, device: torch.device, *, all_layers: bool = False, makes_up: bool = False
    ) -> None:
        self._model = model
        self._makes_up = makes_up
        self._device = device
        self.layers = find_layers(model)[0]
        self._kinds: list[list[int]] = []
        self.stand_for_others = any(parameter.is_meta for parameter in model.parameters()) and not all_layers
        if self.layers is not None and self.stand_for_others:
            self._kinds = kinds_of(list(model.get_submodule(self.layers)))  # type: ignore[call-overload]

    def make(self, dtype: torch.dtype) -> nn.Module:
        """One whose trained parameters are of this type. What cannot be copied is tried as it is."""
        kept = representatives(self._kinds)
        layers: list[nn.Module] = list(self._model.get_submodule(self.layers or "")) if kept else []  # type: ignore
        aside = [layer for number, layer in enumerate(layers) if number not in kept]
        outside = {id(parameter) for layer in aside for parameter in layer.parameters()}
        shared: dict[int, Any] = {
            id(parameter): parameter if id(parameter) in outside else self._value(name, parameter, dtype)
            for name, parameter in self._model.named_parameters()
        }
        try:
            made = copy.deepcopy(self._model, shared)
        except Exception:  # Whatever a user's object raises.
            return self._model
        if aside:
            set_aside(made.get_submodule(self.layers or ""), kept)  # type: ignore[arg-type]
        return made

    def _value(self, name: str, parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        if not parameter.is_floating_point():
            dtype = parameter.dtype
        is_made_up = parameter.is_meta or (self._makes_up and parameter.is_floating_point())
        if not is_made_up and (dtype == torch.float32 or not parameter.requires_grad):
            return parameter
        if is_made_up:
            value = made_up_values(parameter.shape, stream_key("trial", name), self._device, dtype)
        else:
            value = parameter.detach().to(dtype)
        return nn.Parameter(value, requires_grad=parameter.requires_grad)

    def everywhere(self, names: Collection[str]) -> frozenset[str]:
        """These names, and the same in the layers that the tried ones stand for."""
        found = set(names)
        for numbers in self._kinds:
            for name in names:
                prefix, rest = self._split(name)
                if prefix in numbers[:2]:
                    found.update(f"{self.layers}.{number}.{rest}" for number in numbers)
        return frozenset(found)

    def _split(self, name: str) -> tuple[int, str]:
        start = f"{self.layers}."
        if not name.startswith(start):
            return -1, name
        number, _, rest = name[len(start) :].partition(".")
        return int(number), rest
