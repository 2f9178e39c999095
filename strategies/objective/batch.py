"""What a virtual worker computes in one step: its tokens, and what is to be known of the step beside them.

Plain numbers, made where the data is read; no torch, so that this can be made anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """A virtual worker's samples, its micro-batches one after the other.

    tokens: int64 [samples, width + 1]; ids: of the samples, int64 [samples]; digest: a hash of the ids.
    documents: of which document of its row each token is, int32 [samples, width + 1], -1 for padding. A target counts
    when it is of the same document as the token before. None: all do.
    widths: the positions that each micro-batch is computed for, the rest being padding; None: all are.
    targets, step_padding: of the whole step, the targets that count and the positions computed without one;
    num_targets, num_padding: of this batch. cost: predicted, in units of an average virtual worker of the job.
    """

    tokens: NDArray[np.int64]
    ids: NDArray[np.int64]
    digest: int
    documents: NDArray[np.int32] | None
    targets: int
    num_targets: int
    num_padding: int = 0
    step_padding: int = 0
    cost: float = 1.0
    widths: tuple[int, ...] | None = None

    def micro_batches(self, size: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int32] | None]]:
        """Tokens and documents [size, width + 1] of each micro-batch of `size` samples."""
        for number, start in enumerate(range(0, len(self.tokens), size)):
            stop = None if self.widths is None else self.widths[number] + 1
            documents = None if self.documents is None else self.documents[start : start + size, :stop]
            yield self.tokens[start : start + size, :stop], documents


def positions(documents: NDArray[np.int32]) -> NDArray[np.int64]:
    """The place of each token in its document, or piece of padding: int64 of the shape of `documents` [rows, width]."""
    places = np.broadcast_to(np.arange(documents.shape[1]), documents.shape)
    begins = np.ones(documents.shape, dtype=np.bool_)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)


def counting(documents: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which targets of rows [rows, width + 1] count: bool [rows, width]."""
    found: NDArray[np.bool_] = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
    return found
