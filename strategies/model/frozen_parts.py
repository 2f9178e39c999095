"""Which frozen parameters a rank computes with, and how much of each: those of its stages, of what tensor parallelism
splits its share."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from strategies.layout.space import Cut

if TYPE_CHECKING:
    from strategies.model.blueprint import Blueprint


class FrozenParts:
    """`needed` are the names of those that the blocks `runs` (see `strategies.model.model_part.Runs`) compute with;
    `split` those of which every coordinate of `tensor` has a share, and `whole` those that are computed with as the
    model has them. (The one tensor of a table and of a head may be both.)"""

    def __init__(self, blueprint: Blueprint, runs: Collection[tuple[int, int]] | None, tensor: int) -> None:
        self._blueprint = blueprint
        self._tensor = tensor
        self.needed: set[str] = set()
        self.split: set[str] = set()
        self.whole: set[str] = set()
        for place, blocks in _places(blueprint, runs is not None):
            if runs is not None and not any(start <= block < stop for start, stop in runs for block in blocks):
                continue
            name = blueprint.names[place]
            self.needed.add(name)
            (self.whole if self.cut(place, 0) is None else self.split).add(name)

    @property
    def in_both_ways(self) -> set[str]:
        return self.whole & self.split

    def cut(self, place: str, coordinate: int) -> Cut | None:
        """What a coordinate has of the parameter that a module has in this place; None for all of it."""
        dim = None if self._tensor == 1 else self._blueprint.dim_of(place)
        if dim is None:
            return None
        return Cut(dim, self._blueprint.plan.packs.get(place, 1), coordinate, self._tensor)

    @torch.no_grad()
    def fill(self, module: nn.Module, names: Collection[str], mesh: Any) -> None:
        """Has a module that the blueprint made and split over the tensor-parallel `mesh` compute with this rank's
        shares of these, which are without memory in it."""
        from torch.distributed.tensor import DTensor, Shard

        blueprint = self._blueprint
        frozen = blueprint.frozen
        own = dict(blueprint.model.named_parameters(remove_duplicate=False))
        for place, parameter in list(module.named_parameters(remove_duplicate=False)):
            if parameter.requires_grad or blueprint.names[place] not in names:
                continue
            owner, _, key = place.rpartition(".")
            cut = self.cut(place, mesh.get_local_rank())
            if cut is None:
                module.get_submodule(owner)._parameters[key] = own[place]
                continue
            share: torch.Tensor = frozen.share(blueprint.names[place], cut)
            share = share.to(blueprint.device, frozen.computed_in(share.dtype), copy=True)
            if blueprint.plan.is_distributed(place):
                share = DTensor.from_local(share, mesh, [Shard(cut.dim)], run_check=False)
            module.get_submodule(owner)._parameters[key] = nn.Parameter(share, requires_grad=False)


def _places(blueprint: Blueprint, by_block: bool) -> Iterator[tuple[str, Collection[int]]]:
    """Every place of a frozen parameter, and with `by_block` the blocks that compute with it."""
    head = blueprint.stages.num_layers + 1
    anatomy = blueprint.stages.anatomy() if by_block else None
    for place, parameter in blueprint.model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            continue
        if anatomy is None:
            yield place, ()
        elif place.startswith(f"{blueprint.layers}."):
            yield place, (blueprint.block_of(place),)
        elif place not in anatomy.before | anatomy.after:
            yield place, range(head + 1)
        else:
            yield place, [*([0] if place in anatomy.before else []), *([head] if place in anatomy.after else [])]
