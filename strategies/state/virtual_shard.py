"""What a rank has of the state of a virtual thing: fp32 tensors for some ranges, as they are and as they will be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from strategies.layout.space import FlatRanges
from strategies.layout.statemap import Span, Spans, union
from strategies.state.buffers import Buffer


class VirtualShard:
    """`flat` ranges of the coordinate that a virtual thing has for itself (`strategies.layout.virtual`).

    What a step makes of it is put into `prepared`, and counts from `commit` on: a step that is interrupted or skipped
    leaves it as it was. What is not filled is zero. `is_made` says whether it is computed here, or is a copy.
    """

    def __init__(
        self, coordinate: int, flat: FlatRanges, kinds: Sequence[str], device: torch.device, *, is_made: bool = False
    ) -> None:  # fmt: skip
        self.is_made = is_made
        self.coordinate = coordinate
        self.flat = flat
        self.device = device
        self._kinds = {kind: Buffer(flat, torch.zeros(flat.size, device=device)) for kind in kinds}
        self._prepared: dict[str, torch.Tensor] = {}
        self._is_prepared: set[str] = set()

    @property
    def spans(self) -> Spans:
        return union(Span(self.coordinate, start, stop) for start, stop in self.flat.ranges)

    @property
    def num_bytes(self) -> int:
        """Of what it is and will be."""
        return sum(b.num_bytes for b in self._kinds.values()) + sum(4 * p.numel() for p in self._prepared.values())

    def kinds(self) -> dict[str, Buffer]:
        """See `StateShard.kinds`."""
        return self._kinds

    def locate(self, span: Span) -> Iterator[tuple[int, int, int]]:
        """See `StateShard.locate`."""
        if span.tensor == self.coordinate:
            yield from self.flat.locate(span.start, span.stop)

    def now(self, kind: str) -> torch.Tensor:
        """What counts [flat.size]; to be read, not written."""
        return self._kinds[kind].values

    def prepared(self, kind: str) -> torch.Tensor:
        """What is to count from the next commit on [flat.size]; to be filled, in a step that will be voted on."""
        if kind not in self._prepared:
            self._prepared[kind] = torch.zeros_like(self._kinds[kind].values)
        self._is_prepared.add(kind)
        return self._prepared[kind]

    def has_prepared(self, kinds: Iterable[str]) -> bool:
        """Whether what is to count from the next commit on is there, of all these."""
        return self._is_prepared.issuperset(kinds)

    def to_send(self, kind: str) -> torch.Tensor:
        """What is to count from the next commit on, for a copy: that of a step that changes nothing is what it is."""
        is_prepared = kind in self._is_prepared
        found = self.prepared(kind)
        return found if is_prepared else found.copy_(self.now(kind))

    def commit(self) -> None:
        """What was prepared counts."""
        for kind in self._is_prepared:
            buffer = self._kinds[kind]
            buffer.values, self._prepared[kind] = self._prepared[kind], buffer.values
        self._is_prepared.clear()

    def zero(self) -> None:
        """As at step 0."""
        for buffer in self._kinds.values():
            buffer.zero()

    def discard(self) -> None:
        """What was prepared will never count."""
        self._is_prepared.clear()
