"""The part of the model that a rank computes with: modules whose parameters are views of one flat buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from strategies.layout.space import FlatRanges, Slot
from strategies.model.blueprint import Blueprint
from strategies.model.stage import Stage

Runs = Sequence[tuple[int, int]] | None
"""The blocks start..stop of each model part; None: the whole model is one part."""


class ModelPart:
    """`modules` are the model parts of this rank, in model order. `weights` [flat.size] are their parameters, in the
    type that the blueprint has for them.

    With a `tensor_mesh` the modules are split over it; with `weights`, that buffer is used. `size` and `device` are
    those of the buffers, fp32 whatever the weights are, in which backward passes leave gradients.
    """

    is_sharded = False
    """Whether it has only its rows of the parameters (`strategies.model.fsdp`)."""
    own_frozen: Sequence[str] = ()
    """The frozen parameters of which it has a copy, so that the model's own are not computed with."""

    def __init__(
        self,
        blueprint: Blueprint,
        coordinate: int,
        runs: Runs,
        tensor_mesh: Any = None,
        weights: torch.Tensor | None = None,
    ) -> None:
        self.blueprint = blueprint
        self.coordinate = coordinate
        self.runs = None if runs is None else tuple(runs)
        self.device = blueprint.device
        space = blueprint.space
        self.flat = FlatRanges.of(space.ranges_of(runs), space.boundary)
        self.size = self.flat.size
        if weights is None:
            weights = torch.zeros(self.size, dtype=blueprint.dtype, device=self.device)
        self.weights = weights
        self.is_plain = runs is None and tensor_mesh is None
        self._mesh = tensor_mesh
        blueprint.frozen.keep_on(self.device, blueprint.frozen)
        if self.is_plain:
            self.modules: list[Stage] = [blueprint.whole()]
        else:
            self.modules = [blueprint.stage(run) for run in (runs if runs is not None else [None])]
            if tensor_mesh is not None:
                for module in self.modules:
                    blueprint.parallelize(module, tensor_mesh)
        self.slots: list[tuple[Slot, int]] = []
        self._parameters: list[nn.Parameter] = []
        bound: dict[str, nn.Parameter] = {}
        for slot in space.slots:
            where = next(self.flat.locate(slot.offset, slot.stop), None)
            if where is not None:
                parameter = nn.Parameter(self._wrap(self._view(self.weights, slot, where[1]), slot))
                parameter.grad_dtype = torch.float32
                bound[slot.name] = parameter
                self.slots.append((slot, where[1]))
                self._parameters.append(parameter)
        for module, names in self._names_by_module(bound):
            blueprint.bind(module, {name: bound[name] for name in names})
        for name, parameter in bound.items():
            if tensor_mesh is not None and blueprint.is_reduced(name):
                parameter.register_hook(add_up(tensor_mesh))
        for module in self.modules:
            module.train()

    def _names_by_module(self, bound: dict[str, nn.Parameter]) -> list[tuple[Stage, list[str]]]:
        if self.runs is None:
            return [(self.modules[0], list(bound))]
        blocks = {slot.name: slot.block for slot, _ in self.slots}
        return [
            (module, [name for name in bound if start <= blocks[name] < stop])
            for module, (start, stop) in zip(self.modules, self.runs, strict=True)
        ]

    @staticmethod
    def _view(buffer: torch.Tensor, slot: Slot, offset: int) -> torch.Tensor:
        return buffer[offset : offset + slot.numel].view(slot.shape)

    def _wrap(self, local: torch.Tensor, slot: Slot) -> torch.Tensor:
        """A tensor-parallel parameter is a distributed tensor around this rank's share."""
        if self._mesh is None or self.blueprint.styles.get(slot.name.rpartition(".")[0]) is None:
            return local
        if self.blueprint.is_reduced(slot.name):
            return local
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placement = Replicate() if slot.dim is None else Shard(slot.dim)
        return DTensor.from_local(local, self._mesh, [placement], run_check=False)

    def new_gradient(self) -> torch.Tensor:
        """A buffer [size] for gradients, with anything in it."""
        return torch.empty(self.size, device=self.device)

    def accumulate_into(self, buffer: torch.Tensor, module: int | None = None) -> None:
        """Points every parameter's `.grad` (of all modules, or of one) into `buffer` [size]; backward passes add to it
        in place."""
        with torch.no_grad():
            for (slot, offset), parameter in zip(self.slots, self._parameters, strict=True):
                if module is None or self._is_in(slot, module):
                    parameter.grad = self._wrap(self._view(buffer, slot, offset), slot)

    def _is_in(self, slot: Slot, module: int) -> bool:
        if self.runs is None:
            return True
        start, stop = self.runs[module]
        return start <= slot.block < stop

    def release_gradients(self) -> None:
        """Unbinds the parameters from any accumulation buffer."""
        for parameter in self._parameters:
            parameter.grad = None

    def close(self) -> None:
        """Gives the modules up; the weights stay."""
        self.release_gradients()
        if self.is_plain:
            self.blueprint.release(self.blueprint.model)
        self.modules = []
        self._parameters = []


def add_up(mesh: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Adds the gradients of a parameter that is whole on every tensor-parallel rank, of which each has a part only."""
    from strategies.compat import all_reduce

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        return all_reduce(gradient.float(), "sum", mesh).to(gradient.dtype)  # type: ignore[no-any-return]

    return hook
