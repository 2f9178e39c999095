"""Distillation: a model learns from what another one, its teacher, gives for the same tokens (Hinton et al. 2015;
generalised Jensen-Shannon divergence: Agarwal et al. 2023, GKD, as TRL has it)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from strategies.objective.causal_lm import CausalLm, CausalLmSettings
from strategies.objective.rows import Rows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DistillSettings(CausalLmSettings):
    """`teacher`: the directory of a causal language model with the same tokenizer. `beta`: 0 is the forward
    Kullback-Leibler divergence (of the student from the teacher), 1 the reverse one, between them a mixture of both.
    `temperature`: what both's logits are divided by. `alpha`: the share of the usual loss, by labels."""

    teacher: str = ""
    beta: float = 0.0
    temperature: float = 1.0
    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher:
            raise ValueError("teacher must name the directory of a model")
        if not (0 <= self.beta <= 1 and 0 <= self.alpha <= 1):
            raise ValueError(f"beta and alpha must be from 0 to 1, got {self.beta} and {self.alpha}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be more than 0, got {self.temperature}")


def divergence(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """Of log-probabilities [positions, vocabulary], the generalised Jensen-Shannon divergence of each: fp32
    [positions]."""
    import math

    import torch
    import torch.nn.functional as F

    def kl(of: torch.Tensor, from_: torch.Tensor) -> torch.Tensor:
        """Of log-probabilities: how far `of` is from `from_`."""
        return F.kl_div(from_, of, reduction="none", log_target=True).sum(dim=-1)

    if beta == 0:
        return kl(teacher, student)
    if beta == 1:
        return kl(student, teacher)
    mixture = torch.logsumexp(torch.stack([student + math.log1p(-beta), teacher + math.log(beta)]), dim=0)
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


class Distill(CausalLm):
    """The mean over the tokens of a step of both losses, each with its share."""

    name = "distill"
    needs_teacher = True
    by_token = False
    Settings = DistillSettings

    def __init__(self, settings: Any = None, teacher: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        """`teacher` gives logits [rows, length, vocabulary] of token ids [rows, length], without gradients."""
        self.settings = DistillSettings(teacher="none") if settings is None else settings
        self._teacher = teacher
        self.takes_split_logits = False

    def with_teacher(self, teacher: Callable[[torch.Tensor], torch.Tensor]) -> Distill:
        """The same, with that."""
        return Distill(self.settings, teacher)

    def loss(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        """See `Objective`. It needs the teacher's logits of all positions, so it is not computed in chunks."""
        import torch.nn.functional as F

        settings = self.settings
        usual = super().loss(logits, rows)
        if self._teacher is None or settings.alpha == 1:
            return usual
        given = self._teacher(rows.tokens[:, :-1])
        student = F.log_softmax(logits.float() / settings.temperature, dim=-1).flatten(0, 1)
        teacher = F.log_softmax(given[..., : logits.shape[-1]].float() / settings.temperature, dim=-1).flatten(0, 1)
        each = divergence(student, teacher, settings.beta)
        if rows.counting is not None:
            each = each.masked_fill(~rows.counting.flatten(), 0.0)
        found: torch.Tensor = settings.alpha * usual + (1 - settings.alpha) * each.sum()
        return found


DISTILL = Distill()
