"""The part of the model that a rank computes with: modules whose parameters are views of one flat buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn

from strategies.layout.space import FlatRanges, Slot, round_up
from strategies.model.blueprint import Blueprint
from strategies.model.frozen_parts import FrozenParts
from strategies.model.stage import Stage

Runs = Sequence[tuple[int, int]] | None
"""The blocks start..stop of each model part; None: the whole model is one part."""


class _Use(NamedTuple):
    """A parameter of a module: what of the state it is, the block that uses it, where its gradient goes."""

    name: str
    slot: Slot
    block: int
    parameter: nn.Parameter
    gradient_at: int


class ModelPart:
    """`modules` are the model parts of this rank, in model order. `weights` are their parameters, in the type that the
    blueprint has for them: those that are state here, `flat`, and behind them what is `borrowed`: second uses (see
    `strategies.layout.space.Alias`) of parameters that other ranks have.

    With a `tensor_mesh` the modules are split over it; with `weights`, that buffer is used. `size` and `device` are
    those of the buffers, fp32 whatever the weights are, in which backward passes leave gradients: of what is state
    here, and behind it of every second use, at `alias_offsets`.
    """

    is_sharded = False
    """Whether it has only its rows of the parameters (`strategies.model.fsdp`)."""

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
        aliases = space.aliases_of(runs)
        starts = accumulate((round_up(alias.slot.numel) for alias in aliases), initial=self.flat.size)
        *offsets, self.size = starts
        self.alias_offsets = {alias.name: offset for alias, offset in zip(aliases, offsets, strict=True)}
        borrowed = [each for each in aliases if next(self.flat.locate(each.slot.offset, each.slot.stop), None) is None]
        places = accumulate((round_up(alias.slot.numel) for alias in borrowed), initial=self.flat.size)
        *at, total = places
        self.borrowed = {alias.name: offset for alias, offset in zip(borrowed, at, strict=True)}
        if weights is None:
            weights = torch.zeros(total, dtype=blueprint.dtype, device=self.device)
        self.weights = weights
        self.state_weights = weights if total == self.flat.size else weights[: self.flat.size]
        """Those that are state here."""
        self._mesh = tensor_mesh
        frozen = FrozenParts(blueprint, self.runs, 1 if tensor_mesh is None else tensor_mesh.size())
        self.kept_frozen = frozen.whole
        """The frozen parameters that it computes with as the model has them."""
        blueprint.frozen.keep_on(self.device, self.kept_frozen)
        if self.is_plain:
            self.modules: list[Stage] = [blueprint.stages.whole()]
        else:
            self.modules = [blueprint.stages.make(run, frozen.split) for run in (runs if runs is not None else [None])]
            if tensor_mesh is not None:
                for module in self.modules:
                    blueprint.parallelize(module, tensor_mesh)
                    frozen.fill(module.module, frozen.split, tensor_mesh)
        self.slots: list[tuple[Slot, int]] = []
        self._uses: list[_Use] = []
        bound: dict[str, nn.Parameter] = {}
        for slot in space.slots:
            where = next(self.flat.locate(slot.offset, slot.stop), None)
            if where is not None:
                bound[slot.name] = self._use(slot.name, slot, slot.block, where[1], where[1])
                self.slots.append((slot, where[1]))
        of_slot = {slot.name: offset for slot, offset in self.slots}
        for alias in aliases:
            weights_at = self.borrowed.get(alias.name, of_slot.get(alias.slot.name, 0))
            gradient_at = self.alias_offsets[alias.name]
            bound[alias.name] = self._use(alias.name, alias.slot, alias.block, weights_at, gradient_at)
        for module, names in self._names_by_module(bound):
            blueprint.bind(module, {name: bound[name] for name in names})
        for name, parameter in bound.items():
            if tensor_mesh is not None and blueprint.plan.is_reduced(name):
                parameter.register_hook(add_up(tensor_mesh))
        for module in self.modules:
            module.train()

    @property
    def swapped(self) -> frozenset[str]:
        """See `ShardedModelPart`."""
        return frozenset()

    @property
    def is_plain(self) -> bool:
        """Whether it computes with the model itself."""
        return self.runs is None and self._mesh is None

    def _names_by_module(self, bound: dict[str, nn.Parameter]) -> list[tuple[Stage, list[str]]]:
        if self.runs is None:
            return [(self.modules[0], list(bound))]
        blocks = {use.name: use.block for use in self._uses}
        return [
            (module, [name for name in bound if start <= blocks[name] < stop])
            for module, (start, stop) in zip(self.modules, self.runs, strict=True)
        ]

    def _use(self, name: str, slot: Slot, block: int, weights_at: int, gradient_at: int) -> nn.Parameter:
        parameter = nn.Parameter(self._wrap(self._view(self.weights, slot, weights_at), slot))
        parameter.grad_dtype = torch.float32
        self._uses.append(_Use(name, slot, block, parameter, gradient_at))
        return parameter

    @staticmethod
    def _view(buffer: torch.Tensor, slot: Slot, offset: int) -> torch.Tensor:
        return buffer[offset : offset + slot.numel].view(slot.shape)

    def _wrap(self, local: torch.Tensor, slot: Slot) -> torch.Tensor:
        """A tensor-parallel parameter is a distributed tensor around this rank's share."""
        if self._mesh is None or not self.blueprint.plan.is_distributed(slot.name):
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
            for use in self._uses:
                if module is None or self._is_in(use.block, module):
                    use.parameter.grad = self._wrap(self._view(buffer, use.slot, use.gradient_at), use.slot)

    def _is_in(self, block: int, module: int) -> bool:
        if self.runs is None:
            return True
        start, stop = self.runs[module]
        return start <= block < stop

    def release_gradients(self) -> None:
        """Unbinds the parameters from any accumulation buffer."""
        for use in self._uses:
            use.parameter.grad = None

    def close(self) -> None:
        """Gives the modules up; the weights stay."""
        self.release_gradients()
        if self.is_plain:
            self.blueprint.release(self.blueprint.model)
        self.modules = []
        self._uses = []


def add_up(mesh: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Adds the gradients of a parameter that is whole on every tensor-parallel rank, of which each has a part only."""
    from strategies.compat import all_reduce

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        return all_reduce(gradient.float(), "sum", mesh).to(gradient.dtype)  # type: ignore[no-any-return]

    return hook
