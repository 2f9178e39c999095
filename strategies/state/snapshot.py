"""A share of the training state, copied to host memory at a step boundary so that it can be written behind training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from strategies.layout.space import Space
from strategies.layout.statemap import Span, Spans
from strategies.state.chunks import Box, pieces_of
from strategies.state.host_copies import HostMemory, SideCopies
from strategies.state.kinds_of_state import KindsOfState
from strategies.state.training_state import TrainingState


@dataclass(frozen=True)
class Copied:
    """A box of a full tensor and its contents, contiguous on the host."""

    name: str
    box: Box
    values: torch.Tensor


class Snapshot:
    """Copies of one share at a time; the memory is used again. Those of a state on a GPU are made while the next step
    is computed, and `TrainingState.reads` keeps that from being applied too soon."""

    def __init__(self, space: Space, device: torch.device) -> None:
        self.space = space
        self._kinds: KindsOfState | None = None
        self._device = device
        self._memory = HostMemory(0, device)
        self._copies: list[tuple[str, Span, torch.Tensor]] = []
        self._buffers: Mapping[str, torch.Tensor] = {}
        self._reads: SideCopies | None = None

    def take(self, state: TrainingState, spans: Spans, *, buffers: bool) -> None:
        """Copies all tensors of these spans, which this rank has, and with `buffers` the persistent ones of the model.

        Copies long ranges only; what is where in them is worked out later, behind training. What was copied before has
        to be of no use any more. Raises RuntimeError when a span is not here.
        """
        found = [
            (kind, Span(span.tensor, first, first + count), buffer, at)
            for span in spans
            for start, _, length, state_shard in state.find(span)
            for kind, buffer in state_shard.kinds().items()
            for first, at, count in buffer.locate(start, start + length)
        ]
        size = sum(span.length for _, span, _, _ in found)
        self._kinds = state.kinds
        self._copies, at = [], 0
        if size > self._memory.values.numel():
            state.reads.finish()
            self._memory.close()
            self._memory = HostMemory(size, self._device)
        with torch.no_grad():
            state.reads.begin()
            for kind, span, buffer, place in found:
                copy = self._memory.values[at : at + span.length]
                state.reads.copy(copy, buffer, place)
                self._copies.append((kind, span, copy))
                at += span.length
            state.reads.end()
            self._reads = state.reads
            self._buffers = {}
            if buffers:
                self._buffers = {name: value.detach().cpu() for name, value in state.blueprint.buffers.items()}

    def contents(self) -> Iterator[Copied]:
        """What was copied, as boxes of full tensors; valid until the next `take`. Waits for the copies; from any
        thread."""
        if self._reads is not None:
            self._reads.finish()
        for kind, span, copy in self._copies:
            kinds = self._kinds
            assert kinds is not None
            inside = span._replace(tensor=kinds.split_coordinate(span.tensor))
            for piece in pieces_of(kinds.spaces_at(span.tensor)[kind], inside):
                first = piece.start - span.start
                name = kinds.name_at(span.tensor, kind, piece.slot.name)
                yield Copied(name, piece.box, copy[first : first + piece.box.numel])
        for name, value in sorted(self._buffers.items()):
            box = Box((0,) * value.dim(), tuple(value.shape))
            yield Copied(f"model.{name}", box, value.contiguous())
