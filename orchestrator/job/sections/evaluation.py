"""`evaluation`: what weights are judged by while they are trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from orchestrator.job.directions import direction_of
from orchestrator.job.fields import (
    CIRCUMSTANCES,
    NUMBERS,
    NUMBERS_LATER,
    CountFloat,
    FactoryPath,
    PositiveInt,
    Section,
    Text,
)
from orchestrator.job.rules import OWN_WORDS
from orchestrator.job.sections.data import Format, Source


class EvaluationData(Section):
    """What is read; the rest (tokenizer, lengths, packing) is as in `data`, and so is what is not given here."""

    source: Annotated[Source, NUMBERS]
    format: Annotated[Format | None, NUMBERS] = None
    field: Annotated[Text | None, NUMBERS] = None
    include: Annotated[list[Text] | None, NUMBERS] = None
    fields: Annotated[dict[str, Text] | None, NUMBERS] = None


class Best(Section):
    """Which weights are kept beside the newest: a checkpoint is made of them."""

    metric: Annotated[Text, NUMBERS] = "loss"
    mode: Annotated[Literal["min", "max"], NUMBERS] = "min"
    """Filled in for metrics whose names say it; to be said of others."""

    @model_validator(mode="before")
    @classmethod
    def _direction(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "mode" in given or not isinstance(given.get("metric"), str):
            return given
        mode = direction_of(given["metric"])
        if mode is None:
            reason = f"must say mode: min or max, as it is not known which of the metric {given['metric']} is better"
            raise PydanticCustomError(OWN_WORDS, "{reason}", {"reason": reason})
        return given | {"mode": mode}


class EarlyStop(Section):
    """When a run ends before its last step, by the metric of `best`, or else by the loss."""

    patience: Annotated[PositiveInt, NUMBERS]
    """After this many evaluations in a row without a better value."""
    threshold: Annotated[CountFloat, NUMBERS] = 0.0
    """What is better by no more than this does not count."""


class Generate(Section):
    """What the model says to some prompts, for people to look at."""

    prompts: Annotated[list[Text], Field(min_length=1), CIRCUMSTANCES]
    chat: Annotated[bool, CIRCUMSTANCES] = False
    """Whether each is what a user says, in the chat template, and not a text to go on with."""
    max_new_tokens: Annotated[PositiveInt, CIRCUMSTANCES] = 32
    temperature: Annotated[CountFloat, CIRCUMSTANCES] = 0.0
    """0: the likeliest token, always."""


class Evaluation(Section):
    """One of `share` and `data`, or with `tasks` neither."""

    share: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, NUMBERS] = None
    """Of the documents or records of `data`, which are then not trained on: told by a digest of what is in them, so
    that one never changes sides."""
    data: Annotated[EvaluationData | None, NUMBERS] = None
    every_steps: Annotated[PositiveInt, NUMBERS] = 50
    """Also after the last."""
    at_start: Annotated[bool, NUMBERS] = False
    """Also before the first."""
    samples: Annotated[PositiveInt | None, NUMBERS] = None
    """No more than this many, always the same. None: all."""
    metrics: Annotated[list[FactoryPath], NUMBERS] = Field(default_factory=list)
    """`package.module:Class` of metrics of a user's own (`strategies.objective.metric.Metric`)."""
    tasks: Annotated[list[Text], NUMBERS_LATER] = Field(default_factory=list)
    """Of lm-eval, by name or by YAML file."""
    task_samples: Annotated[PositiveInt | None, NUMBERS_LATER] = None
    """No more than this many documents of each task. None: all."""
    generate: Annotated[Generate | None, CIRCUMSTANCES] = None
    best: Annotated[Best | None, NUMBERS] = None
    early_stop: Annotated[EarlyStop | None, NUMBERS] = None

    @property
    def holds_out(self) -> bool:
        """Whether there are samples to evaluate on."""
        return self.share is not None or self.data is not None
