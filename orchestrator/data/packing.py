"""Documents of any length as pieces of at most one row, and pieces as rows that are nearly full.

Knows lengths only: neither tokens nor where they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class DocumentPieces:
    """Runs of tokens, in the order of the documents they are of: int64 [pieces] each. `starts` are places in the line
    of all tokens."""

    starts: Int64s
    lengths: Int64s

    def __len__(self) -> int:
        return len(self.starts)


def cut(documents: Int64s, row: int) -> DocumentPieces:
    """Documents of these lengths [documents], in pieces of 2 to `row` tokens.

    Neighbouring pieces of a document share one token, so that every token of it but the first is a target once. A
    document of one token has no target and so no piece.
    """
    step = row - 1
    first = np.cumsum(documents) - documents
    counts = np.maximum(documents - 2, -1) // step + 1  # ceil((n - 1) / step), and 0 for a single token
    owner = np.repeat(np.arange(len(documents)), counts)
    offsets = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * step
    return DocumentPieces(first[owner] + offsets, np.minimum(documents[owner] - offsets, row))


def best_fit(lengths: Int64s, row: int) -> Int64s:
    """The row, counted from 0, that each piece of these lengths [pieces] (1 to `row`) goes into: int64 [pieces].

    Best-fit decreasing, the packing of Ding et al., "Fewer Truncations Improve Language Modeling" (ICML 2024): from the
    longest piece to the shortest, each goes into the fullest row that has room for it. Rows with the same room are kept
    together, and pieces of one length are dealt to all of those at once, so that the time grows with the number of
    different lengths, not with that of pieces times rows. Rows are numbered by their first piece.

    Raises ValueError for a length out of range.
    """
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= row):
        raise ValueError(f"best_fit: lengths from {lengths.min()} to {lengths.max()} do not fit into rows of {row}")
    longest_first = np.argsort(-lengths, kind="stable")
    sizes, first = np.unique(-lengths[longest_first], return_index=True)
    ends = np.append(first[1:], len(lengths))[: len(first)].tolist()
    found = np.empty(len(lengths), dtype=np.int64)
    waiting: dict[int, list[Int64s]] = {}  # rows by the room they have
    rooms = 0  # bit r is set when there are rows with room r
    num_rows = 0
    for size, begin, end in zip((-sizes).tolist(), first.tolist(), ends, strict=True):
        while begin < end:
            fitting = rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                rows = waiting[room].pop()
                if not waiting[room]:
                    rooms ^= 1 << room
            else:
                room = row
                rows = np.arange(num_rows, num_rows - (begin - end) // (row // size))
                num_rows += len(rows)
            # A row that was the best fit for a piece is so for the next of that length, until it has no room for it.
            each = room // size
            used = min(len(rows), -((begin - end) // each))
            if used < len(rows):
                waiting.setdefault(room, []).append(rows[used:])
                rooms |= 1 << room
                rows = rows[:used]
            taken = min(end - begin, used * each)
            found[longest_first[begin : begin + taken]] = np.repeat(rows, each)[:taken]
            last = each - (used * each - taken)  # pieces that the last of these rows got
            for group, left in ((rows[:-1], room - each * size), (rows[-1:], room - last * size)):
                if left and len(group):
                    waiting.setdefault(left, []).append(group)
                    rooms |= 1 << left
            begin += taken
    return _renumbered(found, num_rows)


def _renumbered(found: Int64s, num_rows: int) -> Int64s:
    """Rows in the order of their first pieces."""
    _, first = np.unique(found, return_index=True)
    assert len(first) == num_rows, "a row without a piece"
    number = np.empty(num_rows, dtype=np.int64)
    number[np.argsort(first)] = np.arange(num_rows)
    return number[found]
