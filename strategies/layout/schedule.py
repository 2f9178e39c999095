"""Pipeline schedules: what each asks for, what it keeps in memory and how long ranks wait in it.

Sources: GPipe (Huang et al. 2019), 1F1B (Narayanan et al. 2019, PipeDream; 2021, "Efficient Large-Scale Language Model
Training on GPU Clusters Using Megatron-LM", which also has the interleaved form), zero bubble (Qi et al. 2024, "Zero
Bubble Pipeline Parallelism", section 6, ZB-V). The rules about counts are those of torch.distributed.pipelining.

Plain integers: no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

SCHEDULES = ("1f1b", "gpipe", "interleaved-1f1b", "zero-bubble")
"""In which order a pipeline computes its micro-batches; see docs/layouts.md for their sources."""


def parts_of(schedule: str, stages: int, num_parts: int, stage: int) -> tuple[int, ...]:
    """The model parts on the ranks of a stage: in turn, or for zero bubble (ZB-V) down and up again."""
    if schedule == "zero-bubble" and stages > 1:
        return (stage, num_parts - 1 - stage)
    return tuple(range(stage, num_parts, stages))


LOSS_WAITS = ("gpipe", "zero-bubble")
"""Those in which the backward pass of a micro-batch, or a half of it, does not come next after its loss."""
NO_PIPELINE = "none"


def chunks_of(kind: str) -> int:
    """Model parts on each rank when a pipeline is run by this schedule."""
    return 2 if kind in ("interleaved-1f1b", "zero-bubble") else 1


@dataclass(frozen=True)
class PipelineSchedule:
    """A schedule of `stages` ranks in a row with `chunks` model parts on each."""

    kind: str
    stages: int
    chunks: int = 1

    @property
    def parts(self) -> int:
        """How many parts the model is cut into."""
        return self.stages * self.chunks

    def parts_of(self, rank: int) -> tuple[int, ...]:
        """The model parts on the rank at this place in the pipeline."""
        return parts_of(self.kind, self.stages, self.parts, rank)

    @property
    def ends_meet(self) -> bool:
        """Whether the first and the last part of the model are on one rank."""
        return self.stages == 1 or self.kind == "zero-bubble"

    def refuses(self, micro_batches: int) -> str | None:
        """Why a replica with this many micro-batches cannot follow this schedule, or None."""
        p = self.stages
        if micro_batches < p:
            return f"a replica has {micro_batches} micro-batches, fewer than the {p} stages of the pipeline"
        if self.kind == "interleaved-1f1b" and micro_batches % (micro_batches // p):
            rounds = micro_batches // p
            return f"a replica's {micro_batches} micro-batches do not divide into the {rounds} rounds of {p} stages"
        if self.kind == "zero-bubble" and micro_batches < 2 * p - 1:
            return f"a replica has {micro_batches} micro-batches; zero bubble over {p} stages needs {2 * p - 1}"
        return None

    def padded(self, micro_batches: int) -> int:
        """The micro-batches a replica goes through: its own, and empty ones until the schedule can be followed."""
        while self.refuses(micro_batches):
            micro_batches += 1
        return micro_batches

    def in_flight(self, rank: int, part: int, micro_batches: int) -> int:
        """For how many micro-batches at once this rank keeps the activations of this part of it.

        GPipe keeps all. 1F1B keeps one for each stage from here to the end. Interleaved 1F1B keeps its warm-up of
        2 (p - rank - 1) + (chunks - 1) p + 1 parts (Megatron-LM), the earlier parts first. ZB-V keeps p whole
        micro-batches on every rank, as the first rank of 1F1B does.
        """
        p = self.stages
        if self.kind == "gpipe":
            return micro_batches
        if self.kind == "1f1b":
            return min(micro_batches, p - rank)
        if self.kind == "zero-bubble":
            return min(micro_batches, p)
        if self.kind == "interleaved-1f1b":
            warm_up = 2 * (p - rank - 1) + (self.chunks - 1) * p + 1
            # In turn p micro-batches of each chunk: whole turns, and this chunk's share of the one begun.
            turns, begun = divmod(warm_up, p * self.chunks)
            return min(micro_batches, turns * p + max(0, min(p, begun - part // p * p)))
        return 1

    def bubble(self, rest: float, attention: float) -> float:
        """Waiting on the slowest rank, in the unit of its arguments.

        `rest`: forward and backward of one micro-batch on all other ranks together. 1F1B and GPipe wait for all of
        it once, (p-1)(F+B) with equal stages; interleaving divides it by the chunks. ZB-V leaves
        (p-1)(F + B - 2W), where the backward of the inputs B and of the weights W are scheduled apart. A matrix
        product has F = B = W; attention has B = 2F and no W, so what is left is 3 x `attention`, the other ranks'
        forward attention of one micro-batch.
        """
        if self.kind == "zero-bubble":
            return 3 * attention
        return rest / self.chunks


@cache
def schedules(stages: int) -> tuple[PipelineSchedule, ...]:
    """All schedules over this many stages; for one stage there is nothing to schedule."""
    if stages == 1:
        return (PipelineSchedule(NO_PIPELINE, 1),)
    return (
        PipelineSchedule("1f1b", stages),
        PipelineSchedule("gpipe", stages),
        PipelineSchedule("interleaved-1f1b", stages, 2),
        PipelineSchedule("zero-bubble", stages, 2),
    )
