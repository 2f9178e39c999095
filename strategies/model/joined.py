"""What a layer is given gets its gradient from the layer as one.

Where hidden states are used by more than the next layer, their gradient is a sum of several, and floating-point sums
depend on how they are put together. A layer that is sharded, or in another pipeline stage than what it is given, adds
up its own uses first; so a layer that is not does so, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients


class _JoinInputs:
    def __call__(self, layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        found: list[torch.Tensor] = []
        _collect((given, named), found)
        if not found or not torch.is_grad_enabled():
            return None
        joined = _Joined.apply(*found)  # type: ignore[no-untyped-call]
        by_id = {id(tensor): each for tensor, each in zip(found, joined, strict=True)}
        return _replaced((given, named), by_id)


def join_inputs(layer: nn.Module) -> None:
    """Once, however often it is called."""
    part_inputs(layer)
    layer.register_forward_pre_hook(_JoinInputs(), with_kwargs=True)


def part_inputs(layer: nn.Module) -> None:
    """Undoes `join_inputs`."""
    for key, hook in list(layer._forward_pre_hooks.items()):
        if isinstance(hook, _JoinInputs):
            del layer._forward_pre_hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)


def _collect(value: Any, found: list[torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        if value.requires_grad and not any(value is other for other in found):
            found.append(value)
    elif type(value) in (tuple, list):
        for each in value:
            _collect(each, found)
    elif type(value) is dict:
        for each in value.values():
            _collect(each, found)


def _replaced(value: Any, by_id: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return by_id.get(id(value), value)
    if type(value) in (tuple, list):
        return type(value)(_replaced(each, by_id) for each in value)
    if type(value) is dict:
        return {key: _replaced(each, by_id) for key, each in value.items()}
    return value
