"""How the tokens of one store become samples: cut at a fixed length, packed from whole documents, or one by one.

A `Cut` knows the samples of a store by their ids, and no step, seed or virtual worker.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.packing import best_fit, cut
from orchestrator.data.sources import DataError
from orchestrator.data.store import TokenStore

Packing = Literal["stream", "pack", "pad"]


class Rows(NamedTuple):
    """Samples as rows, one each, or of records that have several sequences as many. `tokens` int64 [n, width + 1];
    `documents`: of which document of its row each is, int32 of that shape, -1 for padding (None: all are of one);
    `marks`: which tokens a model is trained to predict, bool of that shape (None: all); `labels` int64 [samples] of
    records that have some, as `orchestrator.data.labels` decodes them."""

    tokens: NDArray[np.int64]
    documents: NDArray[np.int32] | None = None
    marks: NDArray[np.bool_] | None = None
    labels: NDArray[np.int64] | None = None


class Cut(Protocol):
    """The samples of a store, whose ids are 0 to num_samples - 1."""

    num_samples: int

    def targets(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many tokens each of these samples [n] trains the model to predict: int64 [n]."""

    def rows(self, ids: NDArray[np.int64], width: int) -> Rows:
        """The tokens of these samples [n], as rows of width + 1."""


class Stream:
    """Documents end to end, cut every `length` tokens. With `mask`, tokens of different documents are told apart."""

    def __init__(self, store: TokenStore, length: int, *, mask: bool) -> None:
        self.num_samples = store.num_samples(length)
        self._store = store
        self._length = length
        self._starts = np.cumsum(lengths := store.document_lengths()) - lengths if mask else None

    def targets(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Cut`. The first token of a document is not predicted from another document."""
        if self._starts is None:
            return np.full(len(ids), self._length, dtype=np.int64)
        first = ids * self._length
        before, until = (np.searchsorted(self._starts, place, side="right") for place in (first, first + self._length))
        return self._length - (until - before)

    def rows(self, ids: NDArray[np.int64], width: int) -> Rows:
        """See `Cut`; the width is always the length."""
        tokens = self._store.samples(ids, width)
        if self._starts is None:
            return Rows(tokens)
        places = ids[:, None] * self._length + np.arange(width + 1)
        documents = np.searchsorted(self._starts, places, side="right")
        return Rows(tokens, (documents - documents[:, :1]).astype(np.int32))


class Bins:
    """Pieces of a store, from `starts` on and of these `lengths`, put side by side into rows of `size` tokens.

    `counts`: how many a row has, int64 [rows]; `padding`: the share of the rows' tokens that is in none.
    """

    def __init__(self, starts: NDArray[np.int64], lengths: NDArray[np.int64], size: int) -> None:
        row = best_fit(lengths, size)
        self._order = np.argsort(row, kind="stable")
        self.num_rows = int(row.max()) + 1
        self._starts, self._lengths = starts[self._order], lengths[self._order]
        self.counts: NDArray[np.int64] = np.bincount(row, minlength=self.num_rows)
        self._bounds = np.concatenate([[0], np.cumsum(self.counts)])
        self.padding = 1.0 - int(lengths.sum()) / (self.num_rows * size)

    def sums(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of what each piece has, what each row has: int64 [rows]."""
        found: NDArray[np.int64] = np.add.reduceat(values[self._order], self._bounds[:-1])
        return found

    def read(
        self, store: TokenStore, ids: NDArray[np.int64], width: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:  # fmt: skip
        """The tokens of rows, int64 [n, width + 1], and which piece of its row each is of, int32, -1 in none."""
        tokens = np.zeros((len(ids), width + 1), dtype=np.int64)
        places = np.full(tokens.shape, -1, dtype=np.int32)
        for index, (first, stop) in enumerate(zip(self._bounds[ids], self._bounds[ids + 1], strict=True)):
            at = 0
            for number in range(stop - first):
                start, length = int(self._starts[first + number]), int(self._lengths[first + number])
                store.read(start, tokens[index, at : at + length])
                places[index, at : at + length] = number
                at += length
        return tokens, places


class Packed:
    """Whole documents (those longer than a row in pieces) packed into rows of length + 1 tokens, padded at the end.

    `padding` is the share of the rows' tokens that is padding. With `mask`, the documents of a row are told apart.
    """

    def __init__(self, store: TokenStore, length: int, *, mask: bool) -> None:
        pieces = cut(store.document_lengths(), length + 1)
        _need(len(pieces), store)
        self._store, self._mask = store, mask
        self._bins = Bins(pieces.starts, pieces.lengths, length + 1)
        self.num_samples, self.padding = self._bins.num_rows, self._bins.padding
        counts = self._bins.counts
        tokens = self._bins.sums(pieces.lengths)
        self._targets: NDArray[np.int64] = tokens - (counts if mask else np.ones_like(counts))

    def targets(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Cut`."""
        found: NDArray[np.int64] = self._targets[ids]
        return found

    def rows(self, ids: NDArray[np.int64], width: int) -> Rows:
        """See `Cut`; the width is always the length."""
        tokens, places = self._bins.read(self._store, ids, width)
        return Rows(tokens, places if self._mask else np.minimum(places, 0))


class Padded:
    """A document (or a piece of one longer than a row) is a sample. `lengths` are in tokens, int64 [samples]."""

    def __init__(self, store: TokenStore, length: int) -> None:
        pieces = cut(store.document_lengths(), length + 1)
        _need(len(pieces), store)
        self.num_samples = len(pieces)
        self.lengths = pieces.lengths
        self._starts = pieces.starts
        self._store = store

    def targets(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Cut`."""
        return self.lengths[ids] - 1

    def rows(self, ids: NDArray[np.int64], width: int) -> Rows:
        """See `Cut`; the width is at least that of the longest."""
        tokens = np.zeros((len(ids), width + 1), dtype=np.int64)
        documents = np.full(tokens.shape, -1, dtype=np.int32)
        for index, (start, length) in enumerate(zip(self._starts[ids], self.lengths[ids], strict=True)):
            self._store.read(int(start), tokens[index, :length])
            documents[index, :length] = 0
        return Rows(tokens, documents)


def _need(pieces: int, store: TokenStore) -> None:
    if not pieces:
        raise DataError(
            f"data.source: {store.source} has no document of at least two tokens (its end included), so there is "
            "nothing to predict; add text"
        )
