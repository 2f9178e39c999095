"""Ranks as spawned processes: one that has used a GPU must not be forked, and here they need no more than torch."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection
from typing import Any

from strategies.comm.rendezvous_proof import StoreAddress

HOST = "127.0.0.1"
SECRET = b"the ranks of one test know this."
Endpoint = StoreAddress


def run_ranks(
    world_size: int, program: Callable[..., Any], *args: Any, timeout_s: float = 400.0, lost: Collection[int] = ()
) -> list[Any]:
    """Runs `program(rank, store_address, *args)` in as many processes; their results by rank, None for the `lost` ones.
    Raises AssertionError with what a rank raised, or which of them took too long."""
    spawned = multiprocessing.get_context("spawn")
    deadline = time.monotonic() + timeout_s
    pipes, processes = [], []
    try:
        for rank in range(world_size):
            ours, theirs = spawned.Pipe()
            process = spawned.Process(target=_main, args=(theirs, rank, program, args), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        port = _hear(pipes[0], 0, deadline)
        for pipe in pipes:
            pipe.send(port)
        found = [(True, None) if rank in lost else _hear(pipe, rank, deadline) for rank, pipe in enumerate(pipes)]
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.close()
            process.join(5.0)
            process.kill()
            process.join()
    failed = [f"rank {rank}:\n{what}" for rank, (is_good, what) in enumerate(found) if not is_good]
    assert not failed, "\n".join(failed)
    return [what for _, what in found]


def _hear(pipe: Connection, rank: int, deadline: float) -> Any:
    assert pipe.poll(max(0.0, deadline - time.monotonic())), f"rank {rank} took too long"
    try:
        return pipe.recv()
    except EOFError:
        raise AssertionError(f"rank {rank} died") from None


def _main(pipe: Connection, rank: int, program: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    from strategies.comm.groups import serve_store

    torch.set_num_threads(1)
    store = None
    if rank == 0:
        store, served = serve_store(HOST, SECRET)
        pipe.send(served.port)
    address = StoreAddress(HOST, pipe.recv(), SECRET)
    try:
        pipe.send((True, program(rank, address, *args)))
    except Exception:
        pipe.send((False, traceback.format_exc()))
    try:
        pipe.recv()  # The store lives until all are done.
    except EOFError:
        del store
