"""`strategy`: how one step is spread over ranks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, Tag
from pydantic_core import PydanticCustomError

from orchestrator.job.fields import (
    CIRCUMSTANCES,
    NUMBERS,
    NUMBERS_LATER,
    CountInt,
    Decay,
    PositiveFloat,
    PositiveInt,
    Section,
    named,
    one_of,
)
from orchestrator.job.rules import OWN_WORDS
from strategies.update.rule import RULES


class CompressedWire(Section):
    """A wire format with a setting. Exactly one of them."""

    top_k: Annotated[float | None, Field(gt=0, le=0.5), NUMBERS] = None
    """The share of elements that is sent: the largest."""
    power_sgd: Annotated[PositiveInt | None, NUMBERS] = None
    """The rank of the two matrices that are sent in place of one."""


class OuterOptimizer(Section):
    """What takes what replicas have come to: SGD."""

    lr: Annotated[PositiveFloat, NUMBERS] = 0.7
    momentum: Annotated[Decay, NUMBERS] = 0.9
    nesterov: Annotated[bool, NUMBERS] = True


class LocalUpdate(Section):
    """Virtual replicas train by themselves, and exchange what they have come to after `inner_steps` steps."""

    rule: Annotated[Literal["local"], NUMBERS]
    replicas: Annotated[PositiveInt, NUMBERS]
    """Of the virtual workers each has an equal number, that follow one another."""
    inner_steps: Annotated[PositiveInt, NUMBERS]
    warmup_steps: Annotated[CountInt | None, NUMBERS] = None
    """The first steps, which are synchronous. None: half of all."""
    outer: Annotated[OuterOptimizer, NUMBERS] = Field(default_factory=OuterOptimizer)
    fragments: Annotated[PositiveInt, NUMBERS] = 1
    """In how many parts the model is exchanged, one after the other."""
    overlap_steps: Annotated[CountInt, NUMBERS] = 0
    """The steps beside which an exchange goes on."""
    mix: Annotated[float | None, Field(ge=0, lt=1), NUMBERS] = None
    """How much of its own weights a replica keeps in an exchange. None: nothing, or with an overlap half."""
    wire: Annotated[Literal["fp32", "bf16", "int8", "int4"], NUMBERS] = "fp32"
    """How it is sent."""


def _needs_settings(value: str) -> str:
    if value == "local":
        reason = "needs its settings, as in {rule: local, replicas: 4, inner_steps: 20}"
        raise PydanticCustomError(OWN_WORDS, "{reason}", {"reason": reason})
    return value


class Strategy(Section):
    """How one step is spread over ranks. What tensor and pipeline leave over is data parallel."""

    tensor: Annotated[PositiveInt, NUMBERS] = 1
    pipeline: Annotated[PositiveInt, CIRCUMSTANCES] = 1
    shard: Annotated[Literal["none", "optimizer", "gradients", "parameters"], CIRCUMSTANCES] = "none"
    schedule: Annotated[Literal["1f1b", "gpipe", "interleaved-1f1b", "zero-bubble"], CIRCUMSTANCES] = "1f1b"
    """The order in which a pipeline computes micro-batches; with one stage there is none to choose."""
    reduction: Annotated[Literal["canonical", "native"], NUMBERS] = "canonical"
    """canonical: the same bits for any number of workers. native: the backend's own collectives."""
    transport: Annotated[Literal["auto", "nccl", "gloo"], CIRCUMSTANCES] = "auto"
    """What carries tensors between GPUs. auto: NCCL. gloo: over the memory of the hosts, by which workers may share a
    GPU. Between CPUs it is gloo in any case. The bits are the same."""
    update: Annotated[
        Annotated[str, named("update_rules", RULES), BeforeValidator(_needs_settings), Tag("str")]
        | Annotated[LocalUpdate, Tag("dict")],
        one_of("str", "dict", reason="must be the name of an update rule, or a mapping with rule: local"),
        NUMBERS,
    ] = "synchronous"
    """When gradients become weights. Other packages may bring more (docs/contributing.md)."""

    wire: Annotated[
        Annotated[Literal["fp32", "bf16", "int8", "int4"], Tag("str")] | Annotated[CompressedWire, Tag("dict")],
        one_of("str", "dict", reason="must be fp32, bf16, int8, int4, or a mapping with top_k or power_sgd"),
        NUMBERS_LATER,
    ] = "fp32"
    """How sums of gradients are sent. They are rounded at nodes of the summation tree, so that the bits are the same
    for any number of workers."""
    wire_across: Annotated[PositiveInt, NUMBERS_LATER] = 1
    """Sums of fewer virtual workers are sent as they are: let those of one node have as many."""
    wire_feedback: Annotated[bool | None, NUMBERS_LATER] = None
    """Whether what is rounded off is added in the next step. None: where formats lose much (int4, top_k, power_sgd)."""

    @property
    def keeps_model_whole(self) -> bool:
        """Whether every rank of every layout has all the model's weights."""
        return self.tensor == self.pipeline == 1 and self.shard != "parameters"
