"""Training states saved without workers."""

from __future__ import annotations

from orchestrator.checkpoint.catalog import Catalog, Description
from orchestrator.checkpoint.manifest import TensorEntry
from orchestrator.checkpoint.names import Save
from orchestrator.checkpoint.parts import ChunkData, write_part
from orchestrator.checkpoint.tensors import DTYPES, bytes_of
from orchestrator.training.saving import frozen_entry
from strategies.layout.statemap import share_out, whole
from strategies.state.snapshot import Snapshot
from strategies.state.training_state import TrainingState


def save_state(state: TrainingState, catalog: Catalog, save: Save) -> None:
    """As two ranks that both have all of it do."""
    shares = share_out([whole(state.space.size, state.space.tensor)] * 2)
    parts = {}
    for rank, share in enumerate(shares):
        snapshot = Snapshot(state.space, state.device)
        snapshot.take(state, share, buffers=rank == 0)
        chunks = [
            ChunkData(each.name, DTYPES[each.values.dtype], each.box.offsets, each.box.sizes, bytes_of(each.values))
            for each in snapshot.contents()
        ]
        _, parts[rank] = write_part(catalog.storage, save, rank, state.updates, chunks, catalog.cipher(save))
    entries = {n: TensorEntry(dtype=DTYPES[d], shape=list(s)) for n, (d, s) in state.tensors().items()}
    catalog.commit(
        save, parts, Description("sha256:0", {}, {}, {}, {}, entries, frozen=frozen_entry(state.blueprint.frozen))
    )
    catalog.prune(save.committed, keep=1, keep_every=None)
