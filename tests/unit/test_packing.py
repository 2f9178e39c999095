"""Documents become pieces and rows: nothing lost, nothing twice, hardly any padding."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data import resolve_files
from orchestrator.data.packing import best_fit, cut

quick = settings(max_examples=200, deadline=None)


def functions_of_the_standard_library() -> np.ndarray:
    """The lengths in bytes, with one for an end, of what lies between two `def` or `class` of a file: int64 [n]."""
    begins = re.compile(rb"^(?= *(?:async )?(?:def|class) )", re.MULTILINE)
    lengths = []
    for file in resolve_files("python-stdlib"):
        with open(file.url, "rb") as stream:
            lengths += [len(part) + 1 for part in begins.split(stream.read()) if part]
    return np.array(lengths, dtype=np.int64)


def naive_best_fit(lengths: list[int], row: int) -> list[int]:
    """How full the rows are, as the words say it: from the longest on, each into the fullest row with room."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(row - length)
    return sorted(row - room for room in rooms)


@quick
@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(3, 40))
def test_every_token_but_a_documents_first_is_a_target_once(documents: list[int], row: int) -> None:
    pieces = cut(np.array(documents), row)
    assert all(2 <= length <= row for length in pieces.lengths)
    targets = [
        place
        for start, length in zip(pieces.starts, pieces.lengths, strict=True)
        for place in range(start + 1, start + length)
    ]
    begins = np.cumsum([0, *documents])
    assert targets == sorted(set(range(int(begins[-1]))) - set(begins.tolist()))


@quick
@given(st.integers(2, 40).flatmap(lambda row: st.tuples(st.just(row), st.lists(st.integers(1, row), max_size=80))))
def test_packing_is_best_fit_decreasing(case: tuple[int, list[int]]) -> None:
    row, lengths = case
    found = best_fit(np.array(lengths, dtype=np.int64), row)
    assert len(found) == len(lengths)
    if lengths:
        assert sorted(np.bincount(found, weights=lengths)) == naive_best_fit(lengths, row)
        _, first = np.unique(found, return_index=True)
        assert sorted(first) == first.tolist(), "rows are numbered by their first piece"


def test_a_piece_that_fits_in_no_row_is_refused() -> None:
    for lengths in ([3, 9], [3, 0]):
        with pytest.raises(ValueError, match="do not fit into rows of 8"):
            best_fit(np.array(lengths), 8)


@pytest.mark.parametrize("length", [256, 512])
def test_functions_of_the_standard_library_pack_with_hardly_any_padding(length: int) -> None:
    pieces = cut(functions_of_the_standard_library(), length + 1)
    rows = best_fit(pieces.lengths, length + 1)
    full = np.bincount(rows, weights=pieces.lengths)
    assert full.max() <= length + 1
    padding = 1.0 - full.sum() / (len(full) * (length + 1))
    print(f"{len(pieces)} pieces in {len(full)} rows of {length + 1}: {padding:.3%} padding")
    assert padding < 0.02


def test_many_lengths_and_large_rows_are_packed_whole() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    documents = np.maximum(1, rng.lognormal(6.0, 1.5, 100_000)).astype(np.int64)
    pieces = cut(documents, 4097)
    rows = best_fit(pieces.lengths, 4097)
    assert int(np.bincount(rows, weights=pieces.lengths).max()) <= 4097
    assert pieces.lengths.sum() > 0.98 * 4097 * (rows.max() + 1)
