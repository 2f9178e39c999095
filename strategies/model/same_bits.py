"""What has the kernels of a GPU compute the same bits each time."""

from __future__ import annotations

import os

import torch

FOR_SAME_BITS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
"""What kernels read of the environment."""
FLAGS = {
    "deterministic_algorithms": True,
    "allow_tf32": False,
    "cudnn_deterministic": True,
    "cudnn_benchmark": False,
}
"""What torch is told, in words: for the record of a run."""


def settle_kernels(device: torch.device) -> None:
    """Has this process, and its present thread, compute on a GPU with kernels that are deterministic, and in the
    precision that is asked for."""
    os.environ.update(FOR_SAME_BITS)
    torch.cuda.set_device(device)
    torch.use_deterministic_algorithms(FLAGS["deterministic_algorithms"])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = FLAGS["allow_tf32"]
    torch.backends.cudnn.deterministic = FLAGS["cudnn_deterministic"]
    torch.backends.cudnn.benchmark = FLAGS["cudnn_benchmark"]
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
