"""`strategy`: how one step is spread over ranks."""

from __future__ import annotations

from typing import Annotated, Literal

from orchestrator.job.fields import CIRCUMSTANCES, NUMBERS, PositiveInt, Section, named
from strategies.update.rule import RULES


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

    @property
    def keeps_model_whole(self) -> bool:
        """Whether every rank of every layout has all the model's weights."""
        return self.tensor == self.pipeline == 1 and self.shard != "parameters"
