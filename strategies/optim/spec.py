"""An optimizer and the settings that a job has for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from strategies.compat import build_optimizer
from strategies.optim.adamw import ADAMW
from strategies.optim.optimizer import MOMENT_BYTES, Optimizer, Settings
from strategies.optim.sgd import SGD

if TYPE_CHECKING:
    import torch

OPTIMIZERS: dict[str, Optimizer] = {kind.name: kind for kind in (ADAMW, SGD)}
"""Those that come with this package, by the name that a job file has for them."""


@dataclass(frozen=True)
class OptimizerSpec(Settings):
    """What the job asks for."""

    kind: Optimizer = field(default=ADAMW, kw_only=True)
    state: str = field(default="fp32", kw_only=True)
    """The type of moments: fp32 or bf16."""
    offload: bool = field(default=False, kw_only=True)
    """Whether they are kept in host memory, and with them weights that nothing computes with."""
    seed: int = field(default=0, kw_only=True)
    """Of what is drawn where they are rounded."""

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the tensors kept for each parameter."""
        return self.kind.moments(self)

    @property
    def state_bytes(self) -> int:
        """What is kept for each element of a parameter, beside the parameter itself."""
        return MOMENT_BYTES[self.state] * len(self.moments)

    @property
    def moment_type(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self.state == "bf16" else torch.float32

    def build(self, decayed: Sequence[torch.Tensor], undecayed: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        """A torch optimizer over flat parameter tensors; weight decay applies to `decayed` only."""
        groups = [
            {"params": list(tensors), "weight_decay": decay}
            for tensors, decay in ((decayed, self.weight_decay), (undecayed, 0.0))
            if tensors
        ]
        return build_optimizer(lambda: self.kind.build(groups, self))
