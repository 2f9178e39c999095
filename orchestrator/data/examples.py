"""Records as samples: each by itself, or several packed into a row. See `orchestrator.data.cuts` and `records`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.cuts import Bins, Rows
from orchestrator.data.labels import LabelSpec
from orchestrator.data.manifest import RecordsEntry
from orchestrator.data.records import MARK
from orchestrator.data.sources import DataError
from orchestrator.data.store import TokenStore

_IDS = int(MARK) - 1


class Examples:
    """A record is a sample: one sequence, or as many rows as it has. `lengths` are of the longest of them, in tokens,
    int64 [samples]."""

    def __init__(self, store: TokenStore, records: RecordsEntry, labels: LabelSpec | None) -> None:
        whole = store.document_lengths()
        if not len(whole):
            raise DataError(f"data.source: {store.source} has no record that can be used; {_told(records)}")
        self._store, self._labels, self._words = store, labels, records.label_words
        self.sequences = records.sequences
        self.num_samples = len(whole) // self.sequences
        self._starts = np.cumsum(whole) - whole
        self._sizes = whole - self._words
        self.lengths: NDArray[np.int64] = self._sizes.reshape(-1, self.sequences).max(axis=1)
        self._targets: NDArray[np.int64] = store.counted().reshape(-1, self.sequences).sum(axis=1)

    def targets(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Cut`."""
        found: NDArray[np.int64] = self._targets[ids]
        return found

    def rows(self, ids: NDArray[np.int64], width: int) -> Rows:
        """See `Cut`; the width is at least that of the longest. The rows of a sample follow one another."""
        numbers = (ids[:, None] * self.sequences + np.arange(self.sequences)).reshape(-1)
        tokens = np.zeros((len(numbers), width + 1), dtype=np.int64)
        documents = np.full(tokens.shape, -1, dtype=np.int32)
        words = np.zeros((len(numbers), self._words), dtype=np.uint32)
        for index, number in enumerate(numbers.tolist()):
            size = int(self._sizes[number])
            line = np.empty(size + self._words, dtype=np.int64)
            self._store.read(int(self._starts[number]), line)
            tokens[index, :size] = line[:size]
            documents[index, :size] = 0
            words[index] = line[size:].astype(np.uint32)
        return _unmarked(tokens, documents, self._decoded(words))

    def labels(self, ids: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """The labels of these samples, int64 [n]; None where records have none."""
        words = np.zeros((len(ids), self._words), dtype=np.uint32)
        for index, number in enumerate((ids * self.sequences).tolist()):
            line = np.empty(self._words, dtype=np.int64)
            self._store.read(int(self._starts[number] + self._sizes[number]), line)
            words[index] = line.astype(np.uint32)
        return self._decoded(words)

    def _decoded(self, words: NDArray[np.uint32]) -> NDArray[np.int64] | None:
        return None if self._labels is None else self._labels.decode(words[:: self.sequences])


class PackedExamples:
    """Records of one sequence, without labels, packed into rows of length + 1 tokens, padded at the end; as of a store
    none is longer than a row. `padding` and `mask` as in `orchestrator.data.cuts.Packed`."""

    sequences = 1

    def __init__(self, store: TokenStore, records: RecordsEntry, length: int, *, mask: bool) -> None:
        lengths = store.document_lengths()
        if not len(lengths):
            raise DataError(f"data.source: {store.source} has no record that can be used; {_told(records)}")
        self._store, self._mask = store, mask
        self._bins = Bins(np.cumsum(lengths) - lengths, lengths, length + 1)
        self.num_samples, self.padding = self._bins.num_rows, self._bins.padding
        # What a record begins with is not predicted from the record before it, mask or no mask.
        self._targets: NDArray[np.int64] = self._bins.sums(store.counted())

    def targets(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Cut`."""
        found: NDArray[np.int64] = self._targets[ids]
        return found

    def rows(self, ids: NDArray[np.int64], width: int) -> Rows:
        """See `Cut`; the width is always the length."""
        tokens, places = self._bins.read(self._store, ids, width)
        begins = np.ones(tokens.shape, dtype=np.bool_)
        begins[:, 1:] = places[:, 1:] != places[:, :-1]
        documents = places if self._mask else np.minimum(places, 0)
        found = _unmarked(tokens, documents, None)
        assert found.marks is not None
        return found._replace(marks=found.marks & ~begins)


def _unmarked(tokens: NDArray[np.int64], documents: NDArray[np.int32], labels: NDArray[np.int64] | None) -> Rows:
    return Rows(tokens & _IDS, documents, (tokens & int(MARK)) != 0, labels)


def _told(records: RecordsEntry) -> str:
    first = "; ".join(records.first_skipped)
    return f"{records.skipped:,} bad ones were left out: {first}" if records.skipped else "it holds none"
