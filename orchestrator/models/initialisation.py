"""The first values of a model that begins at random: made parameter by parameter, each from a random stream of its own,
by the model's own initialisers.

A parameter's values are a function of (seed, name), so that a rank can make those that it needs and no others. The
initialisers are transformers': each class initialises the parameters of a module with `_init_weights`, from the inside
out, and leaves alone what is marked as initialised. Here all but one parameter are on the meta device, where
initialising takes neither time nor memory.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from strategies.model.randomness import seed_stream
from strategies.model.values import BuiltValues


@contextlib.contextmanager
def without_parameters() -> Iterator[None]:
    """In here, what becomes a parameter of a module goes to the meta device at once. (Buffers, which a model computes
    when it is made, stay.) Not for several threads at a time."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class KeyedValues:
    """Of a transformers model without parameters, from `seed`. `build` makes the whole model, in a stream that is at
    its beginning: for parameters that the class's initialisers do not know. See `strategies.model.values.Values`."""

    def __init__(self, model: Any, seed: int, build: Callable[[], nn.Module]) -> None:
        # Of its own: an initialiser may change, or skip, others than the one that it is asked for, where they have
        # values, as those of a model have that is computed with.
        self._model = copy.deepcopy(model)
        self._seed = seed
        self._build = build
        self._built: dict[str, BuiltValues] = {}
        self._last: tuple[str, torch.Tensor] | None = None

    def read(self, name: str) -> torch.Tensor:
        """See `Values`."""
        if self._last is None or self._last[0] != name:
            self._last = (name, self._make(name))
        return self._last[1]

    def read_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `Values`."""
        return self.read(name).reshape(-1)[start:stop]

    def is_at_hand(self, name: str) -> bool:
        """See `Values`."""
        return False

    def forget(self) -> None:
        """See `Values`."""
        self._last, self._built = None, {}

    @property
    def is_stored(self) -> bool:
        """See `Values`."""
        return False

    @torch.no_grad()
    def _make(self, name: str) -> torch.Tensor:
        owner, _, key = name.rpartition(".")
        modules = _way_to(self._model, owner)
        own = modules[-1]._parameters
        before = dict(own)
        marked = _mark_all(self._model)
        states = torch.get_rng_state()
        try:
            own[key] = _without_value(before[key])
            seed_stream(self._seed, "initialisation", name)
            try:
                _initialise(self._model, modules)
            except (NotImplementedError, RuntimeError):
                # It copies what it has made where the module's other parameters are.
                own.update((other, _skipped(each)) for other, each in before.items() if other != key)
                own[key] = _without_value(before[key])
                seed_stream(self._seed, "initialisation", name)
                _initialise(self._model, modules)
            made = own[key]
            assert made is not None
            if made.isnan().any():
                return self._of_whole(name)
            return made.detach()
        finally:
            own.update(before)
            torch.set_rng_state(states)
            for tensor in marked:
                del tensor._is_hf_initialized

    def _of_whole(self, name: str) -> torch.Tensor:
        """A parameter that no initialiser knows has the values that the model's constructor gives it."""
        if not self._built:
            seed_stream(self._seed, "initialisation")
            self._built[""] = BuiltValues(self._build())
        return self._built[""].read(name)


def _without_value(like: nn.Parameter | None) -> nn.Parameter:
    """Of this size, with memory."""
    assert like is not None
    return nn.Parameter(torch.full(like.shape, torch.nan), requires_grad=like.requires_grad)


def _skipped(like: nn.Parameter | None) -> nn.Parameter | None:
    """The same, marked as one that has been initialised."""
    if like is None:
        return None
    made: Any = _without_value(like)
    made._is_hf_initialized = True
    return made  # type: ignore[no-any-return]


def _way_to(model: nn.Module, owner: str) -> list[nn.Module]:
    """The modules from the model down to the one that is called `owner`."""
    way = [model]
    for part in owner.split(".") if owner else ():
        way.append(way[-1]._modules[part])  # type: ignore[arg-type]
    return way


def _mark_all(model: nn.Module) -> list[Any]:
    """Marks what a model has as initialised, where it is not; what has been marked."""
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    marked = [tensor for tensor in tensors if not getattr(tensor, "_is_hf_initialized", False)]
    for tensor in marked:
        tensor._is_hf_initialized = True
    return marked


def _initialise(model: Any, modules: list[nn.Module]) -> None:
    """Has each of these modules, from the last to the first, initialised by the innermost model that it is in."""
    from transformers import PreTrainedModel
    from transformers.initialization import guard_torch_init_functions

    with guard_torch_init_functions():
        for depth in range(len(modules) - 1, -1, -1):
            inside = next(part for part in reversed(modules[: depth + 1]) if isinstance(part, PreTrainedModel))
            inside._init_weights(modules[depth])
