"""Objectives of pairs of answers, of which one was preferred: the log-probability of each answer, and what is made of
two of them.

DPO: Rafailov et al. 2023; IPO: Azar et al. 2023; robust DPO: Chowdhury et al. 2024; ORPO: Hong et al. 2024; reward
models: Bradley and Terry 1952, Ouyang et al. 2022. The formulas and their names are those of TRL.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from strategies.objective.objective import Objective, Sums
from strategies.objective.rows import IGNORED, Rows

if TYPE_CHECKING:
    import torch

    from strategies.objective.batch import Batch


def answer_log_probabilities(logits: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every row the sum over its targets that count of their log-probabilities, and how many they are: fp32 [rows]
    each. `logits` [rows, length, vocabulary]."""
    import torch
    import torch.nn.functional as F

    targets = rows.next_tokens()
    # Row by row, so that fp32 logits of all are never there at once.
    sums = [
        -F.cross_entropy(row.float(), target, reduction="sum", ignore_index=IGNORED)
        for row, target in zip(logits, targets, strict=True)
    ]
    return torch.stack(sums), (targets != IGNORED).sum(dim=1).float()


class Preference(Objective):
    """Of pairs: a sample is two rows, what was chosen and what was rejected."""

    model_class = "AutoModelForCausalLM"
    shapes = ("preference",)
    sequences = 2

    def labels(self, rows: Rows) -> torch.Tensor:
        """The next token, int64 [rows, length]."""
        return rows.next_tokens()

    def weight(self, batch: Batch) -> float:
        """The pairs of the step."""
        return batch.step_samples

    def invented(self, rows: Rows) -> Rows:
        """Each row as both answers."""
        import torch

        tokens = rows.tokens.repeat_interleave(2, dim=0)
        positions = None if rows.positions is None else rows.positions.repeat_interleave(2, dim=0)
        reference = torch.zeros(len(tokens), device=tokens.device)
        return Rows(tokens, torch.ones_like(tokens[:, 1:], dtype=torch.bool), positions, None, reference)


@dataclass(frozen=True)
class DpoSettings:
    """`beta`: how much being away from the reference costs. `loss`: sigmoid, ipo or robust. `label_smoothing`: the
    probability that a preference is wrong (sigmoid, robust). `reference`: the directory, or the run (`RUN` or
    `RUN@STEP`), of the model that it is compared with; "": the model as it is before training. `content` is a digest of
    the reference's files, filled in when a run begins."""

    beta: float = 0.1
    loss: str = "sigmoid"
    label_smoothing: float = 0.0
    reference: str = ""
    content: str | None = None

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta must be more than 0, got {self.beta}")
        if self.loss not in ("sigmoid", "ipo", "robust"):
            raise ValueError(f"loss must be sigmoid, ipo or robust, got {self.loss!r}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be at least 0 and less than 0.5, got {self.label_smoothing}")
        if self.label_smoothing and self.loss == "ipo":
            raise ValueError("label_smoothing does not go with loss: ipo")


class Dpo(Preference):
    """Direct preference optimization: by how much more the model prefers an answer than its reference does, which is
    the model as it was before training, or another."""

    name = "dpo"
    loss_unit = "nats per pair"
    needs_reference = True
    another = "reference"
    Settings = DpoSettings

    def reference(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The log-probability of each answer; for ipo of its average token, as TRL has it."""
        return self._scores(logits, rows)

    def _scores(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        sums, counts = answer_log_probabilities(logits, rows)
        return sums / counts.clamp(min=1) if self.settings.loss == "ipo" else sums

    def _margins(self, logits: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """By how much more likely than to the reference each chosen and each rejected answer is: [pairs] each."""
        assert rows.reference is not None, "what the reference gives is known before training begins"
        gained = self._scores(logits, rows) - rows.reference
        return gained[0::2], gained[1::2]

    def pair_losses(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """Of what chosen and rejected answers have gained, [pairs] each, the loss of each pair."""
        import torch.nn.functional as F

        beta: float = self.settings.beta
        smoothing: float = self.settings.label_smoothing
        delta = chosen - rejected
        right, wrong = -F.logsigmoid(beta * delta), -F.logsigmoid(-beta * delta)
        match self.settings.loss:
            case "sigmoid":
                return right * (1 - smoothing) + wrong * smoothing
            case "robust":
                return (right * (1 - smoothing) - wrong * smoothing) / (1 - 2 * smoothing)
        found: torch.Tensor = (delta - 1 / (2 * beta)) ** 2
        return found

    def loss(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        """See `Objective`."""
        return self.pair_losses(*self._margins(logits, rows)).sum()

    def measure(self, logits: torch.Tensor, rows: Rows) -> Sums:
        """The loss, and the rewards of both answers."""
        import torch

        chosen, rejected = self._margins(logits, rows)
        losses = self.pair_losses(chosen, rejected)
        beta = self.settings.beta
        values = [losses.sum(), torch.tensor(len(losses)), (chosen > rejected).sum(), beta * chosen.sum(),
                  beta * rejected.sum()]  # fmt: skip
        return {"loss": torch.stack([each.double().to(losses.device) for each in values])}

    def report(self, sums: Mapping[str, list[float]]) -> dict[str, Any]:
        """`loss`, `accuracy` (how often the chosen answer has the larger reward), mean rewards and their `margin`."""
        total, count, right, chosen, rejected = sums["loss"]
        count = count or 1.0
        return {
            "loss": total / count, "accuracy": right / count, "reward_chosen": chosen / count,
            "reward_rejected": rejected / count, "margin": (chosen - rejected) / count,
        }  # fmt: skip


@dataclass(frozen=True)
class OrpoSettings:
    """`beta`: what the odds ratio's loss is multiplied by, beside the language modelling loss of chosen answers."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"beta must be at least 0, got {self.beta}")


class Orpo(Preference):
    """Odds ratio preference optimization: the loss of chosen answers, a mean over the tokens of each, and how much
    likelier they are than rejected ones. It has no reference."""

    name = "orpo"
    loss_unit = "nats per pair"
    Settings = OrpoSettings

    def pair_losses(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """The odds ratio's, of average log-probabilities [pairs] of answers."""
        import torch
        import torch.nn.functional as F

        odds = (chosen - rejected) - (_log1m_exp(chosen) - _log1m_exp(rejected))
        return -self.settings.beta * F.logsigmoid(odds) if self.settings.beta else torch.zeros_like(odds)

    def _averages(self, logits: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        sums, counts = answer_log_probabilities(logits, rows)
        means = sums / counts.clamp(min=1)
        return means[0::2], means[1::2]

    def loss(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        """See `Objective`."""
        chosen, rejected = self._averages(logits, rows)
        return (self.pair_losses(chosen, rejected) - chosen).sum()

    def measure(self, logits: torch.Tensor, rows: Rows) -> Sums:
        """The loss, and its two parts."""
        import torch

        chosen, rejected = self._averages(logits, rows)
        odds = self.pair_losses(chosen, rejected)
        values = [(odds - chosen).sum(), torch.tensor(len(odds)), (chosen > rejected).sum(), -chosen.sum(), odds.sum()]
        return {"loss": torch.stack([each.double().to(odds.device) for each in values])}

    def report(self, sums: Mapping[str, list[float]]) -> dict[str, Any]:
        """`loss`, `accuracy` (how often the chosen answer is the likelier), and the two parts of the loss."""
        total, count, right, nll, odds = sums["loss"]
        count = count or 1.0
        return {"loss": total / count, "accuracy": right / count, "nll_chosen": nll / count, "odds_loss": odds / count}


def _log1m_exp(values: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(values)) of log-probabilities below 0, precisely near 0 and far from it (Maechler 2012)."""
    import torch

    below = values.clamp(max=-1e-7)
    near = below > -math.log(2.0)
    # Each branch of what `where` leaves out must be finite, or its gradient is not.
    close = torch.log(-torch.expm1(torch.where(near, below, torch.full_like(below, -0.5))))
    far = torch.log1p(-torch.exp(torch.where(near, torch.full_like(below, -1.0), below)))
    return torch.where(near, close, far)


@dataclass(frozen=True)
class RewardSettings:
    """`center`: what the square of the sum of both rewards is multiplied by, which keeps them around 0 (Eisenstein et
    al. 2023)."""

    center: float = 0.0

    def __post_init__(self) -> None:
        if self.center < 0:
            raise ValueError(f"center must be at least 0, got {self.center}")


class Reward(Preference):
    """A reward model: a number for each answer, read off after its last token, larger for the chosen one."""

    name = "reward"
    loss_unit = "nats per pair"
    model_class = "AutoModelForSequenceClassification"
    counts = "last"
    Settings = RewardSettings

    @property
    def num_outputs(self) -> int:
        """See `Objective`."""
        return 1

    def invented(self, rows: Rows) -> Rows:
        """See `Objective`."""
        import torch

        found = super().invented(rows)
        counting = torch.zeros_like(found.tokens[:, 1:], dtype=torch.bool)
        counting[:, -1] = True
        return found._replace(counting=counting)

    def _rewards(self, logits: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        assert rows.counting is not None, "records of this objective have a position that counts"
        # One position of each row: the sum over it is what it has there.
        rewards = logits.float()[..., 0].masked_fill(~rows.counting, 0.0).sum(dim=1)
        return rewards[0::2], rewards[1::2]

    def pair_losses(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        """Of the rewards [pairs] of answers."""
        import torch.nn.functional as F

        center: float = self.settings.center
        found: torch.Tensor = -F.logsigmoid(chosen - rejected) + center * (chosen + rejected) ** 2
        return found

    def loss(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        """See `Objective`."""
        return self.pair_losses(*self._rewards(logits, rows)).sum()

    def measure(self, logits: torch.Tensor, rows: Rows) -> Sums:
        """The loss, how often the chosen answer has more, and by how much."""
        import torch

        chosen, rejected = self._rewards(logits, rows)
        losses = self.pair_losses(chosen, rejected)
        values = [losses.sum(), torch.tensor(len(losses)), (chosen > rejected).sum(), (chosen - rejected).sum()]
        return {"loss": torch.stack([each.double().to(losses.device) for each in values])}

    def report(self, sums: Mapping[str, list[float]]) -> dict[str, Any]:
        """`loss`, `accuracy`, `margin`."""
        total, count, right, margin = sums["loss"]
        count = count or 1.0
        return {"loss": total / count, "accuracy": right / count, "margin": margin / count}


DPO, ORPO, REWARD = Dpo(), Orpo(), Reward()
