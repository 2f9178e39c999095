"""Settings of a process that its numbers depend on."""

from __future__ import annotations

import os

import torch

from orchestrator.job import Job
from strategies.model.same_bits import settle_kernels

_TF32 = "it has products of fp32 matrices rounded to ten bits"
REFUSED = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": _TF32, "NVIDIA_TF32_OVERRIDE": _TF32}
"""What would overrule the settings below, and why that is refused."""


def make_deterministic(job: Job, device: torch.device) -> None:
    """Threads from the job file, and on GPUs kernels that compute the same each time, in the precision that is asked
    for. Called in each thread that computes.

    Raises ValueError for an environment that would overrule them.
    """
    torch.set_num_threads(max(1, int(job.resources.cpu)))
    if device.type != "cuda":
        return
    for name, why in REFUSED.items():
        if os.environ.get(name, "0") not in ("", "0"):
            raise ValueError(f"the environment has {name}={os.environ[name]}: {why}. Unset it")
    settle_kernels(device)
