"""Taking chunks of full tensors, from whatever layout they were saved in, into what a rank holds."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from strategies.layout.space import Space
from strategies.layout.statemap import Span, Spans
from strategies.state.buffers import Buffer
from strategies.state.chunks import MAX_CHUNK, Box, slot_pieces
from strategies.state.kinds_of_state import KindsOfState
from strategies.state.reshard import Holder


class _Target(NamedTuple):
    """Where a box of a tensor is wanted: in a view, or from `first` on in a buffer that has none."""

    box: Box
    view: torch.Tensor | None
    buffer: Buffer | None = None
    first: int = 0

    def take(self, common: Box, values: torch.Tensor) -> None:
        """What is in `common`, into the buffer."""
        assert self.buffer is not None
        whole = self.buffer.read(self.first, self.box.numel).clone()
        common.view_in(self.box, whole.view(self.box.sizes)).copy_(values)
        self.buffer.write(self.first, whole)


class ChunkLoader:
    """What a rank is to be given: all tensors of some spans of its shards of a state, and the model's persistent
    `buffers`.

    `put` may be called by several threads at once.
    """

    def __init__(
        self, kinds: KindsOfState, shards: Sequence[Holder], spans: Spans, buffers: Mapping[str, torch.Tensor]
    ) -> None:
        self._kinds = kinds
        self._targets: dict[str, list[_Target]] = {}
        self._lock = threading.Lock()
        self.missing = 0
        """Elements that have not been put yet."""
        for name, tensor in buffers.items():
            self._expect(f"model.{name}", _Target(Box((0,) * tensor.dim(), tuple(tensor.shape)), tensor))
        for span in spans:
            for shard in shards:
                for kind, buffer in shard.kinds().items():
                    if shard.coordinate == span.tensor:
                        self._expect_range(kinds.spaces_at(span.tensor)[kind], kind, buffer, span)

    def _expect_range(self, space: Space, kind: str, buffer: Buffer, span: Span) -> None:
        coordinate = self._kinds.split_coordinate(span.tensor)
        for start, offset, length in buffer.locate(span.start, span.stop):
            # What has no view is taken a piece at a time.
            most = sys.maxsize
            if buffer.view(offset, length) is None:
                # What was there would have a part in how the first pieces of a block are stored.
                most = MAX_CHUNK
                for first in range(0, length, MAX_CHUNK):
                    buffer.write(offset + first, torch.zeros(min(MAX_CHUNK, length - first)))
            for slot in space.overlapping(start, start + length):
                low, high = max(slot.offset, start), min(slot.offset + slot.numel, start + length)
                for piece in slot_pieces(space, slot, low, high, coordinate, most):
                    first = offset + piece.start - start
                    view = buffer.view(first, piece.box.numel)
                    if view is not None:
                        target = _Target(piece.box, view.view(piece.box.sizes))
                    else:
                        target = _Target(piece.box, None, buffer, first)
                    self._expect(self._kinds.name_at(span.tensor, kind, slot.name), target)

    def _expect(self, name: str, target: _Target) -> None:
        self._targets.setdefault(name, []).append(target)
        self.missing += target.box.numel

    def wants(self, name: str, box: Box) -> bool:
        """Whether anything of this box of a tensor is to be given."""
        return any(target.box.overlap(box) is not None for target in self._targets.get(name, ()))

    def room(self, name: str, box: Box) -> torch.Tensor | None:
        """Where all of a box of a tensor is wanted once, in host memory and in order: then it may be written there at
        once, and `filled` said. None where that is not so."""
        found = [target for target in self._targets.get(name, ()) if target.box.overlap(box) is not None]
        if len(found) != 1 or found[0].view is None or found[0].box.overlap(box) != box:
            return None
        view = box.view_in(found[0].box, found[0].view)
        return view if view.is_contiguous() and view.device.type == "cpu" else None

    def filled(self, box: Box) -> None:
        """The room for this box has its contents."""
        with self._lock:
            self.missing -= box.numel

    def put(self, name: str, box: Box, values: torch.Tensor) -> None:
        """Takes what is wanted of a box of a tensor, whose contents `values` [box.sizes] are."""
        taken = 0
        with torch.no_grad():
            for target in self._targets.get(name, ()):
                if (common := target.box.overlap(box)) is not None:
                    if target.view is not None:
                        common.view_in(target.box, target.view).copy_(common.view_in(box, values))
                    else:
                        with self._lock:
                            target.take(common, common.view_in(box, values))
                    taken += common.numel
        with self._lock:
            self.missing -= taken
