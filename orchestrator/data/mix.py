"""Several sources by weight: whose sample stands at which place of the endless line.

Each source has its own endless line of epochs, each a keyed permutation of its samples; the places of the common line
are given to sources by a pattern that repeats. Like the sampler, a pure function without state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.sampler import Sampler, mixed_seed
from orchestrator.data.sources import DataError

MAX_PERIOD = 1 << 20


def shares(weights: Sequence[float]) -> list[int]:
    """How many places each source has in one period of the pattern, at least one.

    The weights as they are written, if a period of at most 2**20 places can have them exactly; otherwise rounded to
    that many, by largest remainders.

    Raises DataError when there is no weight, or one is not positive and finite, or a source would have no place.
    """
    if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise DataError(f"data.mix: weights must be positive numbers, got {list(weights)}")
    exact = [Fraction(repr(weight)) for weight in weights]  # 0.1 is meant to be a tenth
    common = math.lcm(*(weight.denominator for weight in exact))
    counts = [int(weight * common) for weight in exact]
    divisor = math.gcd(*counts)
    counts = [count // divisor for count in counts]
    if sum(counts) <= MAX_PERIOD:
        return counts
    total = sum(exact)
    wanted = [weight * MAX_PERIOD / total for weight in exact]
    counts = [int(count) for count in wanted]
    by_remainder = sorted(range(len(counts)), key=lambda source: (counts[source] - wanted[source], source))
    for source in by_remainder[: MAX_PERIOD - sum(counts)]:
        counts[source] += 1
    if 0 in counts:
        lost = counts.index(0)
        raise DataError(
            f"data.mix: the weight {weights[lost]} is less than one sample in {MAX_PERIOD:,} of all; raise it"
        )
    return counts


class MixedSampler:
    """The sample ids of every step of a job with several sources.

    sizes: samples in an epoch of each source; weights: relative. Ids are global: those of source s are those from
    `offsets[s]` on. The occurrence j of source s stands at (j + 1/2) / w_s, ties by source, so that every run of n
    places has n * w_s samples of source s to within a few. The rest is as for `Sampler`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        global_batch: int,
        virtual_workers: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        """Raises ValueError like `Sampler`, DataError like `shares`."""
        self.sizes = tuple(sizes)
        self.num_samples = sum(sizes)
        self.global_batch = global_batch
        self.virtual_workers = virtual_workers
        self.offsets = tuple(np.cumsum([0, *sizes[:-1]]).tolist())
        self._lines = [
            Sampler(size, global_batch, virtual_workers, mixed_seed(seed, source), shuffle)
            for source, size in enumerate(sizes)
        ]
        self._counts = shares(weights)
        assert len(self._counts) == len(self._lines)
        self.period = sum(self._counts)
        # (j + 1/2) / w as (2 j + 1) / count: fractions below 2**21 that differ do so by 2**-40, more than a float64
        # rounds by, and those that are equal are rounded alike. So the order is exact.
        at = np.concatenate([(2 * np.arange(count) + 1) / count for count in self._counts])
        source = np.repeat(np.arange(len(sizes)), self._counts)
        order = np.lexsort((source, at))
        self._source = source[order].astype(np.int32)
        self._number = np.concatenate([np.arange(count) for count in self._counts])[order]

    def sample_ids(self, step: int, virtual_worker: int) -> NDArray[np.int64]:
        """As `Sampler.sample_ids`."""
        if not 0 <= virtual_worker < self.virtual_workers:
            raise ValueError(f"virtual worker {virtual_worker} is outside range({self.virtual_workers})")
        share = self.global_batch // self.virtual_workers
        return self.step_ids(step)[virtual_worker * share :][:share]

    def step_ids(self, step: int) -> NDArray[np.int64]:
        """The ids of a whole step in the order of its virtual workers, int64 [global_batch]."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        ids = np.empty(self.global_batch, dtype=np.int64)
        for source, first, where in self._runs(step):
            ids[where] = self._lines[source].line(first, len(where)) + self.offsets[source]
        return ids

    def uses(self, step: int, ids: NDArray[np.int64]) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        """(source, its place in the source's own line, ids in the source) for each source that the step, whose `ids`
        these are, uses anything of."""
        for source, first, where in self._runs(step):
            yield source, first, ids[where] - self.offsets[source]

    def position(self, samples: int) -> dict[str, object]:
        """Where in each source's epochs the line is after this many samples."""
        found = []
        for source, size in enumerate(self.sizes):
            used = self._used(source, samples)
            found.append({"epoch": used // size, "position": used % size, "samples_per_epoch": size})
        return {"sources": found}

    def _used(self, source: int, samples: int) -> int:
        """How many of the first `samples` places are of a source."""
        periods, rest = divmod(samples, self.period)
        return periods * self._counts[source] + int(np.count_nonzero(self._source[:rest] == source))

    def _runs(self, step: int) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        """(source, first place in its line, places in the step [n]) of each source; its places follow each other."""
        periods, place = np.divmod(step * self.global_batch + np.arange(self.global_batch), self.period)
        owner, number = self._source[place], self._number[place]
        for source, count in enumerate(self._counts):
            where = np.flatnonzero(owner == source)
            if len(where):
                yield source, int(periods[where[0]]) * count + int(number[where[0]]), where
