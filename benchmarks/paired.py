"""Several ways to train the same model, measured in turn on one machine.

Every side has its own processes, which all exist from the start. A turn is some steps of one side while the processes
of the others wait on a pipe; its first step is not counted. So what else goes on in the machine meets all sides alike.
Ranks are forked from a clean server process that has imported torch but run none of it, and have one thread each.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

HOST = "127.0.0.1"
_PRELOAD = ("numpy", "torch", "torch.distributed", "transformers", "transformers.models.llama.modeling_llama",
            "orchestrator.training.worker", "torch.distributed.pipelining", "torch.distributed.tensor.parallel",
            "torch.distributed.fsdp")  # fmt: skip
_PR_SET_PDEATHSIG = 1


class Done(NamedTuple):
    """What one rank says of a step: its share of the mean loss (nats per token), and seconds by phase, if it knows."""

    loss: float
    phases: dict[str, float]


class Start(NamedTuple):
    """Where the ranks of a side find each other. `serve` is called on rank 0 and gives the port and what to keep."""

    rank: int
    world_size: int
    port: int
    store: Any


Make = Callable[..., Callable[[int], Done]]
"""(start, *arguments) -> what runs a step by its number."""


@dataclass
class Turn:
    """Some steps of a side: mean seconds of one, from the last rank's end to the last rank's end; processor seconds of
    one, of all ranks together; the loss of the last; mean seconds of a step by rank and phase."""

    seconds: float
    cpu_seconds: float
    loss: float
    phases: list[dict[str, float]] = field(default_factory=list)


class Side:
    """The ranks of one way to train."""

    def __init__(
        self, name: str, world_size: int, serve: Callable[[], tuple[int, Any]], make: Make, *arguments: Any
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOAD))
        self.name = name
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main, args=(theirs, rank, world_size, serve, make, arguments), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        (port,) = self._receive([self._pipes[0]], 120.0)
        self._send(port)
        self._receive(self._pipes, 180.0)

    def turn(self, first: int, steps: int) -> Turn:
        """Runs the steps `first` .. `first + steps`, of which the first is not counted."""
        self._send((first, steps + 1))
        answers = self._receive(self._pipes, 120.0 + 60.0 * steps)
        ends = [max(each) for each in zip(*(answer[0] for answer in answers), strict=True)]
        cpu = sum(used for _, _, used in answers) / steps
        phases = [
            {phase: sum(done.phases[phase] for done in dones[1:]) / steps for phase in dones[0].phases}
            for _, dones, _ in answers
        ]
        return Turn((ends[-1] - ends[0]) / steps, cpu, sum(dones[-1].loss for _, dones, _ in answers), phases)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()

    def _send(self, what: Any) -> None:
        for pipe in self._pipes:
            pipe.send(what)

    def _receive(self, pipes: list[Connection], timeout_s: float) -> list[Any]:
        """One answer of each. Raises SystemExit with what went wrong."""
        answers: dict[Connection, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < len(pipes):
            ready = wait([pipe for pipe in pipes if pipe not in answers], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise SystemExit(f"{self.name}: no answer within {timeout_s:.0f} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = self._pipes.index(pipe)
                try:
                    is_good, answer = pipe.recv()
                except (EOFError, ConnectionResetError):
                    raise SystemExit(f"{self.name}: rank {rank} died") from None
                if not is_good:
                    raise SystemExit(f"{self.name}, rank {rank}:\n{answer}")
                answers[pipe] = answer
        return [answers[pipe] for pipe in pipes]


def _rank_main(
    pipe: Connection, rank: int, world_size: int, serve: Callable[[], tuple[int, Any]], make: Make, arguments: Any
) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    import torch

    torch.set_num_threads(1)
    store = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            if rank == 0:
                port, store = serve()
                pipe.send((True, port))
            step = make(Start(rank, world_size, pipe.recv(), store), *arguments)
            pipe.send((True, None))
            while True:
                first, steps = pipe.recv()
                ends, dones, cpu = [], [], 0.0
                for number in range(first, first + steps):
                    dones.append(step(number))
                    ends.append(time.perf_counter())
                    if number == first:
                        cpu = time.process_time()
                pipe.send((True, (ends, dones, time.process_time() - cpu)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    # What the sides leave behind (threads of process groups whose other ends are gone) is not waited for.
    os._exit(0)
