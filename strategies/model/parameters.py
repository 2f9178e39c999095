"""The parameters of a model: which are trained, and where each one is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

Sites = dict[str, list[tuple[str, str]]]
"""The (module, attribute) that each parameter is at, by its one name: modules may share it."""


def place_of(site: tuple[str, str]) -> str:
    """The name of the parameter that a module has under this attribute; the model itself has no name."""
    return ".".join(filter(None, site))


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def sites_of(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Sites:
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: Sites = {name: [] for name in parameters}
    for owner, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in names:
                found[names[id(parameter)]].append((owner, key))
    return found


def split_ties(model: nn.Module, sites: Sites) -> tuple[Sites, dict[str, str]]:
    """The sites, those apart at which a table of tokens is the head, too: by names of their own, and of which parameter
    they are the second use."""
    found, aliased = dict(sites), {}
    for name, places in sites.items():
        tables = [each for each in places if isinstance(model.get_submodule(each[0]), nn.Embedding)]
        others = [each for each in places if each not in tables]
        if tables and others:
            # Its name is that of the use that the model has first.
            first, second = (tables, others) if places[0] in tables else (others, tables)
            alias = place_of(second[0])
            found[name], found[alias] = first, second
            aliased[alias] = name
    return found, aliased


def made_up_values(
    shape: torch.Size, seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Numbers of about the size of weights, to try a model out with. No two rows of a matrix are alike, and yet it
    takes the memory of a row and a column only, whatever the shape: element i, j is number i + j of a sequence. (Stacks
    of matrices have memory of their own: operations on experts refuse others.) Of an integer type, codes of weights."""
    generator = torch.Generator().manual_seed(seed)
    sequence = torch.randn(sum(shape) - len(shape) + 1, generator=generator).to(device)
    # Vectors scale what goes through: none of them is near zero.
    sequence = sequence.mul_(0.05) if len(shape) > 1 else sequence.mul_(0.1).add_(1.0)
    if not dtype.is_floating_point:
        sequence = sequence.mul_(1000).remainder_(128)
    values = sequence.to(dtype).as_strided(shape, (1,) * len(shape))
    return values if len(shape) < 3 else values.contiguous()
