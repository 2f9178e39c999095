"""Batches for tests and benchmarks that read no data."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from strategies.objective.batch import Batch


def plain_batch(tokens: NDArray[np.int64], ids: NDArray[np.int64], digest: int, virtual_workers: int) -> Batch:
    """A batch of which every target counts, in a step of `virtual_workers` like it."""
    num_targets = tokens[:, 1:].size
    return Batch(tokens, ids, digest, None, virtual_workers * num_targets, num_targets)
