"""What a job asks of a layout, and what a layout is: the questions and answers of the planner as values."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING

from orchestrator.job.parts import optimizer_of, update_rule_of, virtual_states_of, wire_of
from orchestrator.models.costs import ModelCosts
from strategies.layout.schedule import PipelineSchedule
from strategies.optim.spec import OptimizerSpec
from strategies.wire.format import WireFormat

if TYPE_CHECKING:
    from orchestrator.job import Job


@dataclass(frozen=True)
class StateBytes:
    """Bytes per parameter of each kind of training state; `optimizer` with what the update rule keeps."""

    weights: float
    gradients: float
    optimizer: float


ADAMW = StateBytes(weights=4.0, gradients=4.0, optimizer=8.0)
"""With that optimizer: weights that are updated, gradients and moments are fp32 in every precision."""


QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.53125}
"""Of a weight, with its part of a scale."""


@dataclass(frozen=True)
class Exchange:
    """What ranks send each other of a step's sums. `share` is what is sent of fp32 (None: as of two matrices of `rank`
    columns), once in `every_steps` steps, beside the computation of `hidden_steps` of these. Virtual things keep
    `kept` values for each parameter, all together, and ranks that train replicas by themselves `apart` bytes."""

    share: float | None = 1.0
    rank: int = 0
    every_steps: int = 1
    hidden_steps: int = 0
    kept: float = 0.0
    apart: float = 0.0

    @classmethod
    def of(cls, job: Job) -> Exchange:
        """The job's; of local steps as it is after the warm-up."""
        wire, update = wire_of(job), job.strategy.update
        kept = sum(state.number * len(state.kinds) for state in virtual_states_of(job))
        if isinstance(update, str):
            return cls(share=wire.share, rank=wire.rank, kept=kept)
        # Weights, moments and a gradient, to train a replica with.
        apart = 8.0 + OptimizerSpec(kind=optimizer_of(job), momentum=job.train.optimizer.momentum).state_bytes
        share = WireFormat(update.wire).share
        return cls(
            share=share, every_steps=update.inner_steps, hidden_steps=update.overlap_steps * update.fragments,
            kept=kept, apart=apart,
        )  # fmt: skip

    def share_of(self, hidden_size: int) -> float:
        """What is sent, of matrices of about that size."""
        return min(1.0, 2 * self.rank / max(1, hidden_size)) if self.share is None else self.share


@dataclass(frozen=True)
class StepSettings:
    """What a job says of a step, whatever its model is. `micro_batches` is per virtual worker, `tokens` per
    micro-batch."""

    virtual_workers: int
    micro_batches: int
    tokens: int = 1024
    state: StateBytes = ADAMW
    state_copies: int = 2
    canonical: bool = True
    offloads: bool = False
    """Whether what only updates need is kept in host memory."""
    frozen_bytes: float | None = None
    """Of a frozen weight of a linear module. None: as of one that is computed with."""
    exchange: Exchange = field(default_factory=Exchange)


@dataclass(frozen=True, kw_only=True)
class Work(StepSettings):
    """One step of a job."""

    model: ModelCosts

    @classmethod
    def of(cls, settings: StepSettings, model: ModelCosts) -> Work:
        """A step with these settings of this model."""
        return cls(model=model, **{each.name: getattr(settings, each.name) for each in fields(StepSettings)})

    @property
    def computed_bytes(self) -> float:
        """Of a weight that is computed with."""
        return min(self.state.weights, self.model.value_bytes)

    @property
    def has_copies(self) -> bool:
        """Whether the weights that are computed with are copies, of a smaller type."""
        return self.computed_bytes < self.state.weights


def work_of(job: Job, model: ModelCosts) -> Work:
    """The job's step of this model."""
    return Work.of(step_settings(job), model)


def step_settings(job: Job) -> StepSettings:
    """The job's step."""
    return StepSettings(
        virtual_workers=job.elastic.virtual_workers,
        micro_batches=job.micro_batches_per_virtual_worker,
        tokens=job.train.micro_batch * job.data.sequence_length,
        state=state_bytes(job),
        state_copies=job.elastic.state_copies,
        canonical=job.strategy.reduction == "canonical",
        offloads=job.train.offload == "optimizer",
        frozen_bytes=None if job.adapter is None else QUANTIZED_BYTES.get(job.adapter.quantize_base),
        exchange=Exchange.of(job),
    )


def state_bytes(job: Job) -> StateBytes:
    """What training keeps of each parameter."""
    asked = job.train.optimizer
    spec = OptimizerSpec(momentum=asked.momentum, kind=optimizer_of(job), state=asked.state)
    kept = 4 * len(update_rule_of(job).kinds())
    return replace(ADAMW, optimizer=float(spec.state_bytes + kept))


@dataclass(frozen=True)
class Degrees:
    """A layout as the planner sees it. Ranks are numbered tensor first, then pipeline, then data."""

    data: int
    tensor: int
    schedule: PipelineSchedule
    shard: str

    @property
    def pipeline(self) -> int:
        return self.schedule.stages

    @property
    def effective_shard(self) -> str:
        """`shard`, or "none" for one replica, which has nobody to shard with."""
        return self.shard if self.data > 1 else "none"

    @property
    def ranks(self) -> int:
        return self.data * self.tensor * self.pipeline


@dataclass(frozen=True)
class Rank:
    """What one place in the pipeline has of the model, per tensor-parallel rank."""

    parameters: int
    """That are trained."""
    frozen: int
    frozen_linear: int
    largest_linear: int
    second_uses: int
    """Elements of an embedding that its head uses too."""
    largest_block: int
    """Parameters of its largest block, which is what is gathered at once when parameters are sharded."""
    flops_per_token: float
    """Forward, backward, and what is computed again."""
    attention_flops_per_token: float
    """Forward."""
    layers: int
    has_embedding: bool
    has_head: bool
    kept_bytes_per_token: tuple[tuple[int, float], ...]
    """For each model part it has: the part's number, and what its forward pass keeps."""
    working_bytes_per_token: float
    """Of the block that needs most while it runs, forward or backward."""
    fixed_working_bytes: float
    """What the head needs while it runs, whatever the number of tokens."""
    fixed_kept_bytes: tuple[tuple[int, float], ...]
    """For each model part it has: the part's number, and what is kept of a micro-batch whatever its tokens."""


@dataclass(frozen=True)
class Stages:
    """A model cut for a schedule: `layers` of each model part in order, and what each pipeline rank has."""

    layers: tuple[int, ...]
    ranks: tuple[Rank, ...]
    borrowed: int
    """Elements of a tied embedding that two ranks have, and whose gradients they add up; 0 when one rank has it."""

    @cached_property
    def slowest_flops(self) -> float:
        """FLOPs per token, of all passes, of the rank that computes longest."""
        return max(rank.flops_per_token for rank in self.ranks)

    @cached_property
    def other_flops(self) -> float:
        """Those of all other ranks together."""
        return sum(rank.flops_per_token for rank in self.ranks) - self.slowest_flops

    @cached_property
    def other_attention_flops(self) -> float:
        """Attention's share of `other_flops`."""
        slowest = max(self.ranks, key=lambda rank: rank.flops_per_token)
        return sum(rank.attention_flops_per_token for rank in self.ranks) - slowest.attention_flops_per_token

    @cached_property
    def most_parameters(self) -> int:
        """Of any rank."""
        return max(rank.parameters for rank in self.ranks)

    @cached_property
    def most_frozen(self) -> int:
        """Of any rank."""
        return max(rank.frozen for rank in self.ranks)

    @cached_property
    def most_blocks(self) -> int:
        """Of any rank."""
        return max(rank.layers + rank.has_embedding + rank.has_head for rank in self.ranks)


def most_held(virtual_workers: int, data: int) -> int:
    """Virtual workers of the slowest of `data` equal replicas, as `strategies.layout.parallel.deal` deals them."""
    return -(-virtual_workers // data)


def most_pieces(virtual_workers: int, data: int) -> int:
    """An upper bound on the whole subtrees of the summation tree (`strategies.reduction.tree`) that one replica's
    virtual workers make up: 1 when every replica has the same power of two; otherwise a run of n needs at most
    2 log2(n). The same for all data degrees with equally many virtual workers on the fullest replica, but for those
    even ones: the search relies on that."""
    held = most_held(virtual_workers, data)
    if virtual_workers % data == 0 and held & (held - 1) == 0:
        return 1
    return min(held, max(1, 2 * (held.bit_length() - 1)))


def missing_copies(shard: str, data: int, ranks: int, wanted: int) -> int:
    """How many more holders than it has a share of the state needs to have `wanted`, as far as there are ranks.

    What is not sharded has a holder in every replica; what is sharded, or in a layout of one replica, has one.
    """
    return max(0, min(wanted, ranks) - (data if shard == "none" else 1))
