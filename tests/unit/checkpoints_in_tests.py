"""Checkpoints of small tensors, written by a few ranks, and storages that break."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from orchestrator.checkpoint.catalog import Catalog, Description, StoredCheckpoint
from orchestrator.checkpoint.encryption import Secret
from orchestrator.checkpoint.manifest import TensorEntry
from orchestrator.checkpoint.names import Save
from orchestrator.checkpoint.parts import ChunkData, write_part
from orchestrator.checkpoint.tensors import DTYPES
from orchestrator.checkpoint.weights import read_tensor
from orchestrator.storage import LocalStorage, Storage

RUN = "a-run"
SECRET = Secret(bytes(range(32)))


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.weight": torch.randn(7, 5, generator=generator),
        "model.half": torch.randn(9, generator=generator).to(torch.bfloat16),
        "model.special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "model.empty": torch.zeros(0, 3),
        "model.mask": torch.tensor([True, False, True]),
        "model.count": torch.tensor(12 + seed, dtype=torch.int64),
    }


def chunks_of(values: Mapping[str, torch.Tensor], rank: int, ranks: int) -> list[ChunkData]:
    """What one of `ranks` ranks writes: some rows of every tensor."""
    found = []
    for name, tensor in values.items():
        if not tensor.numel():
            continue
        offsets, part = [0] * tensor.dim(), tensor
        if tensor.dim():
            rows = -(-tensor.shape[0] // ranks)
            part = tensor[rank * rows : (rank + 1) * rows]
            offsets[0] = min(rank * rows, tensor.shape[0])
        elif rank:
            continue
        if part.numel():
            raw = memoryview(part.contiguous().reshape(-1).view(torch.uint8).numpy())
            found.append(ChunkData(name, DTYPES[tensor.dtype], tuple(offsets), tuple(part.shape), raw))
    return found


def describe(values: Mapping[str, torch.Tensor]) -> Description:
    entries = {name: TensorEntry(dtype=DTYPES[t.dtype], shape=list(t.shape)) for name, t in values.items()}
    return Description(
        job="sha256:0", layout={"data": 2}, data={"samples": 3}, randomness={"seed": 0}, schedule={"lr": 0.1},
        tensors=entries,
    )  # fmt: skip


def write(
    catalog: Catalog, committed: int, values: Mapping[str, torch.Tensor], ranks: int = 2, save: Save | None = None
) -> int:
    """A whole checkpoint; its bytes."""
    save = Save(committed, 1, 0) if save is None else save
    parts = {}
    for rank in range(ranks):
        chunks = chunks_of(values, rank, ranks)
        _, parts[rank] = write_part(catalog.storage, save, rank, committed, chunks, catalog.cipher(save))
    return catalog.commit(save, parts, describe(values))


def load(checkpoint: StoredCheckpoint) -> dict[str, torch.Tensor]:
    """All its tensors, verified."""
    return {name: read_tensor(checkpoint, name) for name in checkpoint.manifest.tensors}


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Bit for bit."""

    def raw(t: torch.Tensor) -> bytes:
        return bytes(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    return a.keys() == b.keys() and all(
        a[n].shape == b[n].shape and a[n].dtype == b[n].dtype and raw(a[n]) == raw(b[n]) for n in a
    )


def catalog_in(directory: Path, secret: Secret | None = None, storage: Storage | None = None) -> Catalog:
    return Catalog(LocalStorage(directory) if storage is None else storage, RUN, secret)


class PowerCut(BaseException):
    """The machine stops here."""


class Fragile(LocalStorage):
    """A file system that stops before its `stop_at`-th operation, like the machine around it: of what was not synced,
    files lose their end and directories the names they were given."""

    def __init__(self, root: Path, stop_at: int | None = None) -> None:
        super().__init__(root)
        self.stop_at = stop_at
        self.operations = 0
        self._unsynced: dict[str, int] = {}
        self._names: dict[Path, set[Path]] = {}

    def _count(self) -> None:
        if self.operations == self.stop_at:
            self._lose()
            raise PowerCut
        self.operations += 1

    def _lose(self) -> None:
        for path, synced in self._unsynced.items():
            if os.path.exists(path):
                os.truncate(path, synced)
        for names in self._names.values():
            for path in names:
                if path.is_file():
                    os.unlink(path)
                elif path.is_dir() and not any(path.iterdir()):
                    os.rmdir(path)
        self._unsynced.clear()
        self._names.clear()

    def _create(self, target: Path) -> int:
        self._count()
        file = super()._create(target)
        self._unsynced[str(target)] = 0
        self._names.setdefault(target.parent, set()).add(target)
        return file

    def _write(self, file: int, data: memoryview) -> None:
        self._count()
        super()._write(file, data)

    def _sync(self, file: int) -> None:
        self._count()
        super()._sync(file)
        self._unsynced.pop(os.readlink(f"/proc/self/fd/{file}"), None)

    def _sync_directory(self, path: Path) -> None:
        self._count()
        super()._sync_directory(path)
        self._names.pop(path, None)

    def _unlink(self, target: Path) -> None:
        self._count()
        super()._unlink(target)


class Failing(LocalStorage):
    """A file system whose writes fail with `code` as long as there are `failures` left."""

    def __init__(self, root: Path, code: int = errno.EIO, failures: int = 1) -> None:
        super().__init__(root)
        self.code, self.failures = code, failures

    def _write(self, file: int, data: memoryview) -> None:
        if self.failures:
            self.failures -= 1
            super()._write(file, data[: len(data) // 2])
            raise OSError(self.code, os.strerror(self.code))
        super()._write(file, data)
