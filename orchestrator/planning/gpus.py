"""GPUs that can be planned for by name: what their data sheets say, and how much of it training is known to reach.

Sources: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM, B200 (HGX) and L40S (dense, no sparsity; bf16 on
tensor cores, fp32 without TF32; NVLink by direction), and networks as such nodes usually have: HDR InfiniBand beside
A100, NDR (400 Gb/s a GPU) beside H100 and later, 100 Gb/s Ethernet a GPU beside L40S, whose GPUs share PCIe 4.0.
What is reached in bf16 is fitted to torchtitan's Llama 3.1 8B (its docs/performance.md: on 8 H100 at 500 W 33.7 % in
eager mode, 39 % compiled) and, for A100, to its Llama 3 8B on 64 (58 % compiled; eager in the same proportion). For
H200, B200 and L40S that of the H100 is taken over. Other models reach more or less.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peaks in TFLOP/s; memory in GiB; links in GB/s, by direction: inside of a node, and between nodes for each GPU.
    `reached` is the fraction of the bf16 peak that training reaches, eager and compiled; of the fp32 peak 70 %."""

    bf16: float
    fp32: float
    memory_gib: float
    inside: float
    between: float
    reached: tuple[float, float]

    def tflops(self, precision: str) -> float:
        """The peak."""
        return self.bf16 if precision == "bf16" else self.fp32

    def efficiency(self, precision: str, *, compiled: bool) -> float:
        """The fraction of the peak that is reached."""
        return self.reached[compiled] if precision == "bf16" else 0.7


GPUS = {
    "A100": Gpu(312.0, 19.5, 80.0, 300.0, 25.0, (0.5, 0.58)),
    "H100": Gpu(989.0, 67.0, 80.0, 450.0, 50.0, (0.337, 0.39)),
    "H200": Gpu(989.0, 67.0, 141.0, 450.0, 50.0, (0.337, 0.39)),
    "B200": Gpu(2250.0, 75.0, 180.0, 900.0, 50.0, (0.337, 0.39)),
    "L40S": Gpu(362.0, 91.6, 48.0, 25.0, 12.5, (0.337, 0.39)),
}
