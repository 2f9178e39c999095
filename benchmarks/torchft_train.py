"""torchft 0.2 with the model, the data and the optimizer of a job file: another side of comparisons.

Each replica is a process of its own, with torchft's Manager and its wrapper of the optimizer; a lighthouse tells them
who is there. A replica that was killed is missed by the others, which go on with a smaller batch; when it is back it
gets the state of one of them. Meanwhile its samples are not computed.

    python benchmarks/torchft_train.py JOB LOG STEPS REPLICA REPLICAS
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

REQUIREMENTS = ("torchft==0.2.0", "opentelemetry-exporter-otlp-proto-http==1.45.2")
LIGHTHOUSE = {"min_replicas": 1, "join_timeout_ms": 1_000, "quorum_tick_ms": 100, "heartbeat_timeout_ms": 1_000}
"""As in torchft's examples, but with a replica that is silent, or late, given up after a second, and not after five or
ten: each kill costs so much less."""
_ADDRESS = "TORCHFT_LIGHTHOUSE"


def train(job_path: str, log: str, steps: int, replica: int, replicas: int) -> None:
    """One replica, until that many steps are done. `log` gets a line when it starts and one for each step that it
    commits, as `benchmarks.ray_train` writes them, or computes in vain."""
    import torch
    import torch.nn.functional as F
    from torch.distributed import TCPStore
    from torchft import Manager, ProcessGroupGloo
    from torchft.optim import OptimizerWrapper

    from orchestrator.data.of_job import dataset_of, prepare_stores
    from orchestrator.job import Job
    from orchestrator.models.loading import build_model

    torch.set_num_threads(1)
    job = Job.load(job_path)
    dataset = dataset_of(job, prepare_stores(job, verify=False))
    inner: Any = build_model(job, dataset.vocab_size)
    adamw = torch.optim.AdamW(inner.parameters(), lr=job.train.optimizer.lr)

    def load(state: Any) -> None:
        inner.load_state_dict(state["model"])
        adamw.load_state_dict(state["optimizer"])

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=30)), min_replica_size=1, load_state_dict=load,
        state_dict=lambda: {"model": inner.state_dict(), "optimizer": adamw.state_dict()}, rank=0, world_size=1,
        store_addr="localhost", store_port=store.port, replica_id=f"replica_{replica}", timeout=timedelta(seconds=30),
    )  # fmt: skip
    # Its DistributedDataParallel ends a replica whose peer is killed while gradients are exchanged (AssertionError in
    # its hook): they are handed to its manager by hand, all at once.
    gradient = torch.zeros(sum(parameter.numel() for parameter in inner.parameters()))
    at = 0
    for parameter in inner.parameters():
        parameter.grad = gradient[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    optimizer: Any = OptimizerWrapper(manager, adamw)
    note(log, {"session": time.time(), "pid": os.getpid(), "replica": replica})
    try:
        while (step := manager.current_step()) < steps:
            ids = dataset.step_ids(step)[replica::replicas]
            rows = torch.from_numpy(dataset.stores[0].samples(ids, job.data.sequence_length))
            pieces = rows.split(job.train.micro_batch)
            optimizer.zero_grad(set_to_none=False)
            for piece in pieces:
                logits = inner(input_ids=piece[:, :-1]).logits
                loss = F.cross_entropy(logits.float().flatten(0, 1), piece[:, 1:].flatten())
                (loss / len(pieces)).backward()
            manager.allreduce(gradient).wait()
            torch.nn.utils.clip_grad_norm_(inner.parameters(), 1.0)
            optimizer.step()
            about = {"at": time.time(), "replica": replica, "participants": manager.num_participants()}
            if manager.current_step() > step:
                note(log, {"step": manager.current_step() - 1, **about})
            else:
                note(log, {"discarded": step, **about})
    finally:
        manager.shutdown(wait=False)


class Replicas:
    """Processes that train, each started anew when it is killed. What they print is in `errors`."""

    def __init__(self, job: str, log: Path, steps: int, count: int) -> None:
        self._command = [sys.executable, __file__, os.path.abspath(job), str(log), str(steps)]
        self._count = count
        self.errors = log.with_suffix(".err")
        self._over = threading.Event()
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    @property
    def pids(self) -> dict[int, int]:
        """Of the replicas that run, by number."""
        return {replica: process.pid for replica, process in self._running.items() if process.poll() is None}

    @contextlib.contextmanager
    def running(self, lighthouse: str) -> Iterator[threading.Thread]:
        """A thread that ends when one of them is done, or has failed. Raises RuntimeError at the end if one failed."""
        failed: list[int] = []

        def start(replica: int) -> None:
            with self.errors.open("ab") as errors:
                self._running[replica] = subprocess.Popen(
                    [*self._command, str(replica), str(self._count)], env={**os.environ, _ADDRESS: lighthouse},
                    stdout=errors, stderr=errors,
                )  # fmt: skip

        def watch() -> None:
            while not self._over.wait(0.02):
                for replica, process in list(self._running.items()):
                    code = process.poll()
                    if code == -signal.SIGKILL:
                        start(replica)
                    elif code is not None:
                        failed.extend([code] if code else [])
                        return

        for replica in range(self._count):
            start(replica)
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield thread
        finally:
            self._over.set()
            thread.join()
            for process in self._running.values():
                process.kill()
                process.wait()
        if failed:
            said = self.errors.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(f"a replica of torchft ended with {failed[0]}; the last of what replicas said:\n{said}")


@contextlib.contextmanager
def lighthouse() -> Iterator[str]:
    """The address of a server that tells replicas who is there."""
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind="[::]:0", **LIGHTHOUSE)
    try:
        yield server.address()
    finally:
        server.shutdown()


def fit_in_ray(job: str, home: Path, log: Path, steps: int, replicas: int) -> None:
    """The same replicas as workers of Ray Train, on the Ray that this process is connected to: it starts the group of
    the one that failed anew, and no other."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.torch.torchft_config import TorchftConfig

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    TorchTrainer(
        train_in_ray,
        train_loop_config={"job": os.path.abspath(job), "log": str(log), "cwd": os.getcwd(), "steps": steps},
        scaling_config=ScalingConfig(num_workers=replicas, resources_per_worker={"CPU": 1}),
        torch_config=TorchftConfig(lighthouse_kwargs=LIGHTHOUSE, backend="gloo"),
        run_config=RunConfig(
            storage_path=str(home), name="ray-train-torchft", failure_config=FailureConfig(max_failures=-1)
        ),
    ).fit()


def train_in_ray(config: dict[str, Any]) -> None:
    """One worker of Ray Train."""
    os.chdir(config["cwd"])
    from ray import train as ray_train

    context = ray_train.get_context()
    train(config["job"], config["log"], config["steps"], context.get_world_rank(), context.get_world_size())


def note(path: str, record: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
