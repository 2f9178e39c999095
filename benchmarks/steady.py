"""Tokens per second of an undisturbed run, beside plain DistributedDataParallel, in turn on this machine.

Same model, data order, global batch, micro-batch, ranks, threads and backend on both sides; DDP accumulates its
micro-batches under `no_sync`, clips, and uses torch's AdamW. Ours is the whole product: Ray actors, heartbeats, events,
metrics. Each round runs one after the other; the ratio is taken round by round.

    python benchmarks/steady.py [--rounds 3] [--steps 40] [--workers 4]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import tempfile
import time
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

WARM_UP_STEPS = 8


def ours(job_path: str, workers: int, steps: int) -> float:
    """Tokens per second over the steps after warm-up, from the times at which steps were committed."""
    from monitoring.records import read_records
    from orchestrator import Job, run

    overrides = [f"elastic.workers.max={workers}", f"elastic.workers.min={workers}", "elastic.standby=0"]
    job = Job.load(job_path, overrides=[*overrides, f"train.steps={steps}", "checkpoint.every_steps=null"])
    with tempfile.TemporaryDirectory() as home:
        result = run(job, Path(home) / "run")
        if result.status != "finished":
            raise SystemExit(f"our run {result.status}: {result.reason}")
        records = list(read_records(Path(home) / "run" / "metrics.jsonl"))
    return rate([(r["committed_at"], r["tokens"]) for r in records])


def rate(steps: list[tuple[float, int]]) -> float:
    after = steps[WARM_UP_STEPS:]
    return sum(tokens for _, tokens in after) / (after[-1][0] - steps[WARM_UP_STEPS - 1][0])


def ddp(job_path: str, workers: int, steps: int) -> float:
    """The same for torch's DistributedDataParallel in plain spawned processes."""
    import torch.multiprocessing as mp

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue: Queue[Any] = context.Queue()
    ranks = [
        context.Process(target=_ddp_rank, args=(rank, workers, port, job_path, steps, queue)) for rank in range(workers)
    ]
    for process in ranks:
        process.start()
    times = queue.get(timeout=600)
    for process in ranks:
        process.join()
    return rate(times)


def _ddp_rank(rank: int, world_size: int, port: int, job_path: str, steps: int, queue: Queue[Any]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel

    from orchestrator.data.of_job import dataset_of, prepare_stores
    from orchestrator.job import Job
    from orchestrator.models.loading import build_model
    from orchestrator.training import build

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    job = Job.load(job_path)
    dataset = dataset_of(job, prepare_stores(job, verify=False))
    model = build_model(job, dataset.vocab_size)
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    spec = build.optimizer_spec(job)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=spec.lr, betas=spec.betas, eps=spec.eps,
    )  # fmt: skip
    step_spec = build.step_spec(job)
    times = []
    for step in range(steps):
        ids = dataset.step_ids(step).reshape(world_size, -1)[rank]
        batch = torch.from_numpy(dataset.stores[0].samples(ids, job.data.sequence_length))
        pieces = batch.split(job.train.micro_batch)
        for index, rows in enumerate(pieces):
            last = index == len(pieces) - 1
            with contextlib.nullcontext() if last else replica.no_sync():
                logits = replica(input_ids=rows[:, :-1]).logits
                loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
                (loss / len(pieces)).backward()
        if job.train.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.train.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = spec.lr * step_spec.schedule.factor(step)
        optimizer.step()
        optimizer.zero_grad()
        times.append((time.time(), job.train.global_batch * job.data.sequence_length))
    if rank == 0:
        queue.put(times)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="examples/quickstart.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    rows = []
    for number in range(options.rounds):
        # The order within a round alternates, so that a machine that speeds up or slows down favours nobody.
        sides = {"ours": ours, "ddp": ddp}
        order = ["ours", "ddp"] if number % 2 == 0 else ["ddp", "ours"]
        measured = {name: sides[name](options.job, options.workers, options.steps) for name in order}
        rows.append((measured["ours"], measured["ddp"]))
        print(
            f"round {number + 1}: ours {rows[-1][0]:,.0f} tokens/s, DDP {rows[-1][1]:,.0f} tokens/s, "
            f"ratio {rows[-1][0] / rows[-1][1]:.3f}",
            flush=True,
        )
    ratios = [a / b for a, b in rows]
    print(f"\n{'':<28}{'min':>10}{'median':>10}{'max':>10}")
    for name, values in (
        ("ours, tokens/s", [a for a, _ in rows]), ("DDP, tokens/s", [b for _, b in rows]), ("ours / DDP", ratios),
    ):  # fmt: skip
        figures = (min(values), statistics.median(values), max(values))
        print(f"{name:<28}" + "".join(f"{v:>10,.3f}" if v < 100 else f"{v:>10,.0f}" for v in figures))
    print(json.dumps({"benchmark": "steady", "workers": options.workers, "steps": options.steps, "rounds": rows,
                      "ratio_median": statistics.median(ratios)}))  # fmt: skip


if __name__ == "__main__":
    main()
