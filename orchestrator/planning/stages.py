"""Cutting a model for a schedule, and adding up what each pipeline rank gets."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.models.costs import Block, ModelCosts
from orchestrator.planning.partition import cut
from orchestrator.planning.work import Rank, Stages
from strategies.layout.schedule import PipelineSchedule


def cut_model(model: ModelCosts, schedule: PipelineSchedule, tensor: int) -> Stages:
    """The model in `schedule.parts` parts whose dearest is as cheap as can be.

    The embedding stays with the first layer, as it costs no time. Raises ValueError for more parts than layers.
    """
    if schedule.parts > model.layers:
        raise ValueError(f"{schedule.parts} model parts of {model.layers} layers")
    # Units are the layers and the head; unit 0 brings the embedding along.
    bounds = cut([block.training_flops_per_token for block in model.blocks[1:]], schedule.parts)
    parts = [list(range(start + 1, stop + 1)) for start, stop in bounds]
    parts[0].insert(0, 0)
    return stages_of(model, schedule, tensor, parts)


def stages_of(model: ModelCosts, schedule: PipelineSchedule, tensor: int, parts: Sequence[Sequence[int]]) -> Stages:
    """The model cut into these parts, each given by the numbers of its blocks."""
    head = len(model.blocks) - 1
    borrowed = 0 if schedule.ends_meet else model.tied
    ranks = []
    for place in range(schedule.stages):
        mine = schedule.parts_of(place)
        ranks.append(_rank(model, {part: list(parts[part]) for part in mine}, tensor))
    layers = tuple(sum(1 for block in part if 0 < block < head) for part in parts)
    return Stages(layers, tuple(ranks), borrowed)


def _rank(model: ModelCosts, parts: dict[int, list[int]], tensor: int) -> Rank:
    head = len(model.blocks) - 1
    indices = [index for blocks in parts.values() for index in blocks]
    blocks = [model.blocks[index] for index in indices]
    sizes = [_parameters(block, tensor) for block in blocks]
    frozen = [-(-block.frozen_parameters // tensor) for block in blocks]
    second = -(-model.tied // tensor) if head in indices else 0
    gathered = [trained + still for trained, still in zip(sizes, frozen, strict=True)]
    if head in indices:
        gathered[indices.index(head)] += second
    return Rank(
        parameters=sum(sizes),
        frozen=sum(frozen),
        frozen_linear=sum(-(-block.frozen_linear // tensor) for block in blocks),
        largest_linear=max(-(-block.largest_linear // tensor) for block in blocks),
        second_uses=second,
        largest_block=max(gathered),
        flops_per_token=sum(block.training_flops_per_token for block in blocks) / tensor,
        attention_flops_per_token=sum(block.attention_flops_per_token for block in blocks) / tensor,
        layers=sum(1 for index in indices if 0 < index < head),
        has_embedding=0 in indices,
        has_head=head in indices,
        kept_bytes_per_token=tuple(
            (part, sum(_kept(model.blocks[index], tensor) for index in inside)) for part, inside in parts.items()
        ),
        working_bytes_per_token=max(_working(block, tensor) for block in blocks),
        fixed_working_bytes=sum(block.working_bytes for block in blocks) / tensor,
        fixed_kept_bytes=tuple(
            (part, sum(model.blocks[index].kept_bytes for index in inside) / tensor) for part, inside in parts.items()
        ),
    )


def _parameters(block: Block, tensor: int) -> int:
    return block.whole_parameters + -(-(block.parameters - block.whole_parameters) // tensor)


def _working(block: Block, tensor: int) -> float:
    split = block.recomputed_split_bytes_per_token
    return block.working_bytes_per_token / tensor + block.recomputed_bytes_per_token - split + split / tensor


def _kept(block: Block, tensor: int) -> float:
    split = block.kept_split_bytes_per_token
    return block.kept_bytes_per_token - split + split / tensor
