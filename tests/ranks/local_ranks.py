"""Ranks without a cluster: forked processes on this machine, for tests.

All are forked from one clean server process that has imported torch and transformers but run none of it, whatever the
test process itself has done before (a process that has used torch's thread pools must not be forked).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from strategies.comm.rendezvous_proof import StoreAddress

HOST = "127.0.0.1"
SECRET = b"the ranks of one test know this."
"""What their rendezvous stores ask for."""

PATIENCE_S = 240.0
"""How long ranks of a test wait for each other, and a test for its ranks: some may be busy with something else, on a
machine that is busy, too."""

OTHERS_S = 5.0
"""How long ranks may take to say what has become of them when one has failed."""

_PRELOAD = (
    "numpy",
    "torch",
    "torch.distributed",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "pytest",
    "orchestrator.training.worker",
    *(f"{__package__}.{path.stem}" for path in sorted(Path(__file__).parent.glob("*.py"))),
    "tests.frozen",
)
"""What ranks would otherwise each import by themselves, for as long as a short test takes."""
_PR_SET_PDEATHSIG = 1


@functools.cache
def context() -> ForkServerContext:
    """The fork server's context; the server starts with the first process and ends with this one."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(list(_PRELOAD))
    return forks


def prepare_child() -> None:
    """To be called first in every child: one thread, and death with the fork server, also when stopped."""
    import torch

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)


Endpoint = StoreAddress


def run_ranks(
    world_size: int,
    program: Callable[..., Any],
    *args: Any,
    timeout_s: float = PATIENCE_S,
    lost: Collection[int] = (),
    processes_of: Any = None,
) -> list[Any]:
    """Runs `program(rank, store_address, *args)` in `world_size` processes, forked from the server, or of another
    context of multiprocessing's (`processes_of`); returns their results in rank order.

    Rank 0 serves the store. Ranks in `lost` are to die or to stop on the way; their result is None. Raises
    AssertionError with the ranks' tracebacks, or which rank died or took too long.
    """
    processes_of = context() if processes_of is None else processes_of
    processes, pipes = [], []
    deadline = time.monotonic() + timeout_s
    try:
        for rank in range(world_size):
            ours, theirs = processes_of.Pipe()
            process = processes_of.Process(target=_rank_main, args=(theirs, rank, program, args), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        port = _receive(pipes[0])
        for pipe in pipes:
            pipe.send(port)
        answers = _answers({pipe: rank for rank, pipe in enumerate(pipes) if rank not in lost}, deadline)
    finally:
        for rank, (process, pipe) in enumerate(zip(processes, pipes, strict=True)):
            pipe.close()
            process.join(0.0 if rank in lost else 2.0)
            if process.is_alive():
                process.kill()
                process.join()
    failures = [f"rank {rank}:\n{text}" for rank, (is_good, text) in answers.items() if not is_good]
    silent = sorted({*range(world_size)} - {*lost} - answers.keys())
    assert not failures, "\n".join([*failures, f"(ranks {silent} had said nothing by then)" if silent else ""])
    assert not silent, f"ranks {silent} took too long"
    return [answers[rank][1] if rank in answers else None for rank in range(world_size)]


def _answers(waiting: dict[Connection, int], deadline: float) -> dict[int, tuple[bool, Any]]:
    """What ranks answer, in the order in which they do. When one has failed, others may wait for it for ever: what they
    say within a few seconds is heard, too."""
    found: dict[int, tuple[bool, Any]] = {}
    while waiting and (heard := wait([*waiting], timeout=max(0.0, deadline - time.monotonic()))):
        for pipe in heard:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            found[rank] = _receive(pipe)
            if not found[rank][0]:
                deadline = min(deadline, time.monotonic() + OTHERS_S)
    return found


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return False, "it died"


def _rank_main(pipe: Connection, rank: int, program: Callable[..., Any], args: tuple[Any, ...]) -> None:
    prepare_child()
    store = None
    if rank == 0:
        from strategies.comm.groups import serve_store

        store, served = serve_store(HOST, SECRET)
        pipe.send(served.port)
    address = StoreAddress(HOST, pipe.recv(), SECRET)
    try:
        pipe.send((True, program(rank, address, *args)))
    except Exception:
        pipe.send((False, traceback.format_exc()))
    with contextlib.suppress(EOFError):
        pipe.recv()  # the store lives until all are done
    del store
