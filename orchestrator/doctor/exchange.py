"""Two processes that send each other tensors, timed: what a pair of workers gets from the network.

Sent to the nodes of a cluster as it is, by value, like `doctor.facts`. Run as a program it is the second process of a
measurement on one machine: `python -m orchestrator.doctor.exchange PORT NUM_BYTES REPETITIONS`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

from strategies.comm.interfaces import interface_of

TIMEOUT_S = 30.0
"""Of forming the group, and of each transfer."""


def open_store(host: str) -> Any:
    """Where the two find each other, on a port that the system chooses (`store.port`)."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(host, 0, 2, True, timedelta(seconds=TIMEOUT_S), wait_for_workers=False)


def exchange(
    rank: int, store: Any, host: str, num_bytes: int, repetitions: int, *, cuda: bool = False
) -> list[float]:  # fmt: skip
    """Sends `num_bytes` to the other rank and back, `repetitions` times after one to warm up; returns bytes per second
    of each. `host` is the address by which the other one reaches this process. Raises RuntimeError.

    The group is made as workers make theirs (strategies/comm/transports.py): NCCL for GPUs, else gloo on this address.
    """
    import torch
    import torch.distributed as dist

    group: Any
    if cuda:
        if (name := interface_of(host)) is not None:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
        # Else torch ends this process some time after one that failed.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
        group = dist.ProcessGroupNCCL(store, rank, 2, dist.ProcessGroupNCCL.Options())
    else:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=TIMEOUT_S)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host, lazy_init=False)]
        group = dist.ProcessGroupGloo(store, rank, 2, options)  # type: ignore[call-overload]
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    tensor = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    speeds = []
    for _ in range(repetitions + 1):
        begin = time.perf_counter()
        for sender in (0, 1):
            work = group.send([tensor], 1, 0) if sender == rank == 0 else (
                group.send([tensor], 0, 0) if sender == rank else group.recv([tensor], 1 - rank, 0))  # fmt: skip
            work.wait()
            if cuda:
                torch.cuda.synchronize(device)
        speeds.append(2 * num_bytes / (time.perf_counter() - begin))
    return speeds[1:]


def loopback(num_bytes: int, repetitions: int) -> list[float]:
    """Between two processes of this machine, with gloo. Raises RuntimeError, and OSError when the second one cannot be
    started."""
    store = open_store("127.0.0.1")
    command = [sys.executable, "-m", "orchestrator.doctor.exchange", str(store.port), str(num_bytes), str(repetitions)]
    other = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return exchange(0, store, "127.0.0.1", num_bytes, repetitions)
    finally:
        try:
            other.wait(timeout=5)
        except subprocess.TimeoutExpired:
            other.kill()
            other.wait()


def _main(port: int, num_bytes: int, repetitions: int) -> None:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", port, 2, False, timedelta(seconds=TIMEOUT_S))
    exchange(1, store, "127.0.0.1", num_bytes, repetitions)


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
