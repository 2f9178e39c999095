"""What a model keeps beside its parameters, as far as Python can see it: a fingerprint by name.

That is its buffers, attributes of its modules and what these hold, closures of its functions and hooks, and for classes
that are not a library's also attributes of the class and the globals that `forward` names.
"""

from __future__ import annotations

import functools
import hashlib
import random
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

_DEPTH = 6
_CHUNK = 1 << 22
_LIBRARIES = frozenset({"torch", "transformers", "strategies", "orchestrator"})
_OF_ANY_MODULE = frozenset(vars(nn.Module())) | {"training"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)
_OPAQUE = (type, types.ModuleType, types.BuiltinFunctionType, torch.dtype, torch.device)

Footprint = dict[str, Any]
"""By name (`layers.0.scale`), what can be compared and no more."""


def footprint(model: nn.Module) -> Footprint:
    """Of all that `model` keeps but its parameters."""
    trained = {id(parameter) for parameter in model.parameters()}
    found: Footprint = {}
    walk = _Walk(found, seen=trained)
    for owner, module in model.named_modules():
        prefix = f"{owner}." if owner else ""
        for key, buffer in module._buffers.items():
            walk.add(prefix + key, buffer)
        for key, value in own_attributes(module):
            walk.add(prefix + key, value)
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            for number, hook in enumerate(hooks.values()):
                walk.add(f"{prefix}hook {number}", hook)
        _add_class(walk, prefix, type(module))
    return found


def changed(before: Footprint, after: Footprint) -> list[str]:
    """The names of what is not the same."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def own_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Those that a module has beside what torch gives every module."""
    for key, value in vars(module).items():
        if key not in _OF_ANY_MODULE:
            yield key, value


def is_of_a_library(value: Any) -> bool:
    """Whether a class or function is torch's, transformers' or ours, and not a user's."""
    return str(getattr(value, "__module__", "")).partition(".")[0] in _LIBRARIES


def _add_class(walk: _Walk, prefix: str, kind: type) -> None:
    for base in kind.__mro__:
        if is_of_a_library(base) or base is object:
            continue
        for key, value in vars(base).items():
            if not key.startswith("__") and not callable(value) and not isinstance(value, (staticmethod, classmethod)):
                walk.add(f"{prefix}{base.__name__}.{key}", value)
        forward = vars(base).get("forward")
        if forward is not None:
            walk.add(f"{prefix}{base.__name__}.forward", forward)


class _Walk:
    def __init__(self, found: Footprint, seen: set[int]) -> None:
        self._found = found
        self._seen = seen
        self._kept: list[Any] = []

    def add(self, name: str, value: Any, depth: int = 0) -> None:
        if isinstance(value, _PLAIN):
            self._found[name] = repr(value)
            return
        if isinstance(value, (nn.Module, *_OPAQUE)) or depth > _DEPTH or id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._kept.append(value)  # So that no other object gets its id.
        known = _digest(value)
        if known is not None:
            self._found[name] = known
            return
        for key, inner in _parts(value):
            self.add(f"{name}{key}", inner, depth + 1)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds."""
    if isinstance(value, Mapping):
        yield ".keys", repr([key if isinstance(key, _PLAIN) else type(key).__name__ for key in value])
        yield from ((f"[{key!r}]" if isinstance(key, _PLAIN) else "[...]", inner) for key, inner in value.items())
    elif isinstance(value, (set, frozenset)):
        yield ".items", repr(sorted(repr(item) for item in value if isinstance(item, _PLAIN)))
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
        yield "", value.__func__
    elif isinstance(value, functools.partial):
        yield "", value.func
        yield ".args", (value.args, value.keywords)
    elif isinstance(value, types.FunctionType):
        yield from _parts_of_function(value)
    elif hasattr(value, "__iter__") and hasattr(value, "__len__") and hasattr(value, "__getitem__"):
        yield ".len", len(value)
        yield from ((f"[{index}]", inner) for index, inner in enumerate(value))
    else:
        yield from ((f".{key}", inner) for key, inner in list(getattr(value, "__dict__", {}).items()))


def _parts_of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f" with {name}", cell.cell_contents
        except ValueError:
            continue  # Not set yet.
    if not is_of_a_library(function):
        yield from (
            (f" with {name}", function.__globals__[name]) for name in code.co_names if name in function.__globals__
        )


def _digest(value: Any) -> Any:
    """Of a leaf: a tensor, an array, a generator of random numbers. None: it is none."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value_sums(value))
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, hashlib.blake2b(np.ascontiguousarray(value).tobytes()).hexdigest())
    if isinstance(value, torch.Generator):
        return hashlib.blake2b(value.get_state().cpu().numpy().tobytes()).hexdigest()
    if isinstance(value, random.Random):
        return hash(value.getstate())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state(legacy=False))
    return None


def value_sums(tensor: torch.Tensor) -> tuple[int, ...]:
    """Sums over a tensor's bits, exact and so the same in any order, computed where it is."""
    if tensor.is_meta or not tensor.numel():
        return ()
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = data.view(torch.int32) if data.numel() % 4 == 0 else data
    totals = torch.zeros(3, dtype=torch.int64, device=tensor.device)
    places = torch.arange(1, 1 + min(_CHUNK, words.numel()), device=tensor.device)
    for number, chunk in enumerate(words.split(_CHUNK)):
        wide = chunk.to(torch.int64)
        weighed = wide * places[: len(wide)]
        totals += (2 * number + 1) * torch.stack([wide.sum(), (wide * wide).sum(), weighed.sum()])
    return tuple(totals.tolist())
