"""Saving and restoring beside torch.distributed.checkpoint (DCP) and torch.save, in turn on the same disk.

A model of 100 million parameters with AdamW in fp32 (1.2 GB of state), replicated on four ranks over gloo. All sides
work on the same tensors in the same processes, one after the other in alternating order; a round is a turn of each.
Ours is the snapshot, the saver, the catalog and the restore that workers use, with digests written and verified,
without Ray and controller. The others are called as their documentation does, and verify nothing.

    python benchmarks/checkpoint.py [--ranks 4] [--millions 100] [--rounds 5] [--directory DIR] [--json]

blocked   seconds that training waits: until the call that saves is back on all ranks
saved     seconds until the checkpoint is complete and on disk (fsync), from the same start
restored  seconds from a checkpoint (in the page cache, as it was just written) to the state in place on all ranks
memory    the most that a rank's resident memory was above what it was before, while it was saved
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
OURS, SAVE, ASYNC, TORCH = "ours", "DCP save", "DCP async_save", "torch.save on rank 0"
SIDES = (OURS, SAVE, ASYNC, TORCH)
COPY = "a copy of the state in memory"
WIDTH = 1024


def rank_main(rank: int, ranks: int, port: int, millions: int, rounds: int, directory: str, out: Any) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": HOST, "MASTER_PORT": str(port)}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    bench = _Bench(rank, ranks, port, millions, Path(directory))
    rows = []
    for number in range(rounds + 1):
        order = SIDES if number % 2 == 0 else tuple(reversed(SIDES))
        row = {side: bench.turn(side, number) for side in order}
        row[COPY] = {"blocked": bench.copy()}
        if number:  # The first round warms up.
            rows.append(row)
    out.put((rank, rows, bench.num_bytes))
    dist.barrier()
    os._exit(0)


class _Bench:
    def __init__(self, rank: int, ranks: int, port: int, millions: int, directory: Path) -> None:
        import torch
        import torch.distributed as dist
        from torch import nn

        from orchestrator.checkpoint.catalog import Catalog
        from orchestrator.control.core.workers import WorkerId
        from orchestrator.job import Job
        from orchestrator.storage import open_storage
        from orchestrator.training.saving import Saver
        from strategies.comm.fabric import Fabric
        from strategies.layout.parallel import ParallelLayout
        from strategies.layout.placement import Domain
        from strategies.layout.statemap import whole
        from strategies.model.blueprint import Blueprint
        from strategies.optim.spec import OptimizerSpec
        from strategies.state.training_state import TrainingState

        self.rank, self.ranks, self.directory = rank, ranks, directory
        torch.manual_seed(0)
        layers = max(1, round(millions * 1e6 / (WIDTH * WIDTH + WIDTH)))
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
        self.state = TrainingState(Blueprint(model), OptimizerSpec())
        self.layout = ParallelLayout(data=ranks, assignment=tuple((index,) for index in range(ranks)))
        self.fabric = Fabric(rank=rank, layout=self.layout, device=torch.device("cpu"))
        # Their store is on the port of the process group; ours is another.
        from strategies.comm.groups import serve_store
        from strategies.comm.rendezvous_proof import fresh_secret

        store, address = serve_store(HOST, fresh_secret()) if rank == 0 else (None, None)
        addresses = [address]
        dist.broadcast_object_list(addresses, 0)
        self._store = store
        assert addresses[0] is not None
        self.fabric.form(store_address=addresses[0], prefix="checkpoint", host=HOST, timeout_s=60.0)
        everything = whole(self.state.space.size, 1)
        self.domains = [Domain("", "here")] * ranks
        self.state.adopt_layout(self.layout, self.fabric, [everything] * ranks, self.domains, 2, 0, self.barrier)
        self.state.step_committed()
        own = self.state.arrangement.own
        assert own is not None
        for moment in own.moments.values():
            moment.values.uniform_()
        torch.manual_seed(0)
        self.barrier()
        self.tensors = {name: t for name, t in self.state.named() if name != "optimizer.updates"}
        self.num_bytes = sum(4 * t.numel() for t in self.tensors.values())
        self.catalog = Catalog(open_storage(str(directory / "ours")), "benchmark")
        job = Job.load(Path(__file__).parents[1] / "examples" / "quickstart.yaml", overrides=["checkpoint.keep=1"])
        self.workers = [WorkerId(index, 0) for index in range(ranks)]
        self.saver = Saver(self.workers[rank], job, self.catalog, self.state, 1000, lambda message: None)

    def barrier(self) -> None:
        import torch.distributed as dist

        dist.barrier()

    def turn(self, side: str, number: int) -> dict[str, float]:
        save: Callable[[int], Callable[[], None]] = {
            OURS: self.save_ours, SAVE: self.save_dcp, ASYNC: self.save_async, TORCH: self.save_torch,
        }[side]  # fmt: skip
        restore: Callable[[int], None] = {
            OURS: self.restore_ours, SAVE: self.restore_dcp, ASYNC: self.restore_dcp, TORCH: self.restore_torch,
        }[side]  # fmt: skip
        os.sync()
        self.barrier()
        before = _resident(peak=False)
        _forget_peak()
        self.barrier()
        started = time.perf_counter()
        finish = save(number)
        self.barrier()
        blocked = time.perf_counter() - started
        finish()
        self.barrier()
        saved = time.perf_counter() - started
        memory = _resident(peak=True) - before
        self.barrier()
        started = time.perf_counter()
        restore(number)
        self.barrier()
        restored = time.perf_counter() - started
        self.clean(side)
        return {"blocked": blocked, "saved": saved, "restored": restored, "memory": memory}

    def clean(self, side: str) -> None:
        self.barrier()
        if self.rank == 0 and side != OURS:
            shutil.rmtree(self.directory / "theirs", ignore_errors=True)
        self.barrier()

    def copy(self) -> float:
        """Seconds to copy all tensors into memory that is there."""
        import torch

        if not hasattr(self, "_room"):
            self._room = torch.empty(self.num_bytes // 4)
            self._room.fill_(1.0)
        self.barrier()
        started = time.perf_counter()
        at = 0
        for tensor in self.tensors.values():
            self._room[at : at + tensor.numel()].copy_(tensor.reshape(-1))
            at += tensor.numel()
        self.barrier()
        return time.perf_counter() - started

    # ---------------------------------------------------------------------------------------- ours

    def save_ours(self, number: int) -> Callable[[], None]:
        import torch.distributed as dist

        from orchestrator.checkpoint.names import Save
        from strategies.layout.placement import trained_spans
        from strategies.layout.statemap import share_out

        save = Save(number + 1, 1, 0)
        shares = share_out(trained_spans(self.layout, self.state.arrangement.shards))
        self.saver.save(save, shares, self.workers, self.rank, self.layout.describe())

        def finish() -> None:
            self.saver.wait()
            part = self.saver.last_part
            assert part is not None, "it was not written"
            assert not part.error, part.error
            digests: list[Any] = [None] * self.ranks
            dist.all_gather_object(digests, (part.rank, part.digest))
            if self.rank == 0:
                self.saver.commit(save, dict(digests), self.layout.describe())
                self.saver.wait()
                assert self.catalog.steps()[0] == number + 1

        return finish

    def restore_ours(self, number: int) -> None:
        from orchestrator.training.restoring import open_checkpoint, read_checkpoint

        checkpoint = open_checkpoint(self.catalog, number + 1, self.state)
        self.state.invalidate()
        self.state.adopt_layout(
            self.layout, self.fabric, [()] * self.ranks, self.domains, 2, 0, self.barrier,
            lambda loader: read_checkpoint(checkpoint, loader, lambda: None), read_by_node=True,
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------- theirs

    def save_dcp(self, number: int) -> Callable[[], None]:
        import torch.distributed.checkpoint as dcp

        dcp.save(dict(self.tensors), checkpoint_id=str(self.directory / "theirs"))
        return lambda: None

    def save_async(self, number: int) -> Callable[[], None]:
        import torch.distributed.checkpoint as dcp

        future: Any = dcp.async_save(dict(self.tensors), checkpoint_id=str(self.directory / "theirs"))
        return lambda: (getattr(future, "upload_completion", None) or future).result() and None

    def restore_dcp(self, number: int) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(dict(self.tensors), checkpoint_id=str(self.directory / "theirs"))

    def save_torch(self, number: int) -> Callable[[], None]:
        import torch

        if self.rank == 0:
            (self.directory / "theirs").mkdir()
            with (self.directory / "theirs" / "state.pt").open("wb") as file:
                torch.save(dict(self.tensors), file)
                file.flush()
                os.fsync(file.fileno())
        return lambda: None

    def restore_torch(self, number: int) -> None:
        import torch

        for name, tensor in torch.load(self.directory / "theirs" / "state.pt").items():
            self.tensors[name].copy_(tensor)


def _resident(*, peak: bool) -> float:
    """MB of this process: at most since the peak was forgotten, or now."""
    word = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(word):
            return int(line.split()[1]) / 1024
    raise AssertionError(word)


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(ranks: int, millions: int, rounds: int, directory: Path) -> tuple[list[list[dict[str, Any]]], int]:
    """What every rank measured, by round; and the bytes of the state."""
    import socket

    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    processes = [
        context.Process(target=rank_main, args=(rank, ranks, port, millions, rounds, str(directory), out), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    while len(found) < ranks:
        rank, rows, num_bytes = out.get(timeout=1800)
        found[rank] = rows
    for process in processes:
        process.join(30)
    return [found[rank] for rank in range(ranks)], num_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--millions", type=int, default=100, help="of parameters")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to write; a temporary directory if not given")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=options.directory))
    try:
        by_rank, num_bytes = measure(options.ranks, options.millions, options.rounds, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    rounds = range(options.rounds)

    def values(side: str, what: str) -> list[float]:
        """Of each round, of the rank for which it was most."""
        return [max(rows[number][side][what] for rows in by_rank) for number in rounds]

    print(f"{num_bytes / 1e9:.2f} GB of state on each of {options.ranks} ranks, {options.rounds} rounds, medians")
    print(f"{'':<32}{'blocked s':>10}{'saved s':>10}{'MB/s':>8}{'restored s':>12}{'memory MB':>11}")
    for side in SIDES:
        blocked, saved, restored, memory = (
            statistics.median(values(side, what)) for what in ("blocked", "saved", "restored", "memory")
        )
        speed = num_bytes / 1e6 / saved
        print(f"{side:<32}{blocked:>10.3f}{saved:>10.2f}{speed:>8.0f}{restored:>12.2f}{memory:>11.0f}")
    print(f"{COPY:<32}{statistics.median(values(COPY, 'blocked')):>10.3f}")
    pairs = [
        ("blocked, ours / async_save", OURS, ASYNC, "blocked"), ("blocked, ours / a copy", OURS, COPY, "blocked"),
        ("bytes/s, ours / DCP save", SAVE, OURS, "saved"), ("bytes/s, ours / async_save", ASYNC, OURS, "saved"),
        ("restore, ours / DCP load", OURS, SAVE, "restored"),
    ]  # fmt: skip
    for name, first, second, what in pairs:
        ratios = [a / b for a, b in zip(values(first, what), values(second, what), strict=True)]
        print(f"{name:<32}{min(ratios):>10.3f}{statistics.median(ratios):>10.3f}{max(ratios):>10.3f}  (min median max)")
    if options.json:
        print(json.dumps({"benchmark": "checkpoint", "bytes": num_bytes, "rounds": by_rank}))


if __name__ == "__main__":
    main()
