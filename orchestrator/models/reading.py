"""The first values of a model that a directory has: read parameter by parameter, and of one only the rows that are
wanted where the file has it as the model does."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import nn

from orchestrator.models.problems import reason_of, refused
from orchestrator.models.transformers_internals import Recipe, adjust, plan_reading, untie
from orchestrator.models.weights import SavedWeights, TensorInfo
from strategies.model.values import Values


class Account(NamedTuple):
    """What of a directory does not fit the model: tensors that it lacks, that it has in another shape (there, here),
    and that the model has no place for."""

    missing: tuple[str, ...]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    unexpected: tuple[str, ...]


class DirectoryValues:
    """Of a transformers model without parameters, from `saved`, and those that it lacks from `new`. See
    `strategies.model.values.Values`. Persistent buffers are read at once.

    Raises ModelError when the directory cannot be read.
    """

    def __init__(self, model: Any, saved: SavedWeights, new: Values) -> None:
        self._model, self._saved, self._new = model, saved, new
        self._recipes: dict[str, Recipe] = {}
        self._last: tuple[str, dict[str, torch.Tensor]] | None = None
        self._lock = threading.Lock()
        there = saved.tensors()
        plan = plan_reading(model, there)
        shapes: dict[str, tuple[int, ...]] = {}
        for recipe in plan.recipes:
            try:
                found = recipe.convert(model, lambda name: _without_memory(there[name]))
            except Exception as error:
                # Converters are of all kinds, and meet all kinds of files.
                names = ", ".join(name for name, _ in recipe.sources[:3])
                raise refused(
                    f"{saved.name}: {recipe.first_target} cannot be made of {names}: {reason_of(error)}"
                ) from error
            for name, tensor in found.items():
                self._recipes[name], shapes[name] = recipe, tuple(tensor.shape)
        plan.missing.difference_update(self._recipes)
        self._tie(plan.missing)
        adjust(model, plan)
        state = model.state_dict()
        mismatched = {
            name: (shape, tuple(state[name].shape))
            for name, shape in shapes.items()
            if shape != tuple(state[name].shape)
        }
        for name in mismatched:
            del self._recipes[name]
        self.account = Account(tuple(sorted(plan.missing)), mismatched, tuple(sorted(plan.unexpected)))
        for name, buffer in model.named_buffers():
            if name in self._recipes:
                buffer.copy_(self._of(name))

    def _tie(self, missing: set[str]) -> None:
        """A tied parameter is there if one of its names is. One that is there under two names, with two values, is two
        parameters, whatever the configuration says."""
        one = {id(parameter): name for name, parameter in reversed(list(self._model.named_parameters()))}
        for other, parameter in list(self._model.named_parameters(remove_duplicate=False)):
            name = one[id(parameter)]
            if name == other:
                continue
            if name in self._recipes and other in self._recipes:
                if not torch.equal(self._of(name), self._of(other)):
                    recipe, (owner, _, key) = self._recipes[other], other.rpartition(".")
                    self._recipes[self.separate(self._model.get_submodule(owner), key)] = recipe
                    untie(self._model, other)
            elif name in self._recipes:
                self._recipes[other] = self._recipes[name]
            elif other in self._recipes:
                self._recipes[name] = self._recipes[other]
            missing.difference_update(self._recipes)

    def separate(self, owner: nn.Module, key: str) -> str:
        """Gives a place of a shared parameter one of its own, which begins with the same values; its name."""
        before = {id(parameter): name for name, parameter in self._model.named_parameters()}
        shared = owner._parameters[key]
        assert shared is not None
        owner._parameters[key] = apart = nn.Parameter(torch.empty_like(shared), requires_grad=shared.requires_grad)
        name: str
        (name,) = (each for each, parameter in self._model.named_parameters() if parameter is apart)
        self._recipes[name] = self._recipes[before[id(shared)]]
        return name

    def _of(self, name: str) -> torch.Tensor:
        """A tensor of the model, of the directory's type where that is no conversion's."""
        recipe = self._recipes[name]
        if recipe.converter is None:
            return self._saved.read(recipe.sources[0][0])
        with self._lock:
            if self._last is None or self._last[0] != recipe.first_target:
                found = recipe.convert(self._model, lambda source: _as_fp32(self._saved.read(source)))
                self._last = (recipe.first_target, found)
            return self._last[1][name]

    def read(self, name: str) -> torch.Tensor:
        """See `Values`."""
        return _as_fp32(self._of(name)) if name in self._recipes else self._new.read(name)

    def read_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `Values`."""
        if name not in self._recipes:
            return self._new.read_range(name, start, stop)
        recipe = self._recipes[name]
        if recipe.converter is not None:
            return self.read(name).reshape(-1)[start:stop]
        source = recipe.sources[0][0]
        shape = self._saved.tensors()[source].shape
        width = max(1, torch.Size(shape[1:]).numel())
        if not shape or not width:
            return self.read(name).reshape(-1)[start:stop]
        first = start // width
        rows = self._saved.read_rows(source, first, -(-stop // width))
        return _as_fp32(rows).reshape(-1)[start - first * width : stop - first * width]

    def is_at_hand(self, name: str) -> bool:
        """See `Values`."""
        return False

    def forget(self) -> None:
        """See `Values`."""
        with self._lock:
            self._last = None
        self._new.forget()

    @property
    def is_stored(self) -> bool:
        """See `Values`: unless there are some that the directory lacks."""
        account = self.account
        return not (account.missing or account.mismatched)


def _without_memory(info: TensorInfo) -> torch.Tensor:
    return torch.empty(info.shape, dtype=info.dtype, device="meta")


def _as_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
