"""Whether a plan splits stacks of experts so that the parts of all ranks add up to what they give whole, found by
trying: a small copy of the module, with two shares one after the other.

Matrices may stand end to end in one (the two of a gated network), and a plan that does not say so splits between them:
each rank then multiplies what does not belong together. Which it is, trying shows as well.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from strategies.layout.space import Cut
from strategies.model.tensor_plan import ADDED_UP, IDENTITY, TensorPlan

_PACKS = (1, 2)
_CLOSE = 1e-4
_ROWS = 6


def with_tried_stacks(model: nn.Module, plan: TensorPlan) -> TensorPlan:
    """The plan, with as many matrices in each stack as trying has shown. A module that cannot be tried apart is taken
    to be as it says. Raises ValueError where no way to split it gives the same."""
    stacks = dict(plan.stacks)
    known: dict[Any, Mapping[str, int]] = {}
    for owner, style in plan.styles.items():
        module = model.get_submodule(owner)
        own = {key: plan.stacks[f"{owner}.{key}"] for key in module._parameters if f"{owner}.{key}" in plan.stacks}
        if style not in ADDED_UP or not own:
            continue
        identities = tuple(key for key in module._modules if plan.styles.get(f"{owner}.{key}") == IDENTITY)
        shapes = tuple((key, module._parameters[key].shape, said) for key, said in own.items())  # type: ignore[union-attr]
        kind = (type(module), shapes, identities)
        if kind not in known:
            known[kind] = _packs_of(module, own, owner, identities)
        stacks |= {f"{owner}.{key}": (own[key][0], packs) for key, packs in known[kind].items()}
    return replace(plan, stacks=stacks)


def _packs_of(
    module: nn.Module, own: Mapping[str, tuple[int, int]], owner: str, identities: Sequence[str]
) -> Mapping[str, int]:
    said = {key: packs for key, (_, packs) in own.items()}
    small = _small(module)
    if small is None:
        return said
    for given in _inputs(small, next(iter(own))):
        try:
            whole = small(*given)
        except Exception:  # Called in another way than its own model calls it.
            continue
        handles = [small._modules[key].register_forward_pre_hook(_halve) for key in identities]
        found = [(packs, _adds_up(small, own, packs, given, whole)) for packs in (said, *_ways(own))]
        for handle in handles:
            handle.remove()
        if all(is_right is None for _, is_right in found):
            return said
        for packs, is_right in found:
            if is_right:
                return packs
        raise ValueError(
            f"the tp_plan splits {owner} ({', '.join(own)}) in a way in which the parts of two ranks do not add up to "
            "what it gives whole; use tensor: 1"
        )
    return said


def _halve(module: nn.Module, given: tuple[Any, ...]) -> Any:
    """Experts that give what they are given are on both ranks."""
    return given[0] / 2, *given[1:]


def _ways(own: Mapping[str, tuple[int, int]]) -> Iterator[dict[str, int]]:
    for packs in itertools.product(_PACKS, repeat=len(own)):
        yield dict(zip(own, packs, strict=True))


def _small(module: nn.Module) -> Any:
    """A copy with matrices of a few rows and columns, in the same proportions."""
    shapes = {key: p.shape for key, p in module._parameters.items() if p is not None}
    sizes = {size for shape in shapes.values() for size in shape[1:]}
    unit = math.gcd(*sizes)
    # Half of a row still has the 16 bytes that grouped products need.
    small = {size: 8 * size // unit for size in sizes}
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {}
    for key, shape in shapes.items():
        values = torch.randn([shape[0], *(small[size] for size in shape[1:])], generator=generator)
        memo[id(module._parameters[key])] = nn.Parameter(values)
    try:
        made = copy.deepcopy(module, memo)
    except Exception:  # Whatever a user's object raises.
        return None
    for key, value in vars(made).items():
        if type(value) is int and value in small and "expert" not in key:
            setattr(made, key, small[value])
    return made.float().eval()


def _inputs(module: nn.Module, first: str) -> Iterator[Sequence[torch.Tensor]]:
    """What experts may be given: hidden states, choices and weights; or, where all are chosen, states and weights. The
    stack `first` is multiplied with hidden states, from whichever side."""
    generator = torch.Generator().manual_seed(1)
    shape = module.get_parameter(first).shape
    for width in dict.fromkeys((shape[2], shape[1])):
        yield from _inputs_of(shape[0], width, generator)


def _inputs_of(experts: int, width: int, generator: torch.Generator) -> Iterator[Sequence[torch.Tensor]]:
    hidden = torch.randn((_ROWS, width), generator=generator)
    choices = torch.stack([torch.randperm(experts, generator=generator)[: min(2, experts)] for _ in range(_ROWS)])
    weights = torch.rand((_ROWS, experts), generator=generator)
    yield hidden, choices, weights[:, : choices.shape[1]].contiguous()
    yield hidden[None], weights[None]


@torch.no_grad()
def _adds_up(
    module: nn.Module, own: Mapping[str, tuple[int, int]], packs: Mapping[str, int], given: Sequence[torch.Tensor],
    whole: torch.Tensor,
) -> bool | None:  # fmt: skip
    """None where it cannot be computed."""
    before = dict(module._parameters)
    total = torch.zeros_like(whole)
    try:
        for coordinate in range(2):
            for key, (dim, _) in own.items():
                parameter = before[key]
                assert parameter is not None
                share = Cut(dim, packs[key], coordinate, 2).of(parameter.detach())
                module._parameters[key] = nn.Parameter(share.contiguous())
            total += module(*given)
    except Exception:  # Whatever comes of sizes that do not fit.
        return None
    finally:
        module._parameters.update(before)
    return torch.allclose(total, whole, rtol=_CLOSE, atol=_CLOSE * float(whole.abs().max()))
