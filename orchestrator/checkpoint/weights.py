"""The weights in a checkpoint, as a `orchestrator.models.weights.WeightSource`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from orchestrator.checkpoint.catalog import StoredCheckpoint
from orchestrator.checkpoint.manifest import ChunkEntry
from orchestrator.checkpoint.tensors import TYPES, as_tensor
from orchestrator.models.weights import TensorInfo

PREFIX = "model."
"""Of parameters and buffers; the rest of a checkpoint is the optimizer's, and the update rule's."""


def read_tensor(checkpoint: StoredCheckpoint, name: str) -> torch.Tensor:
    """A whole tensor of a checkpoint, put together from its chunks and verified.

    Raises CheckpointError, OSError, KeyError when there is no such tensor.
    """
    entry = checkpoint.manifest.tensors[name]
    whole = torch.empty(entry.shape, dtype=TYPES[entry.dtype])

    def take(chunk: ChunkEntry, data: memoryview) -> None:
        part = whole
        for dim, (start, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            part = part.narrow(dim, start, size)
        part.copy_(as_tensor(chunk, data))

    checkpoint.read(checkpoint.chunks_of(name), take)
    return whole


class CheckpointWeights:
    """Put together from chunks of whatever layout they were saved in, each verified when it is read."""

    def __init__(self, checkpoint: StoredCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._tensors = {
            name.removeprefix(PREFIX): TensorInfo(TYPES[entry.dtype], tuple(entry.shape))
            for name, entry in checkpoint.manifest.tensors.items()
            if name.startswith(PREFIX)
        }

    @property
    def name(self) -> str:
        return self._checkpoint.location

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str) -> torch.Tensor:
        """Raises CheckpointError, OSError, and KeyError when there is no such tensor."""
        if name not in self._tensors:
            raise KeyError(name)
        return read_tensor(self._checkpoint, PREFIX + name)
