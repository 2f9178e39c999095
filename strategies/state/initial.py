"""The state of step 0: any rank can make any part of it, from the first values of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash

from strategies.layout.space import Slot
from strategies.model.blueprint import Blueprint
from strategies.model.values import Values
from strategies.state.shard import WEIGHTS, StateShard

SAMPLED = 1 << 16
"""Elements of a parameter that is read whenever what a model begins with is compared."""
NEVER_SAMPLED = 1 << 26
"""Those of one that takes too long."""


def initial_digest(blueprint: Blueprint) -> str:
    """Of what the model is made of at step 0: names, shapes, what a trial has found out, how it is split, buffers; and
    values. Of large parameters that take time to make or read, one of each shape stands for all."""
    digest = xxhash.xxh3_128()
    digest.update(f"{blueprint.found}\n".encode())
    for name in sorted(blueprint.unused):
        digest.update(f"unused {name}\n".encode())
    constants, values = blueprint.constants, blueprint.values
    shapes = blueprint.initial_shapes | {name: each.shape for name, each in blueprint.buffers.items()}
    shapes |= {name: blueprint.frozen.describe(name)[1] for name in blueprint.frozen}
    seen: set[torch.Size] = set()
    for name, shape in sorted(shapes.items()):
        digest.update(f"{name} {list(shape)}".encode())
        if shape.numel() > SAMPLED and not values.is_at_hand(name):
            if shape in seen or shape.numel() > NEVER_SAMPLED:
                continue
            seen.add(shape)
        tensor = constants[name] if name in constants else values.read(name)
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def fill(state_shards: Sequence[StateShard], blueprint: Blueprint, values: Values | None = None) -> None:
    """Writes the state of step 0; with `values` that of a model that begins with these."""
    for state_shard in state_shards:
        for slot in blueprint.space.slots:
            _fill_slot(state_shard, slot, blueprint, values or blueprint.values)
        for kind, buffer in state_shard.kinds().items():
            if kind != WEIGHTS:
                buffer.zero()


def _fill_slot(state_shard: StateShard, slot: Slot, blueprint: Blueprint, values: Values) -> None:
    """What a shard has of a parameter; no more of it is in memory than that, or the parameter where it is split."""
    whole_share = None
    for start, offset, length in state_shard.flat.locate(slot.offset, slot.offset + slot.numel):
        first = start - slot.offset
        if slot.dim is None:
            found = values.read_range(slot.name, first, first + length)
        else:
            if whole_share is None:
                whole = values.read(slot.name)
                whole_share = blueprint.space.share(slot, whole, state_shard.coordinate).reshape(-1)
            found = whole_share[first : first + length]
        state_shard.weights[offset : offset + length].copy_(found)
