"""Modules that compute with plain tensors where tensor parallelism has split what they compute with: what they give is
a part of a sum, or what they are given has a part of its gradient on each rank. All of it is added up, as in
Megatron-LM (Shoeybi et al. 2019, section 3: its functions f and g).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def add_up_experts(module: nn.Module, mesh: Any) -> None:
    """For a module of stacked experts, each rank with a part of every one: given hidden states, choices and weights, it
    gives a part of a sum."""

    def before(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return tuple(_shared(each, mesh) for each in given), {key: _shared(each, mesh) for key, each in named.items()}

    def behind(module: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        return _Sum.apply(output, mesh)  # type: ignore[no-untyped-call]

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(behind)


def add_up_rope(module: nn.Module, width: int, mesh: Any) -> None:
    """For the projection of multi-head latent attention that also gives the rotated part of keys, its last columns, of
    this width: that goes into the heads of each rank as it is. (The rest goes through a split projection, which adds
    up.)"""

    def behind(module: nn.Module, given: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        latent, rope = output.split([output.shape[-1] - width, width], dim=-1)
        return torch.cat([latent, _shared(rope, mesh)], dim=-1)

    module.register_forward_hook(behind)


def share_input(module: nn.Module, mesh: Any) -> None:
    """For a linear module of which each rank has a part of what it gives."""

    def before(module: nn.Module, given: tuple[Any, ...]) -> Any:
        return tuple(_shared(each, mesh) for each in given)

    module.register_forward_pre_hook(before)
    if hasattr(module, "nf"):
        module.nf = module.nf // mesh.size()  # type: ignore[assignment, operator]


def own_output(module: nn.Module) -> None:
    """For a module of whose distributed output the local tensor is handed on: torch takes that for a view of another,
    in which a model may not change anything in place, as some add to what a module gave. It is there at once."""

    def behind(module: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        is_local = isinstance(output, torch.Tensor) and not hasattr(output, "to_local")
        return _Own.apply(output) if is_local else None  # type: ignore[no-untyped-call]

    module.register_forward_hook(behind)


def divide_input(module: nn.Module, mesh: Any) -> None:
    """For an expert that every rank computes whole, in a module whose outputs are added up."""

    def before(module: nn.Module, given: tuple[Any, ...]) -> Any:
        return given[0] / mesh.size(), *given[1:]

    module.register_forward_pre_hook(before)


class SumOfParts:
    """Stands for the `forward` of a linear module of which each rank has a part of what it is given."""

    def __init__(self, module: nn.Module, mesh: Any) -> None:
        self._module, self._mesh = module, mesh
        self._is_transposed = not isinstance(module, nn.Linear)

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        weight: Any = self._module._parameters["weight"]
        part = value @ (weight if self._is_transposed else weight.t())
        total: torch.Tensor = _Sum.apply(part, self._mesh)  # type: ignore[no-untyped-call]
        bias = self._module._parameters.get("bias")
        return total if bias is None else total + bias


def _shared(value: Any, mesh: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.requires_grad:
        return _SumOfGradients.apply(value, mesh)  # type: ignore[no-untyped-call]
    return value


def _total(value: torch.Tensor, mesh: Any) -> torch.Tensor:
    from strategies.compat import all_reduce

    return all_reduce(value.contiguous(), "sum", mesh)  # type: ignore[no-any-return]


class _Own(torch.autograd.Function):
    """The same values, in the same memory, as a tensor that is no view."""

    @staticmethod
    def forward(ctx: Any, value: Any) -> torch.Tensor:
        # What ranks exchange comes as a tensor that waits for it in its first use.
        arrived: torch.Tensor = value.trigger_wait() if hasattr(value, "trigger_wait") else value
        return arrived.data

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


class _Sum(torch.autograd.Function):
    """The sum over ranks of what each has."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, mesh: Any) -> torch.Tensor:
        return _total(value, mesh)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class _SumOfGradients(torch.autograd.Function):
    """What all ranks have; each knows a part of its gradient."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, mesh: Any) -> torch.Tensor:
        ctx.mesh = mesh
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _total(gradients[0], ctx.mesh), None
