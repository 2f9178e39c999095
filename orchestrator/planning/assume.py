"""The hardware a job is planned for: what the user said of it, and what is assumed where nothing was said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.errors import PlanError
from orchestrator.planning.gpus import GPUS, Gpu
from orchestrator.planning.hardware import Hardware, Link
from orchestrator.planning.units import parse_bytes, parse_rate, parse_seconds, show_bytes

if TYPE_CHECKING:
    from orchestrator.job import Job

# A core of a cloud machine: what the quickstart's 17,000 to 18,000 tokens per second on two cores (docs/benchmarks.md)
# come to in its own FLOPs, rounded down. A machine may have half of that: `--from` measures it.
_CORE_TFLOPS = 0.05
# What FSDP2 takes there for a block of the quickstart, twice in each micro-batch: measured beside `shard: none`.
_GATHER_S = 2.9e-3

CPU_CORE = Hardware(
    peak_flops=_CORE_TFLOPS * 1e12,
    efficiency=1.0,
    inside=Link(bytes_per_s=2e9, latency_s=50e-6),
    between=Link(bytes_per_s=1e9, latency_s=100e-6),
    ranks_per_node=8,
    gather_s=_GATHER_S,
)
"""What is assumed for a job without GPUs whose workers have a core each."""


@dataclass(frozen=True)
class HardwareOptions:
    """The options of `orchestrator plan`, as text where they have units; None: not given."""

    gpu_memory: str | None = None
    gpu_tflops: float | None = None
    efficiency: float | None = None
    bandwidth: str | None = None
    node_bandwidth: str | None = None
    latency: str | None = None
    node_latency: str | None = None
    ranks_per_node: int | None = None
    gpu: str | None = None
    """One of `orchestrator.planning.gpus.GPUS`."""


def hardware_for(job: Job, options: HardwareOptions) -> tuple[Hardware, tuple[str, ...]]:
    """The hardware, and a line for each thing that is assumed. Raises PlanError for values that make no sense."""
    gpu = _gpu_of(job, options)
    if options.gpu_tflops is not None and not 0 < options.gpu_tflops < float("inf"):
        raise PlanError(f"--gpu-tflops must be more than 0, got {options.gpu_tflops:g}")
    if options.efficiency is not None and not 0 < options.efficiency <= 1:
        raise PlanError(f"--efficiency must be more than 0 and at most 1, got {options.efficiency:g}")
    if options.ranks_per_node is not None and options.ranks_per_node < 1:
        raise PlanError(f"--ranks-per-node must be at least 1, got {options.ranks_per_node}")
    assumed: list[str] = []

    def given(value: str | None, otherwise: str, words: str) -> str:
        if value is None:
            assumed.append(f"{words} {otherwise}")
        return value or otherwise

    known = (options.gpu_tflops, options.efficiency, options.bandwidth, options.node_bandwidth)
    if gpu is not None and options.gpu is None and None in known:
        assumed.append("GPUs as A100 (--gpu says others)")
    share = min(1.0, job.resources.gpu) if gpu is not None and job.resources.gpu > 0 else 1.0
    if share < 1:
        assumed.append(f"{share:g} of a GPU's memory and arithmetic for each worker")
    tflops, efficiency = _arithmetic(job, options, gpu, assumed)
    memory = options.gpu_memory
    if memory is None and options.gpu is not None and gpu is not None:
        memory = f"{gpu.memory_gib:g}GiB"
    hardware = Hardware(
        peak_flops=tflops * share * 1e12,
        efficiency=efficiency,
        inside=Link(
            parse_rate(
                given(options.bandwidth, f"{gpu.inside:g}GB/s" if gpu else "2GB/s", "within a node"), "--bandwidth"
            ),
            parse_seconds(given(options.latency, "5us" if gpu else "50us", "with a latency of"), "--latency"),
        ),
        between=Link(
            parse_rate(
                given(options.node_bandwidth, f"{gpu.between:g}GB/s" if gpu else "1GB/s", "between nodes (per rank)"),
                "--node-bandwidth",
            ),
            parse_seconds(
                given(options.node_latency, "15us" if gpu else "100us", "with a latency of"), "--node-latency"
            ),
        ),
        ranks_per_node=int(given(_text(options.ranks_per_node), "8", "ranks on a node:")),
        memory_bytes=None if memory is None else share * parse_bytes(memory, "--gpu-memory"),
        gather_s=0.0 if gpu else _GATHER_S,
        overlaps=gpu is not None and job.strategy.transport != "gloo",
    )
    if hardware.usable_bytes is None:
        lines = ["memory per rank unknown, so no layout is refused for it; --gpu-memory says it"]
    else:
        lines = [f"{show_bytes(hardware.usable_bytes)} of {memory} are planned with, the rest is held back"]
    if assumed:
        lines.append("assumed: " + ", ".join(assumed))
    return hardware, tuple(lines)


def _gpu_of(job: Job, options: HardwareOptions) -> Gpu | None:
    """The GPU that is planned for; None for a job without. Raises PlanError for a name that is not known."""
    if options.gpu is None:
        return GPUS["A100"] if job.resources.gpu > 0 else None
    if options.gpu not in GPUS:
        raise PlanError(
            f"--gpu must be one of {', '.join(GPUS)}, got {options.gpu!r}; --gpu-tflops and others say more"
        )
    return GPUS[options.gpu]


def _arithmetic(job: Job, options: HardwareOptions, gpu: Gpu | None, assumed: list[str]) -> tuple[float, float]:
    """Peak TFLOP/s of a rank and the fraction reached."""
    if gpu is None and options.gpu_tflops is None:
        tflops = _CORE_TFLOPS * job.resources.cpu
        if options.efficiency is None:
            assumed.append(f"{tflops:g} TFLOP/s reached by a rank of {job.resources.cpu:g} CPU cores")
        return tflops, options.efficiency or 1.0
    precision, gpu = job.train.precision, gpu or GPUS["A100"]
    peak, reached = gpu.tflops(precision), gpu.efficiency(precision, compiled=job.train.compile)
    if options.gpu_tflops is None:
        assumed.append(f"{peak:g} TFLOP/s peak in {precision}")
    if options.efficiency is None:
        assumed.append(f"{reached:.0%} of the peak reached")
    return options.gpu_tflops or peak, options.efficiency or reached


def _text(value: int | None) -> str | None:
    return None if value is None else str(value)
