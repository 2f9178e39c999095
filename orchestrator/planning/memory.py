"""How much memory a rank of a layout needs.

State by ZeRO stage: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
figure 1. What this platform adds to it (partial sums, exchange buffers, state copies) is explained in
docs/planning.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from orchestrator.planning.work import Degrees, Rank, Stages, StateBytes, Work, missing_copies, most_held


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    copies: float
    """State of other ranks kept for them."""
    buffers: float
    """Exchange buffers, gathered weights, what a backward pass computes again, logits around the loss."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.copies + self.buffers


def zero_state(parameters: float, shard: str, data: int, per_parameter: StateBytes) -> StateBytes:
    """Bytes of weights, gradients and optimizer state on one of `data` ranks, by ZeRO stage."""
    return StateBytes(
        weights=per_parameter.weights * parameters / (data if shard == "parameters" else 1),
        gradients=per_parameter.gradients * parameters / (data if shard in ("gradients", "parameters") else 1),
        optimizer=per_parameter.optimizer * parameters / (1 if shard == "none" else data),
    )


def predict_memory(work: Work, stages: Stages, degrees: Degrees) -> Memory:
    """The memory of the fullest rank."""
    held = most_held(work.virtual_workers, degrees.data)
    of_ranks = (_of_rank(work, rank, place, degrees, held) for place, rank in enumerate(stages.ranks))
    return max(of_ranks, key=attrgetter("total"))


def _of_rank(work: Work, rank: Rank, place: int, degrees: Degrees, held: int) -> Memory:
    data, shard = degrees.data, degrees.shard
    state = zero_state(rank.parameters, shard, data, work.state)
    # Finished virtual workers wait as partial sums for their siblings in the summation tree, one per level; slices of
    # those of all replicas are added up as they come, to a sibling where it is there. A second use of a parameter has
    # gradients of its own.
    sums = held.bit_length()
    if shard in ("gradients", "parameters") and data > 1:
        # What is added up for an update is kept with `gradients`, and else there when activations are not.
        sums = max(1, sums - 1) + (shard == "gradients")
    second = rank.second_uses * work.state.gradients / (data if shard in ("gradients", "parameters") else 1)
    micro_batches = degrees.schedule.padded(held * work.micro_batches)
    activations = work.tokens * sum(
        kept * degrees.schedule.in_flight(place, part, micro_batches) for part, kept in rank.kept_bytes_per_token
    )
    missing_optimizer, missing_weights = missing_copies(shard, data, degrees.ranks, work.state_copies)
    copied = work.state.optimizer * missing_optimizer + work.state.weights * missing_weights
    return Memory(
        weights=_weights(work, rank, degrees),
        gradients=(state.gradients + second) * sums,
        optimizer=0.0 if work.offloads else state.optimizer,
        activations=activations,
        copies=copied * rank.parameters / data,
        buffers=_buffers(work, rank, degrees) + work.tokens * rank.working_bytes_per_token + rank.fixed_bytes,
    )


def _weights(work: Work, rank: Rank, degrees: Degrees) -> float:
    """What is computed with, and what is updated where that is another."""
    is_sharded = degrees.shard == "parameters" and degrees.data > 1
    shared = degrees.data if is_sharded else 1
    # Sharded weights are kept as they are updated, and gathered as they are computed with.
    each = work.state.weights if is_sharded else work.computed_bytes
    computed = each * (rank.parameters + rank.frozen) / shared
    if is_sharded or (work.offloads and (work.has_copies or degrees.shard != "none")):
        return computed
    if degrees.shard == "none" or degrees.data == 1:
        return computed + (work.state.weights * rank.parameters if work.has_copies else 0.0)
    return computed + work.state.weights * rank.parameters / degrees.data


def _buffers(work: Work, rank: Rank, degrees: Degrees) -> float:
    """Whole gradients on their way, or one block's gathered weights and gradient."""
    if degrees.shard == "parameters" and degrees.data > 1:
        # One block is computed with while the next is gathered; its gradient is whole until it is reduced. Virtual
        # workers of several micro-batches, one of each replica, are summed side by side: a slice of each.
        beside = rank.parameters if work.micro_batches > 1 else 0
        blocks = rank.largest_block * (2 * work.computed_bytes + work.state.gradients)
        return blocks + beside * work.state.gradients
    if degrees.data > 1 and degrees.shard == "gradients":
        # The virtual worker under way, and a slice of that of every replica.
        return 2 * rank.parameters * work.state.gradients
    if degrees.data > 1:
        # The reducer keeps what it receives, and with unsharded state what it sends back.
        whole = 2 if work.canonical and degrees.shard == "none" else 1
        return whole * rank.parameters * work.state.gradients
    return 0.0
