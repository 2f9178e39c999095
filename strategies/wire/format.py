"""How sums of gradients are sent: which numbers stand for them, and where they are rounded. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Name = Literal["fp32", "bf16", "int8", "int4", "top_k", "power_sgd"]
LOSES_LITTLE = ("bf16", "int8")
"""Formats whose rounding errors are not worth keeping: less than a hundredth of the largest element near by."""


@dataclass(frozen=True)
class WireFormat:
    """The format `name`, with the share `fraction` of elements that top_k sends and the `rank` of power_sgd's matrices.

    Sums are rounded at the nodes of the summation tree that have at least `across` virtual workers: smaller ones are
    sent as they are. With `feedback` a node keeps what it rounds off and adds it in the next step (error feedback:
    Seide et al. 2014, Karimireddy et al. 2019).
    """

    name: Name = "fp32"
    fraction: float = 0.0
    rank: int = 0
    across: int = 1
    feedback: bool = False

    @property
    def share(self) -> float | None:
        """What is sent of a matrix, as a share of fp32 (`strategies.wire.codecs`); None where that depends on its
        shape."""
        if self.name == "top_k":
            kept = max(1, round(self.fraction * 4096))
            return (kept + -(-kept // 2)) / 4096
        return {"fp32": 1.0, "bf16": 0.5, "int8": 65 / 256, "int4": 17 / 128}.get(self.name)

    @property
    def is_exact(self) -> bool:
        """Whether sums are sent as they are."""
        return self.name == "fp32"

    def rounds(self, node: tuple[int, int]) -> bool:
        """Whether the sum of this subtree of virtual workers is rounded."""
        return not self.is_exact and node[1] - node[0] >= self.across


FP32 = WireFormat()
