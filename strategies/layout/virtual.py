"""State of virtual things: what each of a number of them has for itself, wherever it is computed today.

Weights and what the optimizer keeps of them are there once. Beside them there may be state that belongs to a node of
the summation tree (what it has rounded off) or to a replica that trains by itself (its moments). Each such thing has a
vector like that of the weights, at coordinates of its own behind those of tensor parallelism: so plans, checkpoints and
the accounts of who has what treat it as any other state. It moves with what it belongs to, and is mirrored. Plain
integers: no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from strategies.layout.parallel import ParallelLayout
from strategies.layout.placement import Domain, Shard, choose_mirrors
from strategies.layout.space import Space
from strategies.layout.statemap import Spans, union, whole


class Place(NamedTuple):
    """Where what `ranges` of a coordinate of the thing `number` has is computed: on all of `makers`, alike."""

    number: int
    coordinate: int
    ranges: tuple[tuple[int, int], ...]
    makers: tuple[int, ...]


class VirtualState(ABC):
    """What each of `number` things has: an fp32 tensor of every kind for each trained parameter, of its shape. At step
    0 they are zero. `name` is what the names of the tensors begin with; a job has one of a name."""

    name: ClassVar[str]

    def __init__(self, number: int, kinds: tuple[str, ...]) -> None:
        self.number = number
        self.kinds = kinds

    @abstractmethod
    def places(self, layout: ParallelLayout, space: Space) -> Iterable[Place]:
        """Where all of it is computed in a layout: every element of every thing once."""


class Thing(NamedTuple):
    """One of those that have state of their own, on a tensor-parallel coordinate."""

    state: VirtualState
    number: int
    coordinate: int

    def name_of(self, kind: str, parameter: str) -> str:
        """The name of a full tensor of it."""
        return f"{self.state.name}.{self.number:05}.{kind}.{parameter}"


@dataclass(frozen=True)
class VirtualPart:
    """A part of what a thing has, at a coordinate of its own. `makers` compute it, and `mirrors` are sent what has
    changed by the first of them."""

    coordinate: int
    ranges: tuple[tuple[int, int], ...]
    makers: tuple[int, ...]
    mirrors: tuple[int, ...] = ()

    @property
    def holders(self) -> tuple[int, ...]:
        return (*self.makers, *self.mirrors)

    @property
    def spans(self) -> Spans:
        return Shard(self.makers[0], self.coordinate, self.ranges).spans


class VirtualStates:
    """All virtual state of a job whose model is split over `tensor` coordinates."""

    def __init__(self, states: Sequence[VirtualState], tensor: int) -> None:
        self.states = tuple(states)
        self._tensor = tensor
        self.number = sum(state.number for state in self.states)
        """Of things."""

    def everything(self, size: int) -> Spans:
        """The whole state of a model of this size, the weights and what is virtual."""
        return whole(size, self._tensor * (1 + self.number))

    def coordinate_of(self, state: VirtualState, index: int, coordinate: int) -> int:
        """That of its own which a thing has at a tensor-parallel coordinate."""
        names = [other.name for other in self.states]
        before = sum(other.number for other in self.states[: names.index(state.name)])
        return self._tensor * (1 + before + index) + coordinate

    def find(self, coordinate: int) -> Thing | None:
        """Whose it is; None for a coordinate of the weights."""
        number, inside = divmod(coordinate, self._tensor)
        number -= 1
        for state in self.states if number >= 0 else ():
            if number < state.number:
                return Thing(state, number, inside)
            number -= state.number
        return None

    def things(self) -> Iterator[tuple[int, Thing]]:
        """All of them, with their coordinates."""
        for state in self.states:
            for index in range(state.number):
                for coordinate in range(self._tensor):
                    yield self.coordinate_of(state, index, coordinate), Thing(state, index, coordinate)

    def place(
        self, layout: ParallelLayout, space: Space, domains: Sequence[Domain], copies: int
    ) -> list[VirtualPart]:  # fmt: skip
        """Who has which part of it in a layout; as many holders as `copies`, where there are as many ranks. Mirrors are
        in the zone of those that compute, as long as it has another node: what changes there with every step is not to
        cross a thin link. The answer depends on the arguments only."""
        load = [0] * layout.num_placed
        parts = []
        for state in self.states:
            for index, inside, ranges, makers in state.places(layout, space):
                missing = min(copies, layout.num_placed) - len(makers)
                mirrors = choose_mirrors(layout, makers, missing, domains, load, near=True) if missing > 0 else ()
                parts.append(VirtualPart(self.coordinate_of(state, index, inside), ranges, makers, tuple(mirrors)))
        return parts


def held_spans(layout: ParallelLayout, trained: Sequence[Spans], parts: Iterable[VirtualPart]) -> list[Spans]:
    """What each rank of the world has, by rank: what it trains, and what there is of virtual state."""
    held: list[list[Spans]] = [[] for _ in range(layout.world_size)]
    for part in parts:
        spans = part.spans
        for rank in part.holders:
            held[rank].append(spans)
    return [union(spans, *more) if more else spans for spans, more in zip(trained, held, strict=True)]
