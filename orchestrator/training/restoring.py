"""Reading a checkpoint into a worker: of every tensor the chunks that this rank is to have, verified."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.checkpoint.catalog import Catalog, StoredCheckpoint
from orchestrator.checkpoint.manifest import CheckpointError, ChunkEntry, UnusableCheckpoint, digest_of
from orchestrator.checkpoint.tensors import DTYPES, as_tensor, box_of, bytes_of
from orchestrator.checkpoint.weights import PREFIX
from strategies.model.frozen import FrozenWeights
from strategies.state.chunk_loader import ChunkLoader
from strategies.state.training_state import TrainingState


class StorageFailed(RuntimeError):
    """The storage of a checkpoint cannot be read now, which says nothing about the checkpoint."""


def open_checkpoint(catalog: Catalog, committed: int, state: TrainingState) -> StoredCheckpoint:
    """The checkpoint after this many steps, if it is one of this model.

    Raises CheckpointError, or UnusableCheckpoint among them, and StorageFailed.
    """
    try:
        found = catalog.open(committed)
    except OSError as error:
        raise StorageFailed(f"{catalog.storage.locate('')} cannot be read: {error}") from error
    there = {name: (entry.dtype, tuple(entry.shape)) for name, entry in found.manifest.tensors.items()}
    here = {name: (DTYPES[dtype], tuple(shape)) for name, (dtype, shape) in state.tensors().items()}
    frozen = {PREFIX + name for name in state.blueprint.frozen}
    problems = [f"missing {name}" for name in here.keys() - there.keys()]
    problems += [f"unknown {name}" for name in there.keys() - here.keys() - frozen]
    problems += [
        f"{name} is {there[name]}, needed {needed}"
        for name, needed in here.items()
        if there.get(name, needed) != needed
    ]
    if problems:
        raise UnusableCheckpoint(f"{found.location} does not fit this model: {'; '.join(sorted(problems)[:20])}")
    if not _has_same_frozen(found, state.blueprint.frozen):
        raise UnusableCheckpoint(
            f"{found.location} was trained beside other frozen parameters than those that the model has now: restore "
            "the directory or the factory that they come from"
        )
    return found


def _has_same_frozen(checkpoint: StoredCheckpoint, frozen: FrozenWeights) -> bool:
    manifest = checkpoint.manifest
    if not frozen or manifest.frozen is not None:
        return manifest.frozen is None or manifest.frozen.xxh3_128 == frozen.digest
    # Earlier versions saved them. Nothing is read: what a chunk is must have the digest that it has here. Those of
    # encrypted chunks are of what cannot be made again; there the job's own digest has to do.
    saved = [chunk for chunk in manifest.chunks if chunk.tensor.removeprefix(PREFIX) in frozen]
    wanted = {name for name in frozen if frozen.describe(name)[1].numel()}
    return {chunk.tensor.removeprefix(PREFIX) for chunk in saved} == wanted and (
        manifest.encryption is not None or all(_is_of(chunk, frozen) for chunk in saved)
    )


def _is_of(chunk: ChunkEntry, frozen: FrozenWeights) -> bool:
    tensor = frozen[chunk.tensor.removeprefix(PREFIX)]
    for dim, (start, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return digest_of(bytes_of(tensor.cpu().contiguous())) == chunk.xxh3_128


def read_checkpoint(checkpoint: StoredCheckpoint, loader: ChunkLoader, on_chunk: Callable[[], None]) -> None:
    """Reads what a rank is to be given; `on_chunk` is called after each chunk.

    Raises CheckpointError, StorageFailed.
    """

    in_place: set[int] = set()

    def room(chunk: ChunkEntry) -> memoryview | None:
        found = loader.room(chunk.tensor, box_of(chunk))
        if found is None or DTYPES[found.dtype] != chunk.dtype:
            return None
        in_place.add(id(chunk))
        return bytes_of(found)

    def take(chunk: ChunkEntry, data: memoryview) -> None:
        if id(chunk) in in_place:
            loader.filled(box_of(chunk))
        else:
            loader.put(chunk.tensor, box_of(chunk), as_tensor(chunk, data))
        on_chunk()

    wanted = [chunk for chunk in checkpoint.manifest.chunks if loader.wants(chunk.tensor, box_of(chunk))]
    try:
        checkpoint.read(wanted, take, room)
    except OSError as error:
        raise StorageFailed(f"{checkpoint.location} cannot be read: {error}") from error
    if loader.missing:
        raise CheckpointError(f"{checkpoint.location}: {loader.missing} elements are in no chunk")
