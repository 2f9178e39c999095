"""Supervised fine-tuning: language modelling of which only answers count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from strategies.objective.causal_lm import CausalLm, CausalLmSettings


@dataclass(frozen=True)
class SftSettings(CausalLmSettings):
    """`loss_on`: what counts: all that the assistant said, the completion (the last answer), or all. None: of messages
    what the assistant said, of a prompt and its completion the completion, of text all."""

    loss_on: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_on not in (None, "assistant", "completion", "all"):
            raise ValueError(f"loss_on must be assistant, completion or all, got {self.loss_on!r}")


class Sft(CausalLm):
    """The loss is a sum over the tokens that count, over their number in the whole step: not a mean of means."""

    name = "sft"
    shapes = ("messages", "prompt-completion", "tokens", "text")
    Settings = SftSettings

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.counts = self.settings.loss_on or "auto"


SFT = Sft()
