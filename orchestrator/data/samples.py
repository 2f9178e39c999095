"""The samples of one store, or of several one after the other: whatever kind they are of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.cuts import Cut, Packed, Packing, Padded, Rows, Stream
from orchestrator.data.examples import Examples, PackedExamples
from orchestrator.data.labels import LabelSpec
from orchestrator.data.store import TokenStore


def cut_of(store: TokenStore, packing: Packing, length: int, *, mask: bool, labels: LabelSpec | None = None) -> Cut:
    """The samples of a store; `labels` are those of its records. Raises DataError when there are none."""
    if (records := store.records) is not None:
        if packing == "pack":
            return PackedExamples(store, records, length, mask=mask)
        return Examples(store, records, labels)
    if packing == "stream":
        return Stream(store, length, mask=mask)
    return Packed(store, length, mask=mask) if packing == "pack" else Padded(store, length)


class Line:
    """The samples of `cuts` one after the other: ids of a cut follow those of the cut before."""

    def __init__(self, cuts: Sequence[Cut]) -> None:
        self.cuts = tuple(cuts)
        self.sizes = [each.num_samples for each in self.cuts]
        self.offsets = np.cumsum([0, *self.sizes[:-1]])
        self.sequences: int = getattr(self.cuts[0], "sequences", 1)
        """Rows of a sample."""

    @property
    def lengths(self) -> NDArray[np.int64] | None:
        """In tokens, by id, int64 [samples]; None where all samples have one length."""
        padded = [each.lengths for each in self.cuts if isinstance(each, (Padded, Examples))]
        return np.concatenate(padded) if padded else None

    @property
    def padding(self) -> float:
        """The share of padding in packed rows; 0 where rows are not packed."""
        packed = [each for each in self.cuts if isinstance(each, (Packed, PackedExamples))]
        rows = sum(each.num_samples for each in packed)
        return sum(each.padding * each.num_samples for each in packed) / rows if rows else 0.0

    def targets(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many tokens each of these samples [n] trains the model to predict: int64 [n]."""
        found = np.empty(len(ids), dtype=np.int64)
        for cut, where, inside in self._by_cut(ids):
            found[where] = cut.targets(inside)
        return found

    def labels(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Their labels, int64 [n], where samples have some."""
        found = np.empty(len(ids), dtype=np.int64)
        for cut, where, inside in self._by_cut(ids):
            assert isinstance(cut, Examples), "samples with labels are records, each by itself"
            labels = cut.labels(inside)
            assert labels is not None
            found[where] = labels
        return found

    def rows(self, ids: NDArray[np.int64], width: int) -> Rows:
        """See `Cut`."""
        if len(self.cuts) == 1:
            return self.cuts[0].rows(ids, width)
        found: list[Any] = [None] * len(Rows._fields)
        for cut, where, inside in self._by_cut(ids):
            for number, values in enumerate(cut.rows(inside, width)):
                if values is None:
                    continue
                # A sample has as many rows as it has sequences, and one label.
                each = len(values) // len(where)
                if found[number] is None:
                    found[number] = np.empty((len(ids), each, *values.shape[1:]), dtype=values.dtype)
                found[number][where] = values.reshape(len(where), each, *values.shape[1:])
        whole: list[Any] = [None if each is None else each.reshape(-1, *each.shape[2:]) for each in found]
        return Rows(*whole)

    def _by_cut(self, ids: NDArray[np.int64]) -> Iterator[tuple[Cut, NDArray[np.int64], NDArray[np.int64]]]:
        """(cut, places in `ids`, ids in it) of each cut that has any of them."""
        owners = np.searchsorted(self.offsets, ids, side="right") - 1
        for number in np.unique(owners).tolist():
            where = np.flatnonzero(owners == number)
            yield self.cuts[number], where, ids[where] - self.offsets[number]
