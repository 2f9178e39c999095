"""Virtual replicas: virtual workers that train by themselves between two exchanges (`strategies.update.local`).

They are as virtual as the workers they are made of: a number in the job file. Which ranks compute one is the layout's:
a rank may have several, one after the other, and several ranks may share one. Ranks that do are an *island*. Plain
integers: no torch.
"""

from __future__ import annotations

from dataclasses import replace

from strategies.layout.assignment import deal
from strategies.layout.parallel import ParallelLayout


def members_of(layout: ParallelLayout, number: int) -> range:
    """The virtual workers of a virtual replica."""
    size = layout.virtual_workers // max(1, layout.virtual_replicas)
    return range(number * size, (number + 1) * size)


def islands_of(layout: ParallelLayout) -> tuple[tuple[int, ...], ...]:
    """Data-parallel coordinates that compute the same virtual replicas, in order; for each coordinate once."""
    found: dict[frozenset[int], list[int]] = {}
    for data in range(layout.data):
        found.setdefault(frozenset(replicas_at(layout, data)), []).append(data)
    return tuple(tuple(island) for island in found.values())


def replicas_at(layout: ParallelLayout, data: int) -> tuple[int, ...]:
    """The virtual replicas of which a data-parallel coordinate has virtual workers."""
    size = layout.virtual_workers // max(1, layout.virtual_replicas)
    return tuple(sorted({index // size for index in layout.assignment[data]}))


def island_of(layout: ParallelLayout, data: int) -> tuple[int, ...]:
    """The island that a data-parallel coordinate is in."""
    return next(island for island in islands_of(layout) if data in island)


def within(layout: ParallelLayout, number: int) -> ParallelLayout:
    """The layout of a virtual replica, as if there was nothing else: of the coordinates of its island."""
    members = members_of(layout, number)
    island = next(each for each in islands_of(layout) if number in replicas_at(layout, each[0]))
    assignment = tuple(tuple(index for index in layout.assignment[data] if index in members) for data in island)
    return replace(
        layout, data=len(island), assignment=assignment, spares=0, first=members.start, virtual_replicas=0
    )  # fmt: skip


def across(layout: ParallelLayout) -> ParallelLayout:
    """The layout in which virtual replicas are summed up: all coordinates of the data-parallel group, of which the
    first of each island brings what its replicas have."""
    leaders = {island[0] for island in islands_of(layout)}
    led = tuple(replicas_at(layout, data) if data in leaders else () for data in range(layout.data))
    return replace(layout, assignment=led, spares=0, virtual_replicas=0)


def share_out(virtual_workers: int, data: int, virtual_replicas: int) -> tuple[tuple[int, ...], ...]:
    """Deals virtual workers to data-parallel coordinates; with virtual replicas so that each has whole ones, or a part
    of one.

    >>> share_out(8, 3, 2)
    ((0, 1), (2, 3), (4, 5, 6, 7))
    """
    if not virtual_replicas:
        return deal(virtual_workers, [1.0] * data)
    size = virtual_workers // virtual_replicas
    if data <= virtual_replicas:
        return tuple(
            tuple(index for number in held for index in range(number * size, (number + 1) * size))
            for held in deal(virtual_replicas, [1.0] * data)
        )
    found: list[tuple[int, ...]] = []
    for number, ranks in enumerate(deal(data, [1.0] * virtual_replicas, least=1)):
        for held in deal(size, [1.0] * len(ranks)):
            found.append(tuple(number * size + index for index in held))
    return tuple(found)
