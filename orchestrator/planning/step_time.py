"""How long a step of a layout takes: arithmetic, waiting in the pipeline, and messages by size.

Messages follow the alpha-beta model (Hockney 1994), collectives rings; the communication of tensor parallelism is
that of Shoeybi et al. 2019 (Megatron-LM), of sharding that of ZeRO. Nothing is taken to overlap but what FSDP2
exchanges on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.planning.hardware import Hardware, ring_all_reduce_s, scatter_s, send_s
from orchestrator.planning.work import Degrees, Stages, Work, missing_copies, most_held, most_pieces


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what they are spent on."""

    compute: float
    bubble: float
    tensor: float
    pipeline: float
    data: float
    shard: float
    copies: float
    rest: float = 0.0
    """Everything else, where a run has shown how much that is."""

    @property
    def messages(self) -> float:
        """What ranks wait for messages."""
        return self.tensor + self.pipeline + self.data + self.shard + self.copies

    @property
    def total(self) -> float:
        return self.compute + self.bubble + self.messages + self.rest


def hides_messages(hardware: Hardware, degrees: Degrees) -> bool:
    """Whether gathers and reductions go on beside arithmetic."""
    return hardware.overlaps and degrees.effective_shard == "parameters"


def compute_and_bubble(work: Work, hardware: Hardware, stages: Stages, degrees: Degrees) -> tuple[float, float]:
    """Seconds the slowest rank computes, and those it waits for others to fill and drain the pipeline."""
    micro_batches = degrees.schedule.padded(most_held(work.virtual_workers, degrees.data) * work.micro_batches)
    second = hardware.flops / work.tokens
    attention = stages.other_attention_flops / second
    if work.model.recomputes or degrees.effective_shard == "parameters":
        # Then zero bubble does not split the backward pass (`strategies.gradient.pipeline`).
        attention = stages.other_flops / degrees.schedule.chunks / 3 / second
    bubble = degrees.schedule.bubble(stages.other_flops / second, attention)
    return micro_batches * stages.slowest_flops / second, max(0.0, bubble)


def predict_step(work: Work, hardware: Hardware, stages: Stages, degrees: Degrees) -> StepTime:
    """The step's seconds by part, each on the rank where that part takes longest."""
    held = most_held(work.virtual_workers, degrees.data)
    micro_batches = degrees.schedule.padded(held * work.micro_batches)
    compute, bubble = compute_and_bubble(work, hardware, stages, degrees)
    data, shard = _reduction(work, hardware, stages, degrees, held)
    # What goes on beside steps of local training is waited for as far as it takes longer.
    hidden_s = compute * work.exchange.hidden_steps / work.exchange.every_steps
    data = max(0.0, data - hidden_s)
    if hides_messages(hardware, degrees):
        # All but what the first block waits for goes on beside arithmetic, gathers first.
        first = (data + shard) / max(1, stages.most_blocks * held * work.micro_batches)
        hidden = max(0.0, min(compute, data + shard) - first)
        data, shard = data - max(0.0, hidden - shard), shard - min(shard, hidden)
    return StepTime(
        compute=compute,
        bubble=bubble,
        tensor=micro_batches * _tensor_s(work, hardware, stages, degrees.tensor),
        pipeline=_pipeline_s(work, hardware, stages, degrees, micro_batches),
        data=data,
        shard=shard,
        copies=_copies_s(work, hardware, stages, degrees),
        rest=hardware.step_s,
    )


def _tensor_s(work: Work, hardware: Hardware, stages: Stages, tensor: int) -> float:
    """Per micro-batch: each layer all-reduces its activations twice forward and twice backward."""
    if tensor == 1:
        return 0.0
    link = hardware.link(tensor)
    hidden = ring_all_reduce_s(work.tokens * work.model.hidden_size * work.model.value_bytes, tensor, link)
    # Of each row of logits: its maximum, the sum of its exponentials, and what its target has.
    logits = 3 * ring_all_reduce_s(4.0 * work.tokens, tensor, link)
    # The embedding sums its output, the head sums its input's gradient and what its loss is made of.
    return max(
        (4 * rank.layers + rank.has_embedding + rank.has_head) * hidden + rank.has_head * logits
        for rank in stages.ranks
    )


def _pipeline_s(work: Work, hardware: Hardware, stages: Stages, degrees: Degrees, micro_batches: int) -> float:
    """Activations forward and their gradients back, over every boundary; and what the second use of an embedding takes:
    its gradient to where the first is, the weights back."""
    schedule = degrees.schedule
    if schedule.stages == 1:
        return 0.0
    link = hardware.link(degrees.tensor * schedule.stages)
    message = send_s(work.tokens * work.model.hidden_size * work.model.value_bytes, link)
    elements = stages.borrowed / degrees.tensor / degrees.data
    tied = send_s(elements * work.state.gradients, link) + send_s(elements * degrees.data * work.computed_bytes, link)
    tied = tied if stages.borrowed else 0.0
    return 2 * (micro_batches + schedule.stages - 1) * schedule.chunks * message + tied


def _reduction(
    work: Work, hardware: Hardware, stages: Stages, degrees: Degrees, held: int
) -> tuple[float, float]:  # fmt: skip
    """Seconds to add up gradients over replicas, and to bring sharded weights to where they are needed."""
    data = degrees.data
    if data == 1:
        return 0.0, 0.0
    link = hardware.link(degrees.ranks)
    exchange = work.exchange
    share = exchange.share_of(work.model.hidden_size) / exchange.every_steps
    gradient = stages.most_parameters * work.state.gradients * share
    weights = stages.most_parameters * work.computed_bytes
    if degrees.shard in ("none", "optimizer"):
        # Once a step. In canonical order a rank sends each of its partial sums by itself.
        sent = most_pieces(work.virtual_workers, data) if work.canonical else 1
        reduce = scatter_s(sent * gradient, data, link)
        if degrees.shard == "none":
            return reduce + scatter_s(gradient, data, link), 0.0
        return reduce, scatter_s(weights, data, link)
    # Once per virtual worker, as no rank has room for a whole gradient.
    reduce = held * scatter_s(gradient, data, link)
    if degrees.shard == "gradients":
        return reduce, scatter_s(weights, data, link)
    # What is quantized is whole on every rank.
    everything = weights + (stages.most_frozen * work.computed_bytes if work.frozen_bytes is None else 0.0)
    gather = stages.most_blocks * scatter_s(everything / stages.most_blocks, data, link)
    # Weights are let go of after the forward pass of a micro-batch and gathered again for its backward pass.
    gather += stages.most_blocks * hardware.gather_s
    return reduce, 2 * held * work.micro_batches * gather


def _copies_s(work: Work, hardware: Hardware, stages: Stages, degrees: Degrees) -> float:
    """The reduced gradient of what is copied goes to each of its other holders."""
    link, found = hardware.link(degrees.ranks), 0.0
    if missing := missing_copies(degrees.shard, degrees.data, degrees.ranks, work.state_copies):
        share = stages.most_parameters * work.state.gradients / degrees.data
        found = missing * send_s(share, link)
    # What virtual things keep changes as often as there is an exchange, and has one holder by itself.
    if work.exchange.kept and (missing := min(work.state_copies, degrees.ranks) - 1) > 0:
        kept = 4.0 * work.exchange.kept * stages.most_parameters / degrees.data / work.exchange.every_steps
        found += missing * send_s(kept, link)
    return found


def sent_bytes(work: Work, degrees: Degrees) -> float:
    """What a rank sends in a step of sums of gradients, and of copies of what virtual things keep; on average."""
    if degrees.data == 1:
        return 0.0
    exchange, parameters = work.exchange, work.model.parameters / degrees.tensor / degrees.pipeline
    share = exchange.share_of(work.model.hidden_size)
    held = most_held(work.virtual_workers, degrees.data)
    times = {"none": 2.0, "optimizer": 1.0}.get(degrees.effective_shard, float(held))
    sums = times * share * (degrees.data - 1) / degrees.data
    copies = max(0, min(work.state_copies, degrees.ranks) - 1) * exchange.kept / degrees.data
    return 4.0 * parameters * (sums + copies) / exchange.every_steps
