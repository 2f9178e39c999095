"""`strategy`: how one step is spread over ranks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from orchestrator.job.fields import CIRCUMSTANCES, NUMBERS, NUMBERS_LATER, PositiveInt, Section, named, one_of
from strategies.update.rule import RULES


class CompressedWire(Section):
    """A wire format with a setting. Exactly one of them."""

    top_k: Annotated[float | None, Field(gt=0, le=0.5), NUMBERS] = None
    """The share of elements that is sent: the largest."""
    power_sgd: Annotated[PositiveInt | None, NUMBERS] = None
    """The rank of the two matrices that are sent in place of one."""


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
    update: Annotated[str, named("update_rules", RULES), NUMBERS] = "synchronous"
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
