"""What a worker computes on, in words: for people who look for why two do not compute the same."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def fingerprint(device: torch.device) -> str:
    """Device, libraries and driver; equal for two workers that should give the same bits."""
    if device.type != "cuda":
        return f"{_processor()} ({torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}"
    properties = torch.cuda.get_device_properties(device)
    capability = f"capability {properties.major}.{properties.minor}, {properties.multi_processor_count} SMs"
    return (
        f"{properties.name} ({capability}), torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}, driver {_driver()}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _driver() -> str:
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        return "unknown"
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")
