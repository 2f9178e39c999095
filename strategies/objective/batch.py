"""What a virtual worker computes in one step: its tokens, and what is to be known of the step beside them.

Plain numbers, made where the data is read; no torch, so that this can be made anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """A virtual worker's samples, its micro-batches one after the other.

    tokens: int64 [samples, width + 1]; ids: of the samples, int64 [samples]; digest: a hash of the ids.
    documents: of which document of its row each token is, int32 [samples, width + 1], -1 for padding. A target counts
    when it is of the same document as the token before. None: all do.
    widths: the positions that each micro-batch is computed for, the rest being padding; None: all are.
    marks: which tokens the model is trained to predict, bool [samples, width + 1]; None: all that can be.
    labels: of the samples, int64 [samples]; step_labels: of all samples of the step; None where they have none.
    targets, step_padding: of the whole step, the targets that count and the positions computed without one;
    num_targets, num_padding: of this batch; step_samples: how many samples the whole step has. cost: predicted, in
    units of an average virtual worker of the job. Samples of several `sequences` have as many rows, one after another.

    More than 15 attributes: whatever an objective computes with is here, so that none has to read data itself.
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
    marks: NDArray[np.bool_] | None = None
    labels: NDArray[np.int64] | None = None
    step_labels: NDArray[np.int64] | None = None
    step_samples: int = 0
    sequences: int = 1
    reference: NDArray[np.float32] | None = None
    """What a reference model gives for each row, fp32 [rows]; None where nothing compares with one."""
    taught: tuple[NDArray[np.float32], NDArray[np.int32]] | None = None
    """The likeliest tokens that a teacher gives at each position, their logits and ids, [rows, width, k] each; None
    where there is no teacher, or it is asked for everything."""

    def micro_batches(self, size: int) -> Iterator[MicroBatch]:
        """Each micro-batch of `size` samples."""
        rows = size * self.sequences
        for number, start in enumerate(range(0, len(self.tokens), rows)):
            stop = None if self.widths is None else self.widths[number] + 1
            part = slice(start, start + rows)
            yield MicroBatch(
                self.tokens[part, :stop],
                None if self.documents is None else self.documents[part, :stop],
                None if self.marks is None else self.marks[part, :stop],
                None if self.labels is None else self.labels[number * size : (number + 1) * size],
                None if self.reference is None else self.reference[part],
                None if self.taught is None else _at(self.taught, part, stop),
            )


def _at(
    taught: tuple[NDArray[np.float32], NDArray[np.int32]], part: slice, stop: int | None
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    width = None if stop is None else stop - 1
    return taught[0][part, :width], taught[1][part, :width]


class MicroBatch(NamedTuple):
    """Rows of a batch, [rows, width + 1] each, the labels [samples] of their samples, and what a reference and a
    teacher give for them."""

    tokens: NDArray[np.int64]
    documents: NDArray[np.int32] | None
    marks: NDArray[np.bool_] | None
    labels: NDArray[np.int64] | None
    reference: NDArray[np.float32] | None
    taught: tuple[NDArray[np.float32], NDArray[np.int32]] | None = None


def positions(documents: NDArray[np.int32]) -> NDArray[np.int64]:
    """The place of each token in its document, or piece of padding: int64 of the shape of `documents` [rows, width]."""
    places = np.broadcast_to(np.arange(documents.shape[1]), documents.shape)
    begins = np.ones(documents.shape, dtype=np.bool_)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)


def counting(documents: NDArray[np.int32], marks: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """Which targets of rows [rows, width + 1] count: bool [rows, width]."""
    found: NDArray[np.bool_] = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
    return found if marks is None else found & marks[:, 1:]
