"""Ray Train 2.60 with the model, the data and the optimizer of a job file: the other side of comparisons.

Elastic data parallelism (DDP) as its documentation has it, with a checkpoint every few steps.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHECKPOINT_STEPS = 20


def fit(
    job: str, home: Path, log: Path, workers: tuple[int, int], *, steps: int | None = None,
    saves_when_leaving: bool = False, **scaling: Any,
) -> None:  # fmt: skip
    """Trains on the Ray that this process is connected to, for `steps` steps (None: until it is ended), whatever
    becomes of its workers. Checkpoints go to `home`; `log` gets a line per worker that starts ({session, pid, node,
    world}) and per step done ({step, at, session}), where a session is one start of all workers."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    # The declared types are those of Ray Train's first version.
    elastic: Any = {"num_workers": workers, "resources_per_worker": {"CPU": 1}, **scaling}
    TorchTrainer(
        train_loop,
        train_loop_config={
            "job": os.path.abspath(job), "log": str(log), "cwd": os.getcwd(), "steps": steps,
            "saves_when_leaving": saves_when_leaving,
        },
        scaling_config=ScalingConfig(**elastic),
        run_config=RunConfig(
            storage_path=str(home), name="ray-train", failure_config=FailureConfig(max_failures=-1),
        ),
    ).fit()  # fmt: skip


def train_loop(config: dict[str, Any]) -> None:
    """One worker."""
    os.chdir(config["cwd"])
    import ray
    import torch
    import torch.nn.functional as F
    from ray import train
    from ray.train.torch import prepare_model

    from orchestrator.data.of_job import dataset_of, prepare_stores
    from orchestrator.job import Job
    from orchestrator.models.loading import build_model

    torch.set_num_threads(1)
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    job = Job.load(config["job"])
    dataset = dataset_of(job, prepare_stores(job, verify=False))
    model: Any = prepare_model(build_model(job, dataset.vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.train.optimizer.lr)
    first = 0
    if (checkpoint := train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as path:
            saved = torch.load(Path(path) / "state.pt")
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            first = saved["step"] + 1
    session = [time.time()]
    if world > 1:
        torch.distributed.broadcast_object_list(session, src=0)
    node = ray.get_runtime_context().get_node_id()
    note(config["log"], {"session": session[0], "pid": os.getpid(), "node": node, "world": world})
    has_saved_for_leave = not config["saves_when_leaving"]
    for step in itertools.count(first) if config["steps"] is None else range(first, config["steps"]):
        ids = dataset.step_ids(step)[rank::world]
        rows = torch.from_numpy(dataset.stores[0].samples(ids, job.data.sequence_length))
        pieces = rows.split(job.train.micro_batch)
        for index, piece in enumerate(pieces):
            quiet = index < len(pieces) - 1 and world > 1
            with model.no_sync() if quiet else contextlib.nullcontext():
                logits = model(input_ids=piece[:, :-1]).logits
                loss = F.cross_entropy(logits.float().flatten(0, 1), piece[:, 1:].flatten())
                (loss / len(pieces)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            note(config["log"], {"step": step, "at": time.time(), "session": session[0]})
        leaves = not has_saved_for_leave and train.get_preemption_info() is not None
        has_saved_for_leave = has_saved_for_leave or leaves
        if leaves or (step + 1) % CHECKPOINT_STEPS == 0:
            with tempfile.TemporaryDirectory() as path:
                if rank == 0:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                    torch.save(state, Path(path) / "state.pt")
                    train.report({"step": step}, checkpoint=train.Checkpoint.from_directory(path))
                else:
                    train.report({"step": step})


def note(path: str, record: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")
