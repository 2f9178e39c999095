"""Causal language modelling: every token is predicted from those before it in its document."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from strategies.objective.objective import Sums, TokenObjective
from strategies.objective.rows import IGNORED, Rows

if TYPE_CHECKING:
    import torch

    from strategies.objective.batch import Batch


@dataclass(frozen=True)
class CausalLmSettings:
    """`label_smoothing`: the share of a target's probability that is spread over the vocabulary (Szegedy et al. 2016).
    `z_loss`: what the square of the logarithm of the sum of all exponentials is multiplied by, beside the loss
    (Chowdhery et al. 2022, PaLM, section 5)."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and less than 1, got {self.label_smoothing}")
        if self.z_loss < 0:
            raise ValueError(f"z_loss must be at least 0, got {self.z_loss}")


class CausalLm(TokenObjective):
    """Cross-entropy over the vocabulary, the mean over all targets of a step that count."""

    name = "causal-lm"
    loss_unit = "nats per token"
    model_class = "AutoModelForCausalLM"
    Settings: ClassVar[type] = CausalLmSettings

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.takes_split_logits = not (self.settings.label_smoothing or self.settings.z_loss)

    def labels(self, rows: Rows) -> torch.Tensor:
        """The next token, int64 [rows, length]."""
        return rows.next_tokens()

    def token_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See `TokenObjective`."""
        from strategies.objective.cross_entropy import cross_entropy

        smoothing, z = self.settings.label_smoothing, self.settings.z_loss
        if not (smoothing or z):
            return cross_entropy(logits, labels)
        import torch.nn.functional as F

        values = logits.float()
        loss = F.cross_entropy(values, labels, reduction="sum", ignore_index=IGNORED, label_smoothing=smoothing)
        if z:
            squares = values.logsumexp(dim=-1).square()
            loss = loss + z * squares.masked_fill(labels == IGNORED, 0.0).sum()
        return loss

    def weight(self, batch: Batch) -> float:
        """The targets that count."""
        return batch.targets

    def num_counted(self, rows: Rows) -> int:
        """See `Objective`."""
        return int(rows.tokens[:, 1:].numel() if rows.counting is None else rows.counting.sum())

    def measure_tokens(self, logits: torch.Tensor, labels: torch.Tensor) -> Sums:
        """The plain loss, how many tokens count, and how many of them are the likeliest."""
        import torch

        from strategies.objective.cross_entropy import cross_entropy

        counts = labels != IGNORED
        right = ((logits.argmax(dim=-1) == labels) & counts).sum()
        values = [cross_entropy(logits, labels), counts.sum(), right]
        return {"loss": torch.stack([each.double() for each in values])}

    def report(self, sums: Mapping[str, list[float]]) -> dict[str, Any]:
        """`loss` in nats per token, `perplexity`, `token_accuracy`."""
        total, count, right = sums["loss"][:3]
        if not count:
            return {"loss": 0.0, "perplexity": 1.0, "token_accuracy": 0.0}
        loss = total / count
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "token_accuracy": right / count,
        }


CAUSAL_LM = CausalLm()
