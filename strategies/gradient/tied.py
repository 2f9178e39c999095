"""The second gradients of parameters that are used twice: an embedding that is the head, too.

They are reduced like all others, but apart, among the ranks that have the second use, and what each rank has of the sum
is then added to what is reduced of the first: by the rank that owns that, to which it is sent where it is another (a
pipeline has the embedding in its first stage and the head in its last). In turn these send the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from strategies.comm.fabric import Fabric
from strategies.comm.groups import Message
from strategies.gradient.context import WorkContext
from strategies.layout.parallel import ParallelLayout
from strategies.layout.space import Alias, FlatRanges, Space
from strategies.model.model_part import ModelPart
from strategies.reduction.reducer import Reducer, RoundReducer
from strategies.reduction.tree import Subtree
from strategies.state.shard import StateShard

if TYPE_CHECKING:
    from strategies.model.fsdp import ShardedModelPart


@dataclass(frozen=True)
class Ends:
    """Where the two uses of a parameter are: pipeline stages."""

    first: int
    second: int

    @classmethod
    def of(cls, alias: Alias, layout: ParallelLayout) -> Ends:
        return cls(_stage_of(alias.slot.block, layout), _stage_of(alias.block, layout))

    @property
    def are_apart(self) -> bool:
        return self.first != self.second


def _stage_of(block: int, layout: ParallelLayout) -> int:
    for stage in range(layout.pipeline):
        runs = layout.blocks_of(stage)
        if runs is None or any(start <= block < stop for start, stop in runs):
            return stage
    raise ValueError(f"no stage has block {block}")


class Tie:
    """One parameter with a second use, in one layout, on one rank; whole weights are computed with."""

    def __init__(self, alias: Alias, part: ModelPart, context: WorkContext) -> None:
        layout, place, space = context.layout, context.place, part.blueprint.space
        self.alias = alias
        self.ends = Ends.of(alias, layout)
        self.is_first, self.is_second = place.stage == self.ends.first, place.stage == self.ends.second
        self._fabric, self._part = context.fabric, part
        self._first = layout.rank_of(place.data, self.ends.first, place.tensor)
        self._second = layout.rank_of(place.data, self.ends.second, place.tensor)
        is_whole = context.spec.native_reduction and layout.effective_shard == "none"
        self.owned = overlaps(alias, space, layout, is_whole=is_whole)
        """What of the parameter each replica owns: (position in its slice of the gradient, elements)."""
        self.start, self.length = self.owned[place.data]

    @property
    def second_gradients(self) -> slice:
        """Where they are in a buffer of gradients."""
        start = self._part.alias_offsets[self.alias.name]
        return slice(start, start + self.alias.slot.numel)

    def send_weights(self) -> None:
        """Brings the weights to where the second use is. Raises PeerLost."""
        if not self.ends.are_apart:
            return
        weights = self._part.weights
        if self.is_first:
            _, at, _ = next(self._part.flat.locate(self.alias.slot.offset, self.alias.slot.stop))
            self._exchange("send", weights[at : at + self.alias.slot.numel], self._second)
        elif self.is_second:
            at = self._part.borrowed[self.alias.name]
            self._exchange("recv", weights[at : at + self.alias.slot.numel], self._first)

    def add(self, second: torch.Tensor | None, slice_: torch.Tensor) -> None:
        """Adds what this replica owns of the sum of second gradients to its slice of the first; `second` is None where
        it has not been reduced here. Raises PeerLost."""
        if not self.length:
            return
        if self.ends.are_apart and self.is_second:
            assert second is not None
            self._exchange("send", second.contiguous(), self._first)
        elif self.is_first:
            if second is None:
                second = torch.empty(self.length, device=slice_.device)
                self._exchange("recv", second, self._second)
            slice_[self.start : self.start + self.length].add_(second)

    def _exchange(self, way: Literal["send", "recv"], tensor: torch.Tensor, peer: int) -> None:
        exchange(self._fabric, [(way, tensor, peer)])


def exchange(fabric: Fabric, messages: Sequence[Message]) -> None:
    """Raises PeerLost."""
    for work in fabric.world.start_together(messages):
        fabric.world.finish(work, "a parameter that is used twice")


def overlaps(alias: Alias, space: Space, layout: ParallelLayout, *, is_whole: bool) -> list[tuple[int, int]]:
    """What each replica owns of a parameter: (position in its slice of the gradient, elements), without padding. Slices
    are even, or the gradient `is_whole` with each."""
    flat = FlatRanges.of(space.ranges_of(layout.blocks_of(Ends.of(alias, layout).first)), space.boundary)
    _, at, _ = next(flat.locate(alias.slot.offset, alias.slot.stop))
    if is_whole:
        return [(at, alias.slot.numel)] * layout.data
    found, start = [], 0
    for size in space.slices(flat, layout.data):
        low, high = max(at, start), min(at + alias.slot.numel, start + size)
        found.append((low - start, high - low) if low < high else (0, 0))
        start += size
    return found


class TiedGradients:
    """Of all parameters with a second use, where each virtual worker's gradient is whole until all are reduced."""

    def __init__(self, part: ModelPart, context: WorkContext) -> None:
        blueprint, layout, native = part.blueprint, context.layout, context.spec.native_reduction
        ties = [Tie(alias, part, context) for alias in blueprint.space.aliases]
        self._ties = [tie for tie in ties if tie.is_first or tie.is_second]
        group = context.fabric.data_group
        self._reducers = {
            tie.alias.name: Reducer(
                group, layout, tie.alias.slot.numel, part.device, native, [length for _, length in tie.owned]
            )
            for tie in self._ties
            if tie.is_second
        }

    def send_weights(self) -> None:
        """See `Tie`."""
        for tie in self._ties:
            tie.send_weights()

    def add(self, pieces: Mapping[Subtree, torch.Tensor], slice_: torch.Tensor) -> None:
        """Reduces second gradients, which are in `pieces` behind the first, and adds them to this rank's slice of the
        reduced first ones. Raises PeerLost."""
        for tie in self._ties:
            second = None
            if (reducer := self._reducers.get(tie.alias.name)) is not None:
                own = {node: piece[tie.second_gradients] for node, piece in pieces.items()}
                second = reducer.reduce(reducer.joined(own))
                if reducer.native and second.numel() != tie.length:
                    second = reducer.own_slice(second)
            tie.add(second, slice_)


class TiedRounds:
    """The same where gradients are reduced one virtual worker of each replica at a time."""

    def __init__(self, part: ModelPart, context: WorkContext) -> None:
        layout, group = context.layout, context.fabric.data_group
        ties = [Tie(alias, part, context) for alias in part.blueprint.space.aliases]
        self._ties = [tie for tie in ties if tie.is_first or tie.is_second]
        self._reducers = {
            tie.alias.name: RoundReducer(group, layout, [length for _, length in tie.owned], part.device)
            for tie in self._ties
            if tie.is_second
        }

    def begin(self) -> None:
        """A step begins."""
        for reducer in self._reducers.values():
            reducer.begin()

    def add_round(self, number: int, gradient: torch.Tensor) -> None:
        """See `RoundReducer.add`; `gradient` is all of it, or empty. Raises PeerLost."""
        for tie in self._ties:
            if (reducer := self._reducers.get(tie.alias.name)) is not None:
                reducer.add(number, gradient[tie.second_gradients] if gradient.numel() else gradient)

    def send_weights(self) -> None:
        """See `Tie`."""
        for tie in self._ties:
            tie.send_weights()

    def add(self, slice_: torch.Tensor) -> None:
        """Adds the sums to this rank's slice of the reduced first gradients. Raises PeerLost."""
        for tie in self._ties:
            reducer = self._reducers.get(tie.alias.name)
            tie.add(None if reducer is None else reducer.total(), slice_)


class TiedShards:
    """The same where each rank has its rows only, of both uses of a parameter the same ones."""

    def __init__(self, part: ShardedModelPart, own: StateShard, context: WorkContext) -> None:
        layout, place = context.layout, context.place
        self._part, self._own, self._fabric = part, own, context.fabric
        self._ties: list[tuple[Alias, bool, int]] = []
        for alias in part.blueprint.space.aliases:
            ends = Ends.of(alias, layout)
            if ends.are_apart and place.stage in (ends.first, ends.second):
                other = ends.second if place.stage == ends.first else ends.first
                peer = layout.rank_of(place.data, other, place.tensor)
                self._ties.append((alias, place.stage == ends.first, peer))

    def send_weights(self) -> None:
        """See `Tie`."""
        for alias, is_first, peer in self._ties:
            if not is_first:
                self._exchange("recv", self._part.rows_of(alias.name), peer)
            elif (rows := self._rows(self._own.weights, alias)) is not None:
                self._exchange("send", rows.to(self._part.device), peer)

    def add(self) -> None:
        """Adds the second gradients, after the part has unloaded the first. Raises PeerLost."""
        for alias, is_first, peer in self._ties:
            if not is_first:
                self._exchange("send", self._part.gradient_rows_of(alias.name), peer)
            elif (rows := self._rows(self._own.gradient, alias)) is not None:
                second = torch.empty_like(rows)
                self._exchange("recv", second, peer)
                rows.add_(second)

    def _rows(self, buffer: torch.Tensor, alias: Alias) -> torch.Tensor | None:
        """This rank's rows of a parameter (a view) in a buffer of its state."""
        found = next(self._own.flat.locate(alias.slot.offset, alias.slot.offset + alias.slot.numel), None)
        return None if found is None else buffer[found[1] : found[1] + found[2]]

    def _exchange(self, way: Literal["send", "recv"], tensor: torch.Tensor, peer: int) -> None:
        if tensor.numel():
            exchange(self._fabric, [(way, tensor, peer)])
