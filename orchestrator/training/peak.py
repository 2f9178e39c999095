"""What a worker's device could do at the most: the base of MFU (model FLOP/s utilisation, arXiv:2204.02311)."""

from __future__ import annotations

import logging
import time

import torch

from orchestrator.job import Job

log = logging.getLogger(__name__)

_TERAFLOPS = {
    # Data sheets of NVIDIA: dense, no sparsity. bf16 on tensor cores; fp32 without TF32, which is off here.
    "B200": (2250.0, 75.0),
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "GH200": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "A10G": (70.0, 35.0),
    "A10": (125.0, 31.2),
    "A30": (165.0, 10.3),
    "A40": (150.0, 37.4),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "RTX 6000 Ada": (364.0, 91.1),
    "RTX 4090": (165.0, 82.6),
    "RTX 3090": (71.0, 35.6),
}
"""By a part of the device's name, the first that fits: in bf16, in fp32."""


def peak_flops(job: Job, device: torch.device) -> float:
    """FLOP/s in the job's precision: `monitoring.peak_tflops`, or by the device's name, or as measured with products of
    matrices, which reach most of it (on a CPU, and on a device that is not known here). 0 where that fails."""
    try:
        return _peak_flops(job, device)
    except RuntimeError as error:  # Out of memory, most likely: the number is for people to read, and not worth a run.
        log.info("there will be no MFU: %s", error)
        return 0.0


def _peak_flops(job: Job, device: torch.device) -> float:
    if job.monitoring.peak_tflops is not None:
        return job.monitoring.peak_tflops * 1e12
    is_bf16 = job.train.precision == "bf16"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, (bf16, fp32) in _TERAFLOPS.items():
            if part in name:
                return (bf16 if is_bf16 else fp32) * 1e12
    return measured_flops(device, torch.bfloat16 if is_bf16 else torch.float32)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of some products of square matrices."""
    size, times = (4096, 8) if device.type == "cuda" else (512, 5)
    matrix = torch.ones((size, size), device=device, dtype=dtype)
    torch.mm(matrix, matrix)
    best = float("inf")
    for _ in range(times):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
