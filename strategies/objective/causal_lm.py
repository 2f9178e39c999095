"""Causal language modelling: every token is predicted from those before it in its document."""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.objective.objective import TokenObjective
from strategies.objective.rows import IGNORED, Rows

if TYPE_CHECKING:
    import torch

    from strategies.objective.batch import Batch


class CausalLm(TokenObjective):
    """Cross-entropy over the vocabulary, the mean over all targets of a step that count."""

    name = "causal-lm"
    loss_unit = "nats per token"
    model_class = "AutoModelForCausalLM"
    takes_split_logits = True

    def labels(self, rows: Rows) -> torch.Tensor:
        """The next token, int64 [batch, length]."""
        labels = rows.tokens[:, 1:]
        return labels if rows.counting is None else labels.masked_fill(~rows.counting, IGNORED)

    def token_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See `TokenObjective`."""
        from strategies.objective.cross_entropy import cross_entropy

        return cross_entropy(logits, labels)

    def weight(self, batch: Batch) -> int:
        """The targets that count."""
        return batch.targets


CAUSAL_LM = CausalLm()
