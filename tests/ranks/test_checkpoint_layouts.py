"""Saved in one layout and restored in any other, by other ranks, training goes on to the same bits."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint.catalog import Catalog, Description, StoredCheckpoint
from orchestrator.checkpoint.manifest import ChunkEntry, TensorEntry, digest_of
from orchestrator.checkpoint.names import Save
from orchestrator.checkpoint.parts import ChunkData, write_part
from orchestrator.checkpoint.tensors import DTYPES, bytes_of
from orchestrator.storage import LocalStorage
from orchestrator.training.restoring import open_checkpoint, read_checkpoint
from strategies.comm.fabric import Fabric
from strategies.layout.parallel import ParallelLayout
from strategies.layout.placement import Domain, trained_spans
from strategies.layout.statemap import NOTHING, share_out, whole
from strategies.state.chunk_loader import ChunkLoader
from strategies.state.snapshot import Snapshot
from strategies.state.training_state import state_digest
from strategies.update.engine import StepEngine
from tests.ranks.laid_out import Stretch, barrier, layout_of, make_engine, train
from tests.ranks.local_ranks import HOST, PATIENCE_S, Endpoint, run_ranks
from tests.selection import nightly

SAVE = Save(2, 1, 0)

LAYOUTS = {
    "d1": layout_of(),
    "d4": layout_of(4),
    "d3 optimizer": layout_of(3, shard="optimizer"),
    "d2 gradients": layout_of(2, shard="gradients"),
    "d3 parameters": layout_of(3, shard="parameters"),
    "p2": layout_of(1, 2),
    "p2 zero-bubble": layout_of(1, 2, schedule="zero-bubble"),
    "p4": layout_of(1, 4),
    "d2 p2 parameters": layout_of(2, 2, shard="parameters"),
    "d2 p2 optimizer interleaved": layout_of(2, 2, shard="optimizer", schedule="interleaved-1f1b"),
    "t2": layout_of(tensor=2),
    "t2 optimizer": layout_of(tensor=2, shard="optimizer"),
    "d2 t2 parameters": layout_of(2, 1, 2, "parameters"),
    "t2 p2": layout_of(1, 2, 2),
    "d2 t2 optimizer": layout_of(2, 1, 2, "optimizer"),
}


def save_state(engine: StepEngine, fabric: Fabric, layout: ParallelLayout, catalog: Catalog) -> None:
    """What the workers of one layout do, without a controller."""
    shares = share_out(trained_spans(layout, engine.state.arrangement.shards))
    snapshot = Snapshot(engine.state.space, engine.state.device)
    snapshot.take(engine.state, shares[fabric.rank], buffers=fabric.rank == 0)
    chunks = [
        ChunkData(each.name, DTYPES[each.values.dtype], each.box.offsets, each.box.sizes, bytes_of(each.values))
        for each in snapshot.contents()
    ]
    write_part(catalog.storage, SAVE, fabric.rank, engine.state.updates, chunks, None)
    barrier(fabric)
    if fabric.rank == 0:
        parts = {
            rank: digest_of(catalog.storage.read(f"{SAVE.directory}/{SAVE.part(rank)}.json"))
            for rank in range(layout.world_size)
        }
        tensors = {
            name: TensorEntry(dtype=DTYPES[dtype], shape=list(shape))
            for name, (dtype, shape) in engine.state.tensors().items()
        }
        catalog.commit(SAVE, parts, Description("sha256:0", layout.describe(), {}, {}, {}, tensors))
    barrier(fabric)


def go(
    rank: int, address: Endpoint, layout: ParallelLayout, directory: str, steps: int, restored: bool, model: str,
    nodes_of: int = 1, device: str = "cpu", transport: str = "auto",
) -> list[str]:  # fmt: skip
    """Some steps in a layout, from the beginning or from what is saved; saves or not. Rank 0 tells the digests of the
    state it begins and ends with."""
    where = torch.device(device)
    engine = make_engine(0.1 if layout.tensor == 1 else 0.0, layout.tensor, model=model, device=where)
    catalog = Catalog(LocalStorage(Path(directory)), "test")
    fabric = Fabric(rank=rank, layout=layout, device=where, transport=transport)
    fabric.form(store_address=address, prefix=f"go/{restored}", host=HOST, timeout_s=PATIENCE_S)
    nodes = [Domain("", str(member // nodes_of)) for member in range(layout.world_size)]
    state = engine.state
    digests = []

    def digest() -> None:
        state.collect(trained_spans(layout, state.arrangement.shards), fabric)
        if rank == 0:
            digests.append(state_digest(state))
        state.collected = []

    try:
        first = 0
        if restored:
            checkpoint: StoredCheckpoint = open_checkpoint(catalog, SAVE.committed, state)
            chunks: list[ChunkEntry] = []

            def read(loader: ChunkLoader) -> None:
                read_checkpoint(checkpoint, loader, lambda: chunks.append(checkpoint.manifest.chunks[0]))

            state.invalidate()
            first = SAVE.committed
            updates = checkpoint.manifest.updates
            held = [NOTHING] * layout.world_size
            state.adopt_layout(
                layout, fabric, held, nodes, 2, updates, lambda: barrier(fabric), read, read_by_node=nodes_of > 1
            )
            digest()
        else:
            everything = whole(state.space.size, state.space.tensor)
            held_by_all = [everything] * layout.world_size
            state.adopt_layout(layout, fabric, held_by_all, nodes, 2, 0, lambda: barrier(fabric))
        engine.bind(fabric, layout, 0)
        for number in range(first, first + steps):
            engine.run(number)
        if not restored:
            save_state(engine, fabric, layout, catalog)
        digest()
    finally:
        fabric.drop()
    return digests


def model_for(*names: str) -> str:
    """A small one where tensor-parallel groups are among these layouts: each of its collectives takes long."""
    return "own" if any(LAYOUTS[name].tensor > 1 for name in names) else "llama"


@functools.cache
def saved_by(name: str, model: str) -> tuple[str, str]:
    """Where two steps of a layout were saved, and their digest."""
    layout = LAYOUTS[name]
    directory = tempfile.mkdtemp(prefix="saved-")
    digests = run_ranks(layout.world_size, go, layout, directory, 2, False, model)[0]
    return directory, digests[-1]


@functools.cache
def expected(tensor: int, steps: int, model: str) -> str:
    """The digest after `steps` steps without a break."""
    stretch = Stretch(layout_of(tensor=tensor), steps)
    dropout = 0.1 if tensor == 1 else 0.0
    digest: str = run_ranks(tensor, train, [stretch], dropout, 2, "fp32", None, model)[0].digest
    return digest


PAIRS = [
    ("d1", "d4"), ("d4", "p4"), ("d3 optimizer", "d2 gradients"), ("p2", "d3 optimizer"),
    ("d2 p2 optimizer interleaved", "d3 parameters"), ("t2", "t2 optimizer"),
]  # fmt: skip
MORE_PAIRS = [
    ("d4", "d1"), ("d2 gradients", "d3 parameters"), ("d3 parameters", "p2"), ("p2 zero-bubble", "d2 p2 parameters"),
    ("p4", "d1"), ("d2 p2 parameters", "p2 zero-bubble"), ("d3 parameters", "d2 p2 optimizer interleaved"),
    ("d2 t2 optimizer", "t2"), ("t2", "d2 t2 parameters"), ("d2 t2 parameters", "t2 p2"), ("t2 p2", "d2 t2 optimizer"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), [*PAIRS, *nightly(MORE_PAIRS)])
def test_what_one_layout_saved_another_goes_on_with(old: str, new: str) -> None:
    """Also when two ranks share a node, which then reads its share once: every other pair."""
    ranks_per_node = 1 + (PAIRS + MORE_PAIRS).index((old, new)) % 2
    model, layout = model_for(old, new), LAYOUTS[new]
    directory, digest = saved_by(old, model)
    begun, ended = run_ranks(layout.world_size, go, layout, directory, 2, True, model, ranks_per_node)[0]
    assert begun == digest == expected(layout.tensor, 2, model)
    assert ended == expected(layout.tensor, 4, model)


@pytest.mark.parametrize("name", [*dict(PAIRS), *nightly(sorted({*LAYOUTS} - {*dict(PAIRS)}))])
def test_every_rank_writes_its_share_and_no_more(name: str) -> None:
    """Each element once, and as evenly as those who hold it allow; replicas share what all of them have."""
    directory, _ = saved_by(name, "llama")
    manifest = Catalog(LocalStorage(Path(directory)), "test").open(SAVE.committed).manifest
    assert len(manifest.files) == LAYOUTS[name].world_size
    sizes = [file.size - file.header_bytes for file in manifest.files]
    if LAYOUTS[name].pipeline == 1:
        assert max(sizes) < 1.2 * min(sizes) + 4096, sizes


@pytest.mark.parametrize(("old", "new"), [("d2 t2 optimizer", "d1"), *nightly([("d3 parameters", "t2 p2")])])
def test_a_state_saved_at_one_tensor_degree_is_that_of_any_other(old: str, new: str) -> None:
    """Names, shapes and values are of full tensors: so it can be exported, and a new job can begin with it."""
    model, layout = model_for(old, new), LAYOUTS[new]
    directory, digest = saved_by(old, model)
    assert run_ranks(layout.world_size, go, layout, directory, 1, True, model)[0][0] == digest
