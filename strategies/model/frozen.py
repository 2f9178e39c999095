"""Frozen parameters: a kind of state that has one source, which every process can read again, and that no step changes.

So they are never sent between ranks and never saved: who needs them reads them, as much of them as it needs, and a
digest tells whether they are those that a checkpoint was trained beside.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
import xxhash
from torch import nn

from strategies.layout.space import Cut
from strategies.model.values import Values


class FrozenWeights(Mapping[str, torch.Tensor]):
    """By name, full, in the type that they have at their source, `values`, from which each is read when it is asked
    for. `parameters` are those of the model, which computes with them in type `dtype`: where they are trained with in
    another type than their own, floating ones are, too. None of them may be on the meta device."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], values: Values, dtype: torch.dtype = torch.float32
    ) -> None:
        self._parameters = dict(sorted(parameters.items()))
        self._values = values
        self._types = {name: parameter.dtype for name, parameter in self._parameters.items()}
        self._dtype = dtype
        self._digest: str | None = None
        self._here: set[str] = set()
        self.drop(self._parameters)

    @classmethod
    def of(cls, model: nn.Module, values: Values, dtype: torch.dtype = torch.float32) -> FrozenWeights:
        """Those of a model, whose frozen parameters may be on the meta device; then they are not afterwards."""
        _take_from_meta(model)
        found = cls({name: p for name, p in model.named_parameters() if not p.requires_grad}, values, dtype)
        if not values.is_stored:
            # Now, and not in the thread that saves: there they would come out otherwise while this one trains.
            _ = found.digest
        return found

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._values.read(name).to(self._types[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def computed_in(self, dtype: torch.dtype) -> torch.dtype:
        """The type that a parameter of this type is computed with."""
        return self._dtype if dtype == torch.float32 else dtype

    def describe(self, name: str) -> tuple[torch.dtype, torch.Size]:
        """Its type and shape, without reading it."""
        return self._types[name], self._parameters[name].shape

    @property
    def digest(self) -> str:
        """XXH3-128, in hexadecimal, of all names, types, shapes and little-endian values."""
        if self._digest is None:
            digest = xxhash.xxh3_128()
            for name, tensor in self.items():
                digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self._digest = digest.hexdigest()
        return self._digest

    @property
    def divisible(self) -> list[str]:
        """The names of those that have rows, in the type of trained parameters: these can be sharded with them."""
        return [name for name, p in self._parameters.items() if p.dim() and self._types[name] == torch.float32]

    def share(self, name: str, cut: Cut) -> torch.Tensor:
        """A coordinate's share of a parameter."""
        if cut.dim == 0 and cut.packs == 1:
            return self.rows(name, cut.coordinate, cut.ranks)
        return cut.of(self._values.read(name))

    def rows(self, name: str, index: int, count: int, cut: Cut | None = None) -> torch.Tensor:
        """Part `index` of `count` of a parameter's rows, or of those of a share of it, as torch.chunk divides them; the
        last may have none."""
        shape = self._parameters[name].shape
        share = None
        if cut is not None:
            share = self.share(name, cut)
            shape = share.shape
        size = -(-shape[0] // count)
        first, last = min(index * size, shape[0]), min((index + 1) * size, shape[0])
        if share is not None:
            return share[first:last]
        width = shape[1:].numel()
        return self._values.read_range(name, first * width, last * width).view(last - first, *shape[1:])

    def keep_on(self, device: torch.device, names: Collection[str]) -> None:
        """Reads these, to compute with them there, unless they are there."""
        for name in set(names) - self._here:
            value = self._values.read(name)
            self._parameters[name].data = value.to(device, self.computed_in(value.dtype), copy=True)
            self._here.add(name)

    def drop(self, names: Collection[str]) -> None:
        """These are not computed with any more: they have zeros, which take no memory."""
        for name in names:
            parameter = self._parameters[name]
            parameter.data = without_memory(parameter.shape, self.computed_in(self._types[name]))
        self._here -= set(names)


def without_memory(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros that all share one element."""
    return torch.zeros((), dtype=dtype).expand(shape)


def _take_from_meta(model: nn.Module) -> None:
    """Has frozen parameters without memory be of a kind that can be given some."""
    made: dict[int, nn.Parameter] = {}
    for part in model.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta and not parameter.requires_grad:
                if id(parameter) not in made:
                    zeros = without_memory(parameter.shape, parameter.dtype)
                    made[id(parameter)] = nn.Parameter(zeros, requires_grad=False)
                part._parameters[key] = made[id(parameter)]
