"""Frozen parameters: a kind of state that has one source, which every process can read again, and that no step changes.

So they are never sent between ranks and never saved: who needs them has them, or makes them again, and a digest tells
whether they are those that a checkpoint was trained beside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import xxhash
from torch import nn


class FrozenWeights(Mapping[str, torch.Tensor]):
    """By name, full. `parameters` are those of the model, which computes with them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(sorted(parameters.items()))
        self._digest: str | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._parameters[name].data

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    @property
    def digest(self) -> str:
        """XXH3-128, in hexadecimal, of all names, types, shapes and little-endian values."""
        if self._digest is None:
            digest = xxhash.xxh3_128()
            for name, tensor in self.items():
                digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
                digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self._digest = digest.hexdigest()
        return self._digest

    @property
    def divisible(self) -> list[str]:
        """The names of those that have rows, in the type of trained parameters: these can be sharded with them."""
        return [name for name, tensor in self.items() if tensor.dim() and tensor.dtype == torch.float32]

    def rows(self, name: str, index: int, count: int) -> torch.Tensor:
        """Part `index` of `count` of a parameter's rows, as torch.chunk divides them; the last may have none."""
        parts = self[name].chunk(count)
        return parts[index] if index < len(parts) else self[name][:0]

    def keep_on(self, device: torch.device, names: Iterable[str]) -> None:
        """Moves the model's own values there: to where it computes, or off it where only shards are needed."""
        for name in names:
            parameter = self._parameters[name]
            if parameter.device.type != device.type:
                parameter.data = parameter.data.to(device)
