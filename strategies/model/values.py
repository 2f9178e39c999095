"""Where the parameters of a model get their first values: read when they are wanted, as much of them as is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn


class Values(Protocol):
    """First values by the names of parameters, on the CPU; the same whenever they are read, by every rank. Those that
    are trained are fp32, frozen ones are of their own type."""

    def read(self, name: str) -> torch.Tensor:
        """A whole parameter."""

    def read_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of a parameter laid flat: [stop - start]."""

    def is_at_hand(self, name: str) -> bool:
        """Whether it costs nothing to read it."""

    def forget(self) -> None:
        """Nobody will ask soon: what is kept in memory, and can be made again, need not be."""

    @property
    def is_stored(self) -> bool:
        """Whether they are read from storage, which any thread may do. Others are made with the process's own random
        numbers: while another thread draws from these, they would be other values, and so would what that draws."""


class BuiltValues:
    """Those of a model that has been built with them. `build` builds it again; without, they are never forgotten, and
    neither are frozen ones, which are read with every change of a layout."""

    def __init__(self, model: nn.Module, build: Callable[[], nn.Module] | None = None) -> None:
        self._tensors = _values_of(model)
        self._frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        self._build = build

    def read(self, name: str) -> torch.Tensor:
        """See `Values`."""
        if name not in self._tensors and self._build is not None:
            self._tensors = _values_of(self._build()) | self._tensors
        return self._tensors[name]

    def read_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `Values`."""
        return self.read(name).reshape(-1)[start:stop]

    def is_at_hand(self, name: str) -> bool:
        """See `Values`."""
        return name in self._tensors

    def forget(self) -> None:
        """See `Values`."""
        if self._build is not None:
            self._tensors = {name: self._tensors[name] for name in self._frozen}

    @property
    def is_stored(self) -> bool:
        """See `Values`."""
        return False


def _values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().to("cpu", torch.float32 if parameter.requires_grad else parameter.dtype)
        for name, parameter in model.named_parameters()
    }
