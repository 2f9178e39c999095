"""Whether the parameters of a model can be sharded block by block: its layers, and what is in none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from strategies.model.anatomy import find_layers
from strategies.model.parameters import place_of, sites_of, trained_parameters
from strategies.model.stage import PassThrough


def blocks_of(module: nn.Module, layers: str | None) -> list[nn.Module]:
    """The layers that `module` (a model, or a stage of it) has, by the name of the list of them; its largest list where
    that is not known."""
    if layers is None:
        lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
        return list(max(lists, key=len, default=[]))
    found: Any = module.get_submodule(layers)
    return [layer for layer in found if not isinstance(layer, PassThrough)]


def check_sharded(model: nn.Module, order: Sequence[int] | None) -> None:
    """Raises ValueError when the parameters of the model, which may be without weights, cannot be sharded: two blocks
    share a trained one, and each gathers and reduces its own; or not each is computed once in a pass, of which `order`
    are the numbers of the layers, where that is known."""
    layers, _ = find_layers(model)
    other = "Use another shard, which computes with whole parameters"
    for places in across_blocks(model, layers, trained_parameters(model)).values():
        raise ValueError(
            "shard: parameters cannot be used with a trained parameter that two layers share, as each layer gathers "
            f"its own: {', '.join(places)}. {other}"
        )
    if order is not None and sorted(order) != list(range(len(blocks_of(model, layers)))):
        raise ValueError(
            f"shard: parameters cannot be used with {type(model).__name__}, which does not compute each of its layers "
            f"({layers}) once in a pass, as each is gathered once. {other}"
        )


def across_blocks(model: nn.Module, layers: str | None, parameters: Mapping[str, nn.Parameter]) -> dict[str, list[str]]:
    """The parameters that two blocks, or a block and what is in none, share, with all the names that each has."""
    blocks = blocks_of(model, layers)
    block_of = {id(part): number for number, block in enumerate(blocks) for part in block.modules()}
    return {
        name: [place_of(site) for site in sites]
        for name, sites in sites_of(model, parameters).items()
        if len({block_of.get(id(model.get_submodule(owner)), -1) for owner, _ in sites}) > 1
    }
