"""Cross-entropy of logits, also of those that tensor parallelism has split over the vocabulary.

Split logits stay where they are: ranks tell each other the largest logit of each row, the sum of exponentials and the
logit of the label, three numbers a row (Shoeybi et al. 2019, "Megatron-LM", section 3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from strategies.objective.rows import IGNORED

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum (fp32, no dimensions) of the cross-entropy, in nats, of `logits` [rows, classes] in any floating type,
    split over classes or not, and `labels` int64 [rows], of which IGNORED ones do not count."""
    if not hasattr(logits, "placements"):  # It is no DTensor.
        return F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORED)
    return _split_cross_entropy(logits, labels)  # type: ignore[arg-type]


def _split_cross_entropy(logits: DTensor, labels: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import Shard

    (placement,) = logits.placements
    assert isinstance(placement, Shard)
    mesh = logits.device_mesh
    local = logits.to_local()
    if placement.dim % logits.dim() != logits.dim() - 1:
        raise ValueError(f"logits are split in dimension {placement.dim}, not over classes")
    first = mesh.get_local_rank() * -(-logits.shape[-1] // mesh.size())
    found: torch.Tensor = _Split.apply(local.float(), labels, first, mesh)  # type: ignore[no-untyped-call]
    return found


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, first: int, mesh: Any) -> torch.Tensor:
        from strategies.compat import all_reduce

        largest = all_reduce(logits.amax(dim=-1), "max", mesh)
        shifted = logits - largest[:, None]
        exponentials = shifted.exp()
        own = labels - first
        is_here = (own >= 0) & (own < logits.shape[-1])
        at = own.clamp(0, logits.shape[-1] - 1)[:, None]
        told = torch.stack([exponentials.sum(dim=-1), torch.where(is_here, shifted.gather(-1, at)[:, 0], 0.0)])
        total, of_label = all_reduce(told, "sum", mesh)
        counts = labels != IGNORED
        ctx.save_for_backward(exponentials.div_(total[:, None]), at, is_here & counts, counts)
        return torch.where(counts, total.log() - of_label, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = gradients
        probabilities, at, is_here, counts = ctx.saved_tensors
        found = probabilities.scatter_add(-1, at, -is_here[:, None].to(probabilities.dtype))
        return found.mul_((counts * gradient)[:, None]), None, None, None
