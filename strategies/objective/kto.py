"""Answers that were liked or not, one at a time (Ethayarajh et al. 2024, KTO; the loss is the one that TRL calls
`apo_zero_unpaired`, D'Oosterlinck et al. 2024, which takes the reference point to be 0).

KTO's own estimate of that point takes answers to other prompts, so that a sample's loss would depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from strategies.objective.objective import Labels, Objective, Sums
from strategies.objective.preference import answer_log_probabilities
from strategies.objective.rows import Rows

if TYPE_CHECKING:
    import torch

    from strategies.objective.batch import Batch


@dataclass(frozen=True)
class KtoSettings:
    """`beta`: how much being away from the reference costs; and what the losses of liked and of other answers are
    multiplied by."""

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta must be more than 0, got {self.beta}")
        if min(self.desirable_weight, self.undesirable_weight) < 0:
            raise ValueError("desirable_weight and undesirable_weight must be at least 0")


class Kto(Objective):
    """A liked answer is to become likelier than it was to the reference, another less likely."""

    name = "kto"
    loss_unit = "loss per answer"
    model_class = "AutoModelForCausalLM"
    shapes = ("unpaired",)
    needs_reference = True
    Settings = KtoSettings

    @property
    def labels_of_records(self) -> Labels:
        """See `Objective`."""
        return Labels("boolean")

    def labels(self, rows: Rows) -> torch.Tensor:
        """The next token, int64 [rows, length]."""
        return rows.next_tokens()

    def weight(self, batch: Batch) -> float:
        """The answers of the step."""
        return batch.step_samples

    def invented(self, rows: Rows) -> Rows:
        """See `Objective`."""
        import torch

        size, device = len(rows.tokens), rows.tokens.device
        return rows._replace(
            counting=torch.ones_like(rows.tokens[:, 1:], dtype=torch.bool),
            labels=torch.ones(size, dtype=torch.int64, device=device), reference=torch.zeros(size, device=device),
        )  # fmt: skip

    def reference(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The log-probability of each answer."""
        return answer_log_probabilities(logits, rows)[0]

    def _gained(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        assert rows.reference is not None, "what the reference gives is known before training begins"
        return answer_log_probabilities(logits, rows)[0] - rows.reference

    def answer_losses(self, gained: torch.Tensor, liked: torch.Tensor) -> torch.Tensor:
        """Of what answers have gained, fp32 [rows], and whether they are liked, bool [rows]."""
        import torch

        settings = self.settings
        probability = torch.sigmoid(settings.beta * gained)
        return torch.where(
            liked, settings.desirable_weight * (1 - probability), settings.undesirable_weight * probability
        )

    def loss(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        """See `Objective`."""
        assert rows.labels is not None, "records of this objective have labels"
        return self.answer_losses(self._gained(logits, rows), rows.labels.bool()).sum()

    def measure(self, logits: torch.Tensor, rows: Rows) -> Sums:
        """The loss, and the rewards of liked and of other answers."""
        import torch

        assert rows.labels is not None, "records of this objective have labels"
        gained, liked = self._gained(logits, rows), rows.labels.bool()
        rewards = self.settings.beta * gained
        values = [
            self.answer_losses(gained, liked).sum(), torch.tensor(len(gained)), liked.sum(),
            rewards.masked_fill(~liked, 0.0).sum(), rewards.masked_fill(liked, 0.0).sum(),
        ]  # fmt: skip
        return {"loss": torch.stack([each.double().to(gained.device) for each in values])}

    def report(self, sums: Mapping[str, list[float]]) -> dict[str, Any]:
        """`loss`, and the mean rewards of liked (desirable) and of other answers; None where there are none."""
        total, count, liked, rewards, others = sums["loss"]
        return {
            "loss": total / count if count else 0.0,
            "reward_desirable": rewards / liked if liked else None,
            "reward_undesirable": others / (count - liked) if count > liked else None,
        }


KTO = Kto()
