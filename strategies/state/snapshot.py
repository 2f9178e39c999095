"""A share of the training state, copied to host memory at a step boundary so that it can be written behind training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from strategies.layout.space import Space
from strategies.layout.statemap import Span, Spans
from strategies.state.chunks import Box, pieces_of
from strategies.state.shard import name_of
from strategies.state.training_state import TrainingState


@dataclass(frozen=True)
class Copied:
    """A box of a full tensor and its contents, contiguous on the host."""

    name: str
    box: Box
    values: torch.Tensor


class Snapshot:
    """Copies of one share at a time; the memory is used again (page-locked where the state is on a GPU)."""

    def __init__(self, space: Space, device: torch.device) -> None:
        self.space = space
        self._device = device
        self._memory = torch.empty(0, dtype=torch.float32)
        self._copies: list[tuple[str, Span, torch.Tensor]] = []
        self._buffers: Mapping[str, torch.Tensor] = {}

    def take(self, state: TrainingState, spans: Spans, *, buffers: bool) -> None:
        """Copies all tensors of these spans, which this rank has, and with `buffers` the persistent ones of the model.

        Copies long ranges only; what is where in them is worked out later, behind training. Raises RuntimeError when a
        span is not here.
        """
        found = [
            (kind, Span(span.tensor, start, start + length), tensor[offset : offset + length])
            for span in spans
            for start, offset, length, state_shard in state.find(span)
            for kind, tensor in state_shard.kinds().items()
        ]
        size = sum(values.numel() for _, _, values in found)
        if size > self._memory.numel():
            self._memory = torch.empty(0, dtype=torch.float32)
            self._memory = torch.empty(size, dtype=torch.float32, pin_memory=self._device.type == "cuda")
        self._copies, at = [], 0
        with torch.no_grad():
            for kind, span, values in found:
                copy = self._memory[at : at + values.numel()]
                copy.copy_(values, non_blocking=True)
                self._copies.append((kind, span, copy))
                at += values.numel()
            self._buffers = {}
            if buffers:
                self._buffers = {name: value.detach().cpu() for name, value in state.blueprint.buffers.items()}
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def contents(self) -> Iterator[Copied]:
        """What was copied, as boxes of full tensors; valid until the next `take`."""
        for kind, span, copy in self._copies:
            for piece in pieces_of(self.space, span):
                first = piece.start - span.start
                yield Copied(name_of(kind, piece.slot.name), piece.box, copy[first : first + piece.box.numel])
        for name, value in sorted(self._buffers.items()):
            box = Box((0,) * value.dim(), tuple(value.shape))
            yield Copied(f"model.{name}", box, value.contiguous())
