"""What a worker's device could do at the most: the base of MFU (model FLOP/s utilisation, arXiv:2204.02311)."""

from __future__ import annotations

import logging
import re
import time

import torch

from orchestrator.job import Job

log = logging.getLogger(__name__)

_TERAFLOPS = {
    # Data sheets of NVIDIA and AMD: dense, no sparsity. bf16 on tensor cores; fp32 without TF32, which is off here.
    "GB300": (2500.0, 77.0),
    "GB200": (2500.0, 80.0),
    "B300": (2250.0, 72.0),
    "B200": (2250.0, 75.0),
    "H20": (148.0, 44.0),
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
    "RTX PRO 6000": (504.0, 126.0),
    "RTX 6000 Ada": (364.0, 91.1),
    "RTX A6000": (155.0, 38.7),
    "RTX 5090": (209.5, 104.8),
    "RTX 4090": (165.0, 82.6),
    "RTX 3090": (71.0, 35.6),
    "MI355X": (2500.0, 157.3),
    "MI325X": (1307.0, 163.4),
    "MI300X": (1307.0, 163.4),
    "MI250X": (383.0, 95.7),
    "V100": (0.0, 15.7),
    "T4": (0.0, 8.1),
}
"""By the model in the device's name: in bf16 (0: it has none), in fp32."""
_SLICE = re.compile(r"MIG (\d+)g\.")
"""What the name of a part of a GPU has: how many of its seven (an A30's four) slices of processors."""


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
        known = known_flops(torch.cuda.get_device_name(device), is_bf16=is_bf16)
        if known:
            return known
    return measured_flops(device, torch.bfloat16 if is_bf16 else torch.float32)


def known_flops(name: str, *, is_bf16: bool) -> float:
    """FLOP/s by the name that CUDA has for a device; 0 for one that is not known here.

    >>> known_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", is_bf16=True) / 1e12
    141.28571428571428
    """
    words = re.split(r"[^A-Za-z0-9]+", name)
    for model, (bf16, fp32) in _TERAFLOPS.items():
        wanted = model.split()
        if any(words[at : at + len(wanted)] == wanted for at in range(len(words))):
            sliced = _SLICE.search(name)
            share = int(sliced[1]) / (4 if model == "A30" else 7) if sliced else 1.0
            return (bf16 if is_bf16 else fp32) * share * 1e12
    return 0.0


def lacks_bf16(name: str) -> bool:
    """Whether a device is known to have no arithmetic in bf16, which it would be made to imitate, slowly."""
    return bool(known_flops(name, is_bf16=False)) and not known_flops(name, is_bf16=True)


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
