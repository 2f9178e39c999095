"""Several ranks on one GPU, connected by way of the host: every layout, the loss of a rank, and what comes of it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from strategies.comm.fabric import Fabric
from strategies.comm.group_errors import PeerLost
from strategies.layout.parallel import ParallelLayout
from tests.gpu.figures import Figures
from tests.ranks.laid_out import Stretch, as_numbers, layout_of, train
from tests.ranks.local_ranks import HOST, Endpoint
from tests.ranks.local_ranks import run_ranks as run_in_processes

# A process that has used a GPU must not be forked.
run_ranks = partial(run_in_processes, processes_of=multiprocessing.get_context("spawn"), timeout_s=400.0)


def trained(rank: int, address: Endpoint, kind: str, stretches: list[Stretch], settings: dict[str, Any]) -> Any:
    """`train` on the GPU that all ranks share; "cpu" to see that this runs."""
    return as_numbers(train(rank, address, stretches, device=torch.device(kind), transport="gloo", **settings))


SETTINGS: dict[str, Any] = {"dropout": 0.1, "model": "own"}


def assert_same(device: torch.device, stretches: list[Stretch], expected: Any) -> None:
    ranks = max(stretch.layout.world_size for stretch in stretches)
    for rank, (losses, norms, digest) in enumerate(run_ranks(ranks, trained, device.type, stretches, SETTINGS)):
        if all(rank < stretch.layout.world_size for stretch in stretches):
            assert (losses, norms) == expected[:2]
        assert digest == (expected[2] if rank == 0 else "")


LAYOUTS = {
    "three replicas": layout_of(3),
    "sharded optimizer": layout_of(2, shard="optimizer"),
    "sharded gradients": layout_of(2, shard="gradients"),
    "sharded parameters": layout_of(2, shard="parameters"),
    "two stages": layout_of(1, 2),
    "two replicas of two stages": layout_of(2, 2, schedule="zero-bubble"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_bits_of_one_rank(device: torch.device, figures: Figures, name: str) -> None:
    (alone,) = run_ranks(1, trained, device.type, [Stretch(layout_of())], SETTINGS)
    assert_same(device, [Stretch(LAYOUTS[name])], alone)
    figures.note(f"digest of {name}", alone[2])


def test_changing_from_layout_to_layout_gives_the_bits_of_one_rank(device: torch.device, figures: Figures) -> None:
    """State moves between ranks: from replicas to shards to stages, and to one rank again."""
    (alone,) = run_ranks(1, trained, device.type, [Stretch(layout_of(), 8)], SETTINGS)
    ways: list[ParallelLayout] = [layout_of(2), layout_of(2, shard="parameters"), layout_of(1, 2), layout_of()]
    began = time.perf_counter()
    assert_same(device, [Stretch(layout) for layout in ways], alone)
    figures.note("four layouts one after the other, seconds", round(time.perf_counter() - began, 2))


def test_what_ranks_saved_others_go_on_with(device: torch.device, figures: Figures, tmp_path: Path) -> None:
    """In another layout, from a checkpoint that was copied while they trained on."""
    pytest.importorskip("pydantic")
    from tests.ranks.test_checkpoint_layouts import go

    (alone,) = run_ranks(1, trained, device.type, [Stretch(layout_of(), 4)], SETTINGS)
    began = time.perf_counter()
    where = str(tmp_path)
    saved = run_ranks(2, go, layout_of(2, shard="optimizer"), where, 2, False, "own", 1, device.type, "gloo")[0]
    begun, ended = run_ranks(2, go, layout_of(1, 2), where, 2, True, "own", 1, device.type, "gloo")[0]
    assert (begun, ended) == (saved[-1], alone[2])
    figures.note("saved by two, restored by two others, seconds", round(time.perf_counter() - began, 2))


def over_nccl(rank: int, address: Endpoint, kind: str, stretches: list[Stretch], settings: dict[str, Any]) -> Any:
    """Like `trained`, with the GPU's own transport, which takes several ranks on one GPU if it is told to."""
    from strategies.comm import nccl

    os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    nccl.settle_environment()
    return as_numbers(train(rank, address, stretches, device=torch.device(kind), transport="nccl", **settings))


@pytest.mark.parametrize("name", ["three replicas", "sharded parameters", "two stages"])
def test_nccl_on_one_gpu_gives_the_same_bits(device: torch.device, figures: Figures, name: str) -> None:
    """Of what NCCL carries no sum is left to it, so it is as good as copies by way of the host."""
    if device.type != "cuda" or torch.cuda.nccl.version() < (2, 30):  # type: ignore[no-untyped-call]
        pytest.skip("several ranks on one GPU need NCCL 2.30")
    (alone,) = run_ranks(1, trained, device.type, [Stretch(layout_of())], SETTINGS)
    layout = LAYOUTS[name]
    began = time.perf_counter()
    for rank, (losses, norms, digest) in enumerate(
        run_ranks(layout.world_size, over_nccl, device.type, [Stretch(layout)], SETTINGS)
    ):
        assert (losses, norms, digest) == (*alone[:2], alone[2] if rank == 0 else "")
    figures.note(f"{name} over NCCL, seconds", round(time.perf_counter() - began, 2))


def lose_one(rank: int, address: Endpoint, kind: str) -> float:
    """Rank 1 dies while the others wait for it; after how many seconds they know."""
    fabric = Fabric(rank=rank, layout=layout_of(3), device=torch.device(kind), transport="gloo")
    fabric.form(store_address=address, prefix="lose", host=HOST, timeout_s=60.0)
    tensor = torch.ones(3000, device=kind)
    for _ in range(3):
        fabric.world.all_to_all(torch.empty_like(tensor), tensor, [1000] * 3, [1000] * 3)
    if rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        fabric.world.all_to_all(torch.empty_like(tensor), tensor, [1000] * 3, [1000] * 3)
    except PeerLost:
        return time.monotonic() - began - 0.5
    finally:
        fabric.drop()
    raise AssertionError("nobody noticed")


def test_the_loss_of_a_rank_is_noticed(device: torch.device, figures: Figures) -> None:
    found = run_ranks(3, lose_one, device.type, lost=(1,))
    figures.note("from the death of a rank to the others' errors, seconds", [round(found[rank], 3) for rank in (0, 2)])
