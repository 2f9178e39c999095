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


Teacher = Callable[["torch.Tensor", "torch.Tensor | None"], "torch.Tensor"]


@dataclass(frozen=True)
class DistillSettings(CausalLmSettings):
    """`teacher`: the directory, or the run (`RUN` or `RUN@STEP`), of a causal language model with the same tokenizer.
    `beta`: 0 is the forward Kullback-Leibler divergence (of the student from the teacher), 1 the reverse one, between
    them a mixture of both. `temperature`: what both's logits are divided by. `alpha`: the share of the usual loss, by
    labels. `top_k`: how many of the teacher's likeliest tokens stand for its whole distribution (0: all of them), which
    goes with beta 0. `content` is a digest of the teacher's files, filled in when a run begins."""

    teacher: str = ""
    beta: float = 0.0
    temperature: float = 1.0
    alpha: float = 0.5
    top_k: int = 0
    content: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher:
            raise ValueError("teacher must name the directory of a model")
        if not (0 <= self.beta <= 1 and 0 <= self.alpha <= 1):
            raise ValueError(f"beta and alpha must be from 0 to 1, got {self.beta} and {self.alpha}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be more than 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if self.top_k and self.beta:
            raise ValueError(
                f"top_k knows the teacher's likeliest tokens only, and beta = {self.beta:g} compares all that the "
                "student gives; use beta: 0, or top_k: 0"
            )


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
    another = "teacher"
    by_token = False
    Settings = DistillSettings

    def __init__(self, settings: Any = None, teacher: Teacher | None = None) -> None:
        """`teacher` gives logits [rows, length, vocabulary] of token ids [rows, length] and where these are in their
        documents (None: not told apart), without gradients."""
        self.settings = DistillSettings(teacher="none") if settings is None else settings
        self._teacher = teacher
        self.takes_split_logits = False

    def with_teacher(self, teacher: Teacher) -> Distill:
        """The same, with that."""
        return Distill(self.settings, teacher)

    def loss(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        """See `Objective`. It needs the teacher's logits of all positions, so it is not computed in chunks."""
        import torch.nn.functional as F

        settings = self.settings
        usual = super().loss(logits, rows)
        if settings.alpha == 1 or (self._teacher is None and rows.taught is None):
            return usual
        student = F.log_softmax(logits.float() / settings.temperature, dim=-1).flatten(0, 1)
        if rows.taught is not None:
            each = _from_the_likeliest(student, rows.taught, settings.temperature)
        else:
            assert self._teacher is not None
            given = self._teacher(rows.tokens[:, :-1], rows.positions)
            teacher = F.log_softmax(given[..., : logits.shape[-1]].float() / settings.temperature, dim=-1)
            each = divergence(student, teacher.flatten(0, 1), settings.beta)
        if rows.counting is not None:
            each = each.masked_fill(~rows.counting.flatten(), 0.0)
        found: torch.Tensor = settings.alpha * usual + (1 - settings.alpha) * each.sum()
        return found


def _from_the_likeliest(
    student: torch.Tensor, taught: tuple[torch.Tensor, torch.Tensor], temperature: float
) -> torch.Tensor:
    """The divergence of `student`, log-probabilities [positions, vocabulary], from a teacher whose likeliest tokens are
    all that it knows: their logits and ids, [rows, length, k] each. Tokens that the student has not are left out; a
    position where it has none of them teaches nothing."""
    import torch
    import torch.nn.functional as F

    logits, ids = (each.flatten(0, 1) for each in taught)
    is_known = ids < student.shape[-1]
    given = F.log_softmax((logits / temperature).masked_fill(~is_known, -torch.inf), dim=-1)
    given = given.masked_fill(~is_known.any(dim=-1, keepdim=True), -torch.inf)
    own = student.gather(1, ids.long().clamp(max=student.shape[-1] - 1))
    # A probability of 0 adds nothing.
    found: torch.Tensor = (given.exp() * (given - own).masked_fill(~is_known, 0.0)).sum(dim=-1)
    return found


DISTILL = Distill()
