"""Embeddings of texts: those that belong together are to be near each other, and far from those of other pairs
(contrastive learning with negatives of the batch: Oord et al. 2018; Gao et al. 2021, SimCSE).

The other pairs are those of the virtual worker, whatever ranks there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from strategies.objective.objective import Objective, Sums
from strategies.objective.rows import Rows

if TYPE_CHECKING:
    import torch

    from strategies.objective.batch import Batch


@dataclass(frozen=True)
class EmbeddingSettings:
    """`temperature`: what cosines are divided by. `pooling`: a text's embedding is the hidden state of its last token,
    or the mean of all."""

    temperature: float = 0.05
    pooling: str = "last"

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be more than 0, got {self.temperature}")
        if self.pooling not in ("last", "mean"):
            raise ValueError(f"pooling must be last or mean, got {self.pooling!r}")


class Embedding(Objective):
    """Of each pair of texts the second is to be told from those of all other pairs of the virtual worker, and the first
    likewise."""

    name = "embedding"
    loss_unit = "nats per pair"
    model_class = "AutoModel"
    shapes = ("pair",)
    counts = "last"
    sequences = 2
    gives_hidden_states = True
    whole_virtual_workers = True
    Settings = EmbeddingSettings

    def labels(self, rows: Rows) -> torch.Tensor:
        """The pair that each first text belongs to, int64 [pairs]."""
        import torch

        return torch.arange(len(rows.tokens) // 2, device=rows.tokens.device)

    def weight(self, batch: Batch) -> float:
        """The pairs of the step."""
        return batch.step_samples

    def invented(self, rows: Rows) -> Rows:
        """Each row as both texts."""
        import torch

        tokens = rows.tokens.repeat_interleave(2, dim=0)
        counting = torch.zeros_like(tokens[:, 1:], dtype=torch.bool)
        counting[:, -1] = True
        positions = None if rows.positions is None else rows.positions.repeat_interleave(2, dim=0)
        return Rows(tokens, counting, positions)

    def embed(self, hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Of hidden states [rows, length, width] one vector a row, of length 1: fp32 [rows, width]."""
        import torch.nn.functional as F

        assert rows.counting is not None, "records of this objective have a position that counts"
        here = rows.counting
        if self.settings.pooling == "mean":
            # All tokens up to the last.
            here = here.flip(1).cumsum(1).flip(1) > 0
        weights = here.float()[..., None]
        pooled = (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return F.normalize(pooled, dim=-1)

    def _cosines(self, hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
        vectors = self.embed(hidden, rows)
        return vectors[0::2] @ vectors[1::2].T

    def loss(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        """See `Objective`; `logits` are hidden states."""
        import torch.nn.functional as F

        scores, labels = self._cosines(logits, rows) / self.settings.temperature, self.labels(rows)
        both = F.cross_entropy(scores, labels, reduction="sum") + F.cross_entropy(scores.T, labels, reduction="sum")
        return both / 2

    def measure(self, logits: torch.Tensor, rows: Rows) -> Sums:
        """The loss, how often the right one is the nearest, and how near it is."""
        import torch

        cosines, labels = self._cosines(logits, rows), self.labels(rows)
        values = [self.loss(logits, rows), torch.tensor(len(labels)), (cosines.argmax(dim=1) == labels).sum(),
                  cosines.diagonal().sum()]  # fmt: skip
        return {"loss": torch.stack([each.double().to(cosines.device) for each in values])}

    def report(self, sums: Mapping[str, list[float]]) -> dict[str, Any]:
        """`loss`, `accuracy` among the pairs of a micro-batch, mean `similarity` of pairs."""
        total, count, right, near = sums["loss"]
        count = count or 1.0
        return {"loss": total / count, "accuracy": right / count, "similarity": near / count}


EMBEDDING = Embedding()
