"""The weights in a checkpoint, as a `orchestrator.models.weights.WeightSource`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from orchestrator.checkpoint.catalog import StoredCheckpoint
from orchestrator.checkpoint.manifest import ChunkEntry, FrozenEntry, UnusableCheckpoint
from orchestrator.checkpoint.tensors import TYPES, as_tensor
from orchestrator.data import load_tokenizer
from orchestrator.job import Job
from orchestrator.models.loading import prepare_model
from orchestrator.models.weights import TensorInfo, WeightSource
from strategies.model.frozen import FrozenWeights
from strategies.update.ema import EMA

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


def weights_of(checkpoint: StoredCheckpoint, job: Job, *, ema: bool = False) -> WeightSource:
    """All weights of the model that a run of `job` trained: those in the checkpoint (with `ema` their mean, where there
    is one), and the frozen parameters beside it, from where the job has them."""
    frozen, saved = checkpoint.manifest.frozen, CheckpointWeights(checkpoint, ema=ema)
    return saved if frozen is None else _WithFrozen(saved, frozen, job)


class _WithFrozen:
    def __init__(self, saved: CheckpointWeights, entry: FrozenEntry, job: Job) -> None:
        self._saved = saved
        self._entry = entry
        self._job = job
        self._frozen: FrozenWeights | None = None

    @property
    def name(self) -> str:
        return self._saved.name

    def tensors(self) -> Mapping[str, TensorInfo]:
        frozen = {name: TensorInfo(TYPES[t.dtype], tuple(t.shape)) for name, t in self._entry.tensors.items()}
        return {**self._saved.tensors(), **frozen}

    def read(self, name: str) -> torch.Tensor:
        """Raises as `CheckpointWeights.read`; UnusableCheckpoint when what the job has is not what it was then, and
        ModelError."""
        if name not in self._entry.tensors:
            return self._saved.read(name)
        if self._frozen is None:
            model, values, _ = prepare_model(self._job, load_tokenizer(self._job.data.tokenizer).vocab_size)
            found = FrozenWeights.of(model, values)
            if found.digest != self._entry.xxh3_128:
                raise UnusableCheckpoint(
                    f"{self.name} was trained beside other frozen parameters than those that the job gives now: "
                    "restore the directory or the factory that they come from"
                )
            self._frozen = found
        return self._frozen[name]


class CheckpointWeights:
    """Put together from chunks of whatever layout they were saved in, each verified when it is read."""

    def __init__(self, checkpoint: StoredCheckpoint, *, ema: bool = False) -> None:
        self._checkpoint = checkpoint
        there = checkpoint.manifest.tensors
        self._tensors = {
            name.removeprefix(PREFIX): TensorInfo(TYPES[entry.dtype], tuple(entry.shape))
            for name, entry in there.items()
            if name.startswith(PREFIX)
        }
        self._names = {name: PREFIX + name for name in self._tensors}
        if ema:
            # Buffers have no mean: they never change.
            self._names |= {name: f"{EMA}.{name}" for name in self._tensors if f"{EMA}.{name}" in there}

    @property
    def name(self) -> str:
        return self._checkpoint.location

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str) -> torch.Tensor:
        """Raises CheckpointError, OSError, and KeyError when there is no such tensor."""
        if name not in self._tensors:
            raise KeyError(name)
        return read_tensor(self._checkpoint, self._names[name])
