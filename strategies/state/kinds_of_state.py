"""What kinds of state there are at a coordinate, and what its tensors are called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from strategies.layout.space import Slot, Space
from strategies.layout.virtual import VirtualState, VirtualStates
from strategies.state.buffers import Spaces
from strategies.state.shard import WEIGHTS, name_of


class KindsOfState:
    """`spaces` are those of what is trained, by kind; `virtual` is the state of virtual things, of which every kind has
    the space of the weights."""

    def __init__(self, spaces: Spaces, virtual: Sequence[VirtualState] = ()) -> None:
        self.spaces = spaces
        self._space: Space = spaces[WEIGHTS]
        self.virtual = VirtualStates(virtual, self._space.tensor)

    def spaces_at(self, coordinate: int) -> Spaces:
        """By kind: its space, of what there is at a coordinate."""
        if (thing := self.virtual.find(coordinate)) is None:
            return self.spaces
        return dict.fromkeys(thing.state.kinds, self._space)

    def name_at(self, coordinate: int, kind: str, parameter: str) -> str:
        """The name of a full tensor of which there is a part at a coordinate."""
        thing = self.virtual.find(coordinate)
        return name_of(kind, parameter) if thing is None else thing.name_of(kind, parameter)

    def split_coordinate(self, coordinate: int) -> int:
        """The tensor-parallel coordinate, whose share of parameters there is at a coordinate."""
        return coordinate % self._space.tensor

    def tensors(self) -> Iterator[tuple[str, str, Slot, int]]:
        """(name, kind, slot, first coordinate) of every full tensor that training changes."""
        for kind, space in self.spaces.items():
            for slot in space.slots:
                yield name_of(kind, slot.name), kind, slot, 0
        for coordinate, thing in self.virtual.things():
            if not thing.coordinate:
                for kind in thing.state.kinds:
                    for slot in self._space.slots:
                        yield thing.name_of(kind, slot.name), kind, slot, coordinate
