"""Who trains which part of the state, in a given layout: the one place that decides where state lives.

A rank *trains* what it keeps weights and optimizer tensors of and applies updates to. With `shard: none` that is
everything it computes with. Otherwise every rank of a data-parallel group (the ranks that compute the same part of the
model, one per replica) trains a shard of it (ZeRO, Rajbhandari et al. 2020). Where a shard then has fewer holders than
copies are wanted, ranks of other failure domains *mirror* it: they are sent its reduced gradient and apply the same
updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from strategies.layout.parallel import ParallelLayout
from strategies.layout.space import FlatRanges, Space
from strategies.layout.statemap import Span, Spans, union


class Domain(NamedTuple):
    """What a rank fails with: its zone, and its node in it ("": not known)."""

    zone: str
    node: str


@dataclass(frozen=True)
class Shard:
    """What `owner` reduces and trains; `mirrors` train it too. `ranges` are of the owner's tensor coordinate."""

    owner: int
    coordinate: int
    ranges: tuple[tuple[int, int], ...]
    mirrors: tuple[int, ...] = ()

    @property
    def spans(self) -> Spans:
        return union(Span(self.coordinate, start, stop) for start, stop in self.ranges)


def place_state(layout: ParallelLayout, space: Space, domains: Sequence[Domain], copies: int) -> list[Shard]:
    """The shard of every rank that computes, by rank, with as many mirrors as `copies` holders in all need.

    `domains` are by rank. Mirrors are chosen so that no zone, or else no node, or else no tensor-parallel group repeats
    while there is another, and then so that no rank holds many more copies than another; the answer depends on the
    arguments only. With fewer ranks than copies there are as many holders as ranks.

    Raises ValueError for fewer than one copy.
    """
    if copies < 1:
        raise ValueError(f"state needs at least one holder, got copies {copies}")
    shards = [_own(layout, space, rank) for rank in range(layout.num_placed)]
    natural = layout.data if layout.effective_shard == "none" else 1
    missing = min(copies, layout.num_placed) - natural
    if missing <= 0:
        return shards
    load = [0] * layout.num_placed
    placed = []
    for shard in shards:
        mirrors: list[int] = []
        # Replicas hold the same; one mirror serves them all, and the first of them sends to it.
        place = layout.place(shard.owner)
        assert place is not None
        if natural == 1 or place.data == 0:
            holders = layout.data_group(shard.owner) if natural > 1 else (shard.owner,)
            mirrors = choose_mirrors(layout, holders, missing, domains, load)
        placed.append(Shard(shard.owner, shard.coordinate, shard.ranges, tuple(mirrors)))
    return placed


def choose_mirrors(
    layout: ParallelLayout, has: Sequence[int], missing: int, domains: Sequence[Domain], load: list[int],
    *, near: bool = False,
) -> list[int]:  # fmt: skip
    """Up to `missing` ranks that are to hold what the ranks `has` have; `load` counts, by rank, what was given to each,
    and goes on to. With `near` they are in the zone of the first, as long as another of its nodes has a rank."""
    owner, holders = has[0], list(has)
    chosen: list[int] = []
    while len(chosen) < missing and len(holders) < layout.num_placed:
        zones = {domains[rank].zone for rank in holders}
        nodes = {domains[rank] for rank in holders}
        groups = {rank // layout.tensor for rank in holders}
        mirror = min(
            (rank for rank in range(layout.num_placed) if rank not in holders),
            key=lambda rank: (
                near and (domains[rank].zone != domains[owner].zone or domains[rank] in nodes),
                domains[rank].zone in zones, domains[rank] in nodes, rank // layout.tensor in groups, load[rank],
                (rank - owner) % layout.num_placed,
            ),
        )  # fmt: skip
        load[mirror] += 1
        holders.append(mirror)
        chosen.append(mirror)
    return chosen


def _own(layout: ParallelLayout, space: Space, rank: int) -> Shard:
    place = layout.place(rank)
    assert place is not None
    ranges = space.ranges_of(layout.blocks_of(place.stage))
    match layout.effective_shard:
        case "none":
            pass
        case "parameters":
            ranges = row_ranges(space, ranges, layout.data, place.data)
        case _:
            flat = FlatRanges.of(ranges, space.boundary)
            sizes = space.slices(flat, layout.data)
            start = sum(sizes[: place.data])
            ranges = flat.cut(start, start + sizes[place.data])
    return Shard(rank, place.tensor, tuple(ranges))


def row_ranges(space: Space, ranges: Sequence[tuple[int, int]], parts: int, part: int) -> list[tuple[int, int]]:
    """What FSDP2 gives the `part`-th of `parts` ranks: of every parameter the rows of its chunk (torch.chunk)."""
    found = []
    for slot in space.slots:
        if any(start <= slot.offset < stop for start, stop in ranges):
            rows = slot.shape[0] if slot.shape else 1
            width = slot.numel // rows if rows else 0
            chunk = -(-rows // parts)
            first, last = min(rows, chunk * part), min(rows, chunk * (part + 1))
            if first < last:
                # Who has the last row also has the padding after it.
                stop = slot.stop if last == rows else slot.offset + last * width
                found.append((slot.offset + first * width, stop))
    return found


def trained_spans(layout: ParallelLayout, shards: Sequence[Shard]) -> list[Spans]:
    """What each rank of the world trains, by rank; nothing for spares."""
    trained: list[list[Spans]] = [[] for _ in range(layout.world_size)]
    for shard in shards:
        for rank in (shard.owner, *shard.mirrors):
            trained[rank].append(shard.spans)
    return [union(*spans) for spans in trained]
