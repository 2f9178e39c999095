"""What of the reduced gradient each rank speaks for, so that every element of the whole is spoken for once."""

from __future__ import annotations

from strategies.layout.parallel import Coordinates, ParallelLayout
from strategies.layout.space import Space, merge
from strategies.reduction.norm import square_sum
from strategies.state.shard import StateShard


def counted(
    space: Space, own: StateShard | None, layout: ParallelLayout, place: Coordinates | None
) -> list[tuple[int, int]]:
    """The ranges of the gradient of `own` that the rank at `place` speaks for: of what all replicas hold its slice; and
    what all tensor-parallel coordinates have, the first does."""
    if place is None or own is None:
        return []
    window = (0, own.flat.size)
    if layout.effective_shard == "none":
        sizes = space.slices(own.flat, layout.data)
        start = sum(sizes[: place.data])
        window = (start, start + sizes[place.data])
    if place.tensor == 0:
        return [window]
    found = []
    for slot in space.slots:
        if slot.dim is not None:
            for _, offset, length in own.flat.locate(slot.offset, slot.stop):
                low, high = max(offset, window[0]), min(offset + length, window[1])
                if low < high:
                    found.append((low, high))
    return merge(found)


def square_sum_of(own: StateShard | None, ranges: list[tuple[int, int]]) -> int | None:
    """Of the reduced gradient in these ranges; None when it is not finite there."""
    return 0 if own is None else square_sum(*(own.gradient[start:stop] for start, stop in ranges))
