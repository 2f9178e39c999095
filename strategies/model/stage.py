"""A pipeline stage: a model cut down to some of its blocks, as a function of one tensor.

Other stages' modules stand aside, and the model's own forward does the rest. What it prepares for its layers (masks,
position embeddings) it prepares anew for every micro-batch and in every stage; so once two different inputs have shown
that this depends on their shape alone, the modules of the stage are called directly with what was prepared before.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Arguments = list[tuple[tuple[Any, ...], dict[str, Any]]]
"""What each layer is given beside hidden states."""


class PassThrough(nn.Module):
    """Stands where another pipeline stage has a module: gives its first argument back."""

    def forward(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return value


@dataclass
class _Prepared:
    """What the layers were given with `first`; whether another input of its shape got the same (None: not known)."""

    first: torch.Tensor
    arguments: Arguments
    is_same: bool | None = None


class Stage(nn.Module):
    """`module` is the whole model with other stages' modules standing aside; `before`, `layers` and `after` are those
    of this stage in order. Unless `may_call_directly`, the model's own forward is always gone through."""

    def __init__(
        self,
        module: nn.Module,
        *,
        is_first: bool,
        before: Sequence[nn.Module] = (),
        layers: Sequence[nn.Module] = (),
        after: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.module = module
        self.may_call_directly = True
        takes = inspect.signature(module.forward).parameters
        self._argument = "inputs_embeds" if not is_first and "inputs_embeds" in takes else "input_ids"
        # Not as modules of this one: they are the model's.
        self._parts = (tuple(before), tuple(layers), tuple(after))
        self._prepared: dict[tuple[torch.Size, torch.dtype], _Prepared] = {}

    def forward(self, value: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Token ids int64 [batch, length] or hidden states [batch, length, width] to hidden states or logits. With
        `position_ids` int64 [batch, length] what the layers are given depends on more than the shape."""
        if position_ids is not None:
            return self._of_the_model(value, position_ids=position_ids)
        known = self._prepared.get((value.shape, value.dtype))
        if not self.may_call_directly or (known is not None and known.is_same is False):
            return self._of_the_model(value)
        if known is not None and known.is_same:
            return self._directly(value, known.arguments)
        output, arguments = self._watched(value)
        if known is None:
            self._prepared[value.shape, value.dtype] = _Prepared(value.detach(), arguments)
        elif not torch.equal(known.first, value):
            known.is_same = _same(known.arguments, arguments)
        return output

    def _of_the_model(self, value: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        output = self.module(**{self._argument: value}, **more)
        return _not_a_view(output if isinstance(output, torch.Tensor) else output.logits)

    def _directly(self, value: torch.Tensor, arguments: Arguments) -> torch.Tensor:
        before, layers, after = self._parts
        for module in before:
            value = module(value)
        for layer, (more, named) in zip(layers, arguments, strict=True):
            value = layer(value, *more, **named)
        for module in after:
            value = module(value)
        return _not_a_view(value)

    def _watched(self, value: torch.Tensor) -> tuple[torch.Tensor, Arguments]:
        arguments: Arguments = []

        def watch(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            # Who names the hidden states too is not called directly: they are among what differs.
            arguments.append((given[1:], named))

        handles = [layer.register_forward_pre_hook(watch, with_kwargs=True) for layer in self._parts[1]]
        try:
            return self._of_the_model(value), arguments
        finally:
            for handle in handles:
                handle.remove()


def _same(first: Any, second: Any) -> bool:
    """Whether two arguments are equal to the last bit, and constants."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return not first.requires_grad and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return isinstance(first, (type(None), bool, int, float, str)) and bool(first == second)


def _not_a_view(output: torch.Tensor) -> torch.Tensor:
    """The same values as a tensor of its own: pipelining lets go of a stage's graph by detaching its output in place,
    which views do not allow. (Transformers gives a view of all hidden states.)"""
    base = output._base
    if base is None:
        return output
    same = base.shape == output.shape and base.stride() == output.stride() and base.grad_fn is not None
    # FSDP2 learns from a hook on what a module returns that a backward pass begins; then that must be part of it.
    return base if same and not output._backward_hooks else output.clone()
