"""Taking chunks of full tensors, from whatever layout they were saved in, into what a rank holds."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence

import torch

from strategies.layout.space import Space
from strategies.layout.statemap import Spans
from strategies.state.chunks import Box, slot_pieces
from strategies.state.shard import StateShard, name_of


class ChunkLoader:
    """What a rank is to be given: all tensors of some spans of its state shards, and the model's persistent `buffers`.

    `put` may be called by several threads at once.
    """

    def __init__(
        self, space: Space, state_shards: Sequence[StateShard], spans: Spans, buffers: Mapping[str, torch.Tensor]
    ) -> None:
        self._targets: dict[str, list[tuple[Box, torch.Tensor]]] = {}
        self._lock = threading.Lock()
        self.missing = 0
        """Elements that have not been put yet."""
        for name, tensor in buffers.items():
            self._expect(f"model.{name}", Box((0,) * tensor.dim(), tuple(tensor.shape)), tensor)
        for span in spans:
            for state_shard in state_shards:
                for start, offset, length in state_shard.locate(span):
                    self._expect_range(space, state_shard, start, offset, length)

    def _expect_range(self, space: Space, state_shard: StateShard, start: int, offset: int, length: int) -> None:
        for slot in space.overlapping(start, start + length):
            low, high = max(slot.offset, start), min(slot.offset + slot.numel, start + length)
            for piece in slot_pieces(space, slot, low, high, state_shard.coordinate, sys.maxsize):
                first = offset + piece.start - start
                for kind, buffer in state_shard.kinds().items():
                    view = buffer[first : first + piece.box.numel].view(piece.box.sizes)
                    self._expect(name_of(kind, slot.name), piece.box, view)

    def _expect(self, name: str, box: Box, view: torch.Tensor) -> None:
        self._targets.setdefault(name, []).append((box, view))
        self.missing += box.numel

    def wants(self, name: str, box: Box) -> bool:
        """Whether anything of this box of a tensor is to be given."""
        return any(target.overlap(box) is not None for target, _ in self._targets.get(name, ()))

    def room(self, name: str, box: Box) -> torch.Tensor | None:
        """Where all of a box of a tensor is wanted once, in host memory and in order: then it may be written there at
        once, and `filled` said. None where that is not so."""
        found = [(target, view) for target, view in self._targets.get(name, ()) if target.overlap(box) is not None]
        if len(found) != 1 or found[0][0].overlap(box) != box:
            return None
        view = box.view_in(*found[0])
        return view if view.is_contiguous() and view.device.type == "cpu" else None

    def filled(self, box: Box) -> None:
        """The room for this box has its contents."""
        with self._lock:
            self.missing -= box.numel

    def put(self, name: str, box: Box, values: torch.Tensor) -> None:
        """Takes what is wanted of a box of a tensor, whose contents `values` [box.sizes] are."""
        taken = 0
        with torch.no_grad():
            for target, view in self._targets.get(name, ()):
                if (common := target.overlap(box)) is not None:
                    common.view_in(target, view).copy_(common.view_in(box, values))
                    taken += common.numel
        with self._lock:
            self.missing -= taken
