"""How much memory a rank of a layout needs.

State by ZeRO stage: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
figure 1. What this platform adds to it (partial sums, exchange buffers, state copies) is explained in
docs/planning.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from orchestrator.planning.work import Degrees, Rank, Stages, StateBytes, Work, missing_copies, most_held, most_pieces
from strategies.layout.schedule import LOSS_WAITS


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
    of_ranks = (_of_rank(work, stages, place, degrees, held) for place in range(len(stages.ranks)))
    return max(of_ranks, key=attrgetter("total"))


def _of_rank(work: Work, stages: Stages, place: int, degrees: Degrees, held: int) -> Memory:
    data, shard, rank = degrees.data, degrees.effective_shard, stages.ranks[place]
    state = zero_state(rank.parameters, shard, data, work.state)
    # Finished virtual workers wait as partial sums for their siblings in the summation tree, one per level; slices of
    # those of all replicas are added up as they come, to a sibling where it is there. A second use of a parameter has
    # gradients of its own.
    sums = held.bit_length()
    if shard in ("gradients", "parameters"):
        sums = max(1, sums - 1)
    second = rank.second_uses * work.state.gradients / (data if shard in ("gradients", "parameters") else 1)
    # The gradient of an update is kept where it is whole; a share of it is there when activations are not.
    updated = state.gradients if shard == "none" else 0.0
    activations = _activations(work, rank, place, degrees, held)
    working = work.tokens * rank.working_bytes_per_token + rank.fixed_working_bytes
    if work.frozen_bytes is not None:
        # What is quantized is put together, a matrix at a time, to be computed with.
        working += rank.largest_linear * work.computed_bytes
    # A copy has weights of its own, also where all replicas compute with all of them.
    copied = 0.0 if work.offloads else work.state.optimizer + work.state.weights
    kept, sent = _buffers(work, rank, degrees)
    # As it is, and as it will be; also of what is kept for others.
    holders = 1 + max(0, min(work.state_copies, degrees.ranks) - 1)
    virtual = 2 * 4.0 * work.exchange.kept * rank.parameters / data * holders + work.exchange.apart * rank.parameters
    return Memory(
        weights=_weights(work, rank, degrees, is_borrowed=stages.borrowed > 0),
        gradients=(state.gradients + second) * sums + updated,
        optimizer=(0.0 if work.offloads else state.optimizer) + virtual,
        activations=activations,
        copies=copied * missing_copies(shard, data, degrees.ranks, work.state_copies) * rank.parameters / data,
        # What is sent comes when activations are gone.
        buffers=kept + working + max(0.0, sent - activations - working),
    )


def _activations(work: Work, rank: Rank, place: int, degrees: Degrees, held: int) -> float:
    schedule, found = degrees.schedule, 0.0
    micro_batches = schedule.padded(held * work.micro_batches)
    for part, kept in rank.kept_bytes_per_token:
        found += work.tokens * kept * schedule.in_flight(place, part, micro_batches)
    for part, kept in rank.fixed_kept_bytes:
        found += kept * (schedule.in_flight(place, part, micro_batches) if schedule.kind in LOSS_WAITS else 1)
    return found


def _weights(work: Work, rank: Rank, degrees: Degrees, *, is_borrowed: bool) -> float:
    """What is computed with, and what is updated where that is another. An embedding that is borrowed of another stage
    is there a second time."""
    shard, is_sharded = degrees.effective_shard, degrees.effective_shard == "parameters"
    shared = degrees.data if is_sharded else 1
    # Sharded weights are kept as they are updated, and gathered as they are computed with.
    each = work.state.weights if is_sharded else work.computed_bytes
    second = rank.second_uses if is_borrowed else 0
    quantized = 0 if work.frozen_bytes is None else rank.frozen_linear
    frozen = each * (rank.frozen - quantized) / shared + (work.frozen_bytes or 0.0) * quantized
    computed = each * (rank.parameters + second) / shared + frozen
    if is_sharded or (work.offloads and (work.has_copies or shard != "none")):
        return computed
    if shard == "none":
        return computed + (work.state.weights * rank.parameters if work.has_copies else 0.0)
    return computed + work.state.weights * rank.parameters / degrees.data


def _buffers(work: Work, rank: Rank, degrees: Degrees) -> tuple[float, float]:
    """Whole gradients on their way and weights to be sent, or one block's gathered weights and gradient: what is there
    in all of a step, and what only when gradients are sent."""
    gradient, shard = rank.parameters * work.state.gradients, degrees.effective_shard
    if shard == "parameters":
        # One block is computed with while the next is gathered; its gradient is whole until it is reduced. Virtual
        # workers of several micro-batches, one of each replica, are summed side by side: a slice of each.
        beside = gradient if work.micro_batches > 1 else 0.0
        return rank.largest_block * (2 * work.computed_bytes + work.state.gradients) + beside, 0.0
    if degrees.data == 1:
        return 0.0, 0.0
    # What is sent back (the reduced gradient, or the weights of those who update them) is kept as it is received.
    back = gradient if shard == "none" else rank.parameters * work.computed_bytes
    if not work.canonical:
        # The backend adds up in one buffer, where the whole sum then is.
        return gradient + (back if shard != "none" else 0.0), 0.0
    if shard == "gradients":
        # The virtual worker under way, and a slice of that of every replica.
        return 2 * gradient + back, 0.0
    # Slices of what all send, and where that is several partial sums, these end to end.
    most = most_pieces(work.virtual_workers, degrees.data)
    return gradient * most + back, gradient * most if most > 1 else 0.0
