"""The canonical summation tree over virtual workers.

Floating-point addition is not associative, so a sum is only reproducible when its order is. The order here is one
binary tree over the virtual worker indices, fixed by its root alone: a node over ``[start, stop)`` splits after the
largest power of two below its size (for powers of two: in half). Any set of virtual workers is covered by a unique
smallest set of whole subtrees, so a rank may send partial sums instead of single gradients and the total still has
the same bits, no matter which rank holds what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

Subtree = tuple[int, int]
"""A subtree: the virtual workers ``start <= index < stop``."""

T = TypeVar("T")


def split(node: Subtree) -> tuple[Subtree, Subtree]:
    """The two children of a node over at least two virtual workers.

    >>> split((0, 6))
    ((0, 4), (4, 6))
    """
    start, stop = node
    if stop - start < 2:
        raise ValueError(f"a leaf has no children: {node}")
    middle = start + (1 << (stop - start - 1).bit_length() - 1)
    return (start, middle), (middle, stop)


def cover(held: Iterable[int], root: Subtree) -> tuple[Subtree, ...]:
    """The largest whole subtrees of the tree under `root` inside a set of virtual workers, in index order.

    >>> cover([0, 1, 2, 5], (0, 8))
    ((0, 2), (2, 3), (5, 6))
    """
    indices = frozenset(held)
    if indices and not (min(indices) >= root[0] and max(indices) < root[1]):
        raise ValueError(f"virtual workers {sorted(indices)} are not all in [{root[0]}, {root[1]})")
    nodes: list[Subtree] = []

    def visit(node: Subtree) -> None:
        start, stop = node
        inside = sum(1 for index in indices if start <= index < stop)
        if inside == stop - start:
            nodes.append(node)
        elif inside:
            for child in split(node):
                visit(child)

    if root[0] < root[1]:
        visit(root)
    return tuple(nodes)


def fold(pieces: Mapping[Subtree, T], root: Subtree, add: Callable[[T, T], T]) -> T:
    """Adds pieces, one per subtree, along the tree under `root`; `add` may work in place on its first argument.

    Raises ValueError when the pieces do not cover every virtual worker exactly once.
    """
    used = 0

    def total(node: Subtree) -> T:
        nonlocal used
        if node in pieces:
            used += 1
            return pieces[node]
        if node[1] - node[0] < 2:
            raise ValueError(f"no piece covers virtual worker {node[0]}; pieces: {sorted(pieces)}")
        left, right = split(node)
        return add(total(left), total(right))

    result = total(root)
    if used != len(pieces):
        raise ValueError(f"pieces overlap over {root[1] - root[0]} virtual workers: {sorted(pieces)}")
    return result
