"""State that a rank trains: weights, optimizer tensors and reduced gradient of some ranges, and their updates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from strategies.compat import step
from strategies.layout.space import FlatRanges, Space
from strategies.layout.statemap import Span, Spans, union
from strategies.model.randomness import stream_key
from strategies.optim.groups import Part
from strategies.optim.spec import OptimizerSpec
from strategies.state.buffers import Buffer, Spaces, kept_of, make_buffer

WEIGHTS = "weights"
CHUNK_ELEMENTS = 1 << 24
"""Elements that are updated at a time, where the optimizer's tensors are of another type or elsewhere: a multiple of
`strategies.layout.space.ALIGNMENT`."""
KEPT = "update."
"""What the names of an update rule's own kinds of state begin with."""


def name_of(kind: str, parameter: str) -> str:
    """The name of a full tensor of the state: a parameter itself, or what the optimizer or the update rule keeps for
    it."""
    if kind.startswith(KEPT):
        return f"{kind}.{parameter}"
    return f"model.{parameter}" if kind == WEIGHTS else f"optimizer.{kind}.{parameter}"


class StateShard:
    """Flat ranges of the state of one tensor-parallel coordinate, each kind of tensor in one buffer [flat.size], or in
    less, where the optimizer keeps less of a parameter than its shape has elements.

    The optimizer's tensors are of the type that `spec` says, and those that the update rule has `kept` (by kind) fp32.
    With `weights` (a buffer of that size) those are used, not new ones. What is not filled is zero. `spaces` have the
    slots, by which an optimizer tells parameters apart, with what it keeps of each; without, it cannot, and keeps all.

    With `spec.offload` all but weights that are given are kept in host memory, and come to `device` for an update, some
    at a time; it is the same update.
    """

    def __init__(
        self,
        coordinate: int,
        flat: FlatRanges,
        spec: OptimizerSpec,
        device: torch.device,
        weights: torch.Tensor | None = None,
        kept: Sequence[str] = (),
        spaces: Spaces | None = None,
    ) -> None:
        self.coordinate = coordinate
        self.flat = flat
        self.spec = spec
        space: Space | None = spaces[WEIGHTS] if spaces else None
        self._slots = space.slots if space is not None else ()
        self.device = device
        home = torch.device("cpu") if spec.offload else device
        self.weights = torch.zeros(flat.size, dtype=torch.float32, device=home) if weights is None else weights
        self.moments: dict[str, Buffer] = {}
        for name in spec.moments:
            reduced = spaces is not None and spaces[name] is not space
            has = kept_of(flat, spaces[name]) if spaces is not None and reduced else flat
            self.moments[name] = make_buffer(has, spec.state, home, is_square=name in spec.kind.squares)
        self.kept = {kind: torch.zeros(flat.size, dtype=torch.float32, device=home) for kind in kept}
        self._kinds = {
            WEIGHTS: Buffer(flat, self.weights), **self.moments,
            **{kind: Buffer(flat, values) for kind, values in self.kept.items()},
        }  # fmt: skip
        self._gradient: torch.Tensor | None = None
        self.keeps_gradient = True
        """Whether the memory of the gradient is kept from one update to the next."""
        self._updates = 0
        self._optimizer: torch.optim.Optimizer | None = None
        self._counters: list[torch.Tensor] = []
        self._bound: list[tuple[nn.Parameter, Part]] = []

    @property
    def gradient(self) -> torch.Tensor:
        """The reduced gradient [flat.size], to be filled before `apply`."""
        if self._gradient is None:
            self._gradient = torch.zeros(self.flat.size, dtype=torch.float32, device=self.device)
        return self._gradient

    @property
    def spans(self) -> Spans:
        return union(Span(self.coordinate, start, stop) for start, stop in self.flat.ranges)

    @property
    def num_bytes(self) -> int:
        """Of weights, optimizer tensors and what the update rule keeps."""
        return sum(buffer.num_bytes for buffer in self._kinds.values())

    def kinds(self) -> dict[str, Buffer]:
        """All that a span stands for, by kind, in a fixed order."""
        return self._kinds

    def locate(self, span: Span) -> Iterator[tuple[int, int, int]]:
        """Like `FlatRanges.locate`; nothing for another coordinate's span."""
        if span.tensor == self.coordinate:
            yield from self.flat.locate(span.start, span.stop)

    def set_updates(self, updates: int) -> None:
        """Says how many updates this state has seen."""
        self._updates = updates
        for counter in self._counters:
            counter.fill_(updates)

    def apply(self, lr: float) -> None:
        """One optimizer update from `gradient` at learning rate `lr`; local, deterministic, no communication."""
        self._updates += 1
        if not self.flat.size:
            return
        if not self.spec.offload and self.spec.state == "fp32":
            self._apply_in_place(lr)
        else:
            self._apply_in_chunks(lr)
        if not self.keeps_gradient:
            self._gradient = None

    def _apply_in_place(self, lr: float) -> None:
        if self._optimizer is None:
            self._optimizer = self._bind()
        for parameter, part in self._bound:
            parameter.grad = _of_part(self.gradient, part)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        step(self._optimizer)
        if not self.keeps_gradient:
            for parameter, _ in self._bound:
                parameter.grad = None

    def _bind(self) -> torch.optim.Optimizer:
        parts = self.spec.parts(self.flat, self._slots)
        parameters = [nn.Parameter(_of_part(self.weights, part)) for part in parts]
        optimizer = self.spec.build(list(zip(parameters, parts, strict=True)))
        for parameter, part in zip(parameters, parts, strict=True):
            self._bound.append((parameter, part))
            state = {
                name: self.moments[name].values[start : start + math.prod(shape)].view(shape)
                for name, start, shape in self._moments_of(part)
            }
            if self.spec.kind.counts_updates:
                counter = torch.tensor(float(self._updates - 1), dtype=torch.float32, device=self.device)
                self._counters.append(counter)
                state["step"] = counter
            optimizer.state[parameter] = state
        return optimizer

    def _moments_of(self, part: Part) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        """What the optimizer keeps of a part: its name, where it begins in its buffer, and its shape."""
        (first, _), *_ = self.flat.cut(part.start, part.stop)
        for name, buffer in self.moments.items():
            for _, start, _ in buffer.locate(first, first + 1):
                usual = (part.stop - part.start,) if part.shape is None else part.shape
                kept = usual if part.shape is None else self.spec.kind.shape_of(name, part.shape, is_whole=True)
                assert kept is not None
                yield name, start, kept

    def _apply_in_chunks(self, lr: float) -> None:
        """The same update of every element: where a buffer is cut makes no difference, as long as that is where vector
        registers end."""
        for part in self.spec.parts(self.flat, self._slots):
            if part.shape is not None:
                self._apply_chunk(part, lr)
                continue
            for start in range(part.start, part.stop, CHUNK_ELEMENTS):
                self._apply_chunk(part._replace(start=start, stop=min(start + CHUNK_ELEMENTS, part.stop)), lr)

    def _apply_chunk(self, part: Part, lr: float) -> None:
        with torch.no_grad():
            weights = _of_part(self.weights, part)
            parameter = nn.Parameter(weights.to(self.device))
            parameter.grad = _of_part(self.gradient, part)
            optimizer = self.spec.build([(parameter, part)])
            moments = list(self._moments_of(part))
            state = {}
            for name, start, shape in moments:
                found = self.moments[name].read(start, math.prod(shape))
                state[name] = found.to(self.device, torch.float32, copy=True).view(shape)
            optimizer.state[parameter] = dict(state)
            if self.spec.kind.counts_updates:
                counter = torch.tensor(float(self._updates - 1), dtype=torch.float32, device=self.device)
                optimizer.state[parameter]["step"] = counter
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            step(optimizer)
            if parameter.data_ptr() != weights.data_ptr():
                weights.copy_(parameter)
            numbers = {name: number for number, name in enumerate(self.moments)}
            for name, start, _ in moments:
                key = stream_key(self.spec.seed, "round", self._updates, numbers[name])
                self.moments[name].update(start, state[name].reshape(-1), key)


def _of_part(buffer: torch.Tensor, part: Part) -> torch.Tensor:
    """A view: of a matrix that is updated as one, in its shape."""
    found = buffer[part.start : part.stop]
    return found if part.shape is None else found.view(part.shape)
