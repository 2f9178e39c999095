"""Which sample each virtual worker uses at each step: a pure function of the job file.

There is no state to save, restore or hand over: after any failure, on any layout, the sampler gives the same
ids for the same step. Knows nothing of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_MAX_SIZE = 1 << 62
_NUM_ROUNDS = 6

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_TWO = np.uint64(2)


def permute(index: NDArray[np.integer], size: int, key: int) -> NDArray[np.int64]:
    """A keyed pseudo-random permutation of range(size), at the given places.

    index: integers in [0, size), any shape; size: 1 <= size < 2**62; key: any integer, taken modulo 2**64.
    Returns int64 of the shape of `index`. Memory and time do not grow with size; for a fixed (size, key) it
    is a bijection.

    A Feistel network of 6 rounds over pairs of digits in base a, a*a being the smallest square >= size, whose
    halves are added modulo a, with cycle walking for what falls outside range(size): the "generalized-Feistel
    cipher" of Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, section 5 (and 3 for
    cycle walking). A square exceeds size by 2*sqrt(size) at most, so walking is rare; a power of two would
    make it common. The round function is the finaliser of splitmix64 (Steele, Lea and Flood, "Fast Splittable
    Pseudorandom Number Generators", OOPSLA 2014). Good shuffling, not cryptography.

    Raises ValueError when size or an index is out of range.
    """
    if not 1 <= size < _MAX_SIZE:
        raise ValueError(f"permute: size {size} is outside 1 to 2**62 - 1")
    places = np.asarray(index)
    if places.size and not (places.min() >= 0 and places.max() < size):
        raise ValueError(f"permute: index {places.min()} to {places.max()} is outside range({size})")
    base = np.uint64(math.isqrt(size - 1) + 1)
    round_keys = _round_keys(key)
    values = _feistel(places.reshape(-1).astype(np.uint64), base, round_keys)
    limit = np.uint64(size)
    # Cycle walking: the network permutes range(a*a), so following it from inside range(size) must come back
    # inside.
    while (outside := values >= limit).any():
        values[outside] = _feistel(values[outside], base, round_keys)
    return values.astype(np.int64).reshape(places.shape)


def _feistel(values: NDArray[np.uint64], base: np.uint64, round_keys: list[np.uint64]) -> NDArray[np.uint64]:
    """The network, uint64 [n] -> uint64 [n], a bijection on range(base**2).

    Arrays wrap around modulo 2**64 without a warning (only numpy's scalars warn), as splitmix64 wants.
    """
    left, right = np.divmod(values, base)
    for round_key in round_keys:
        mixed = right + round_key
        mixed ^= mixed >> _SHIFTS[0]
        mixed *= _MULTIPLIERS[0]
        mixed ^= mixed >> _SHIFTS[1]
        mixed *= _MULTIPLIERS[1]
        mixed ^= mixed >> _SHIFTS[2]
        mixed >>= _TWO  # leaves room for the sum: base is at most 2**31
        mixed += left
        mixed %= base
        left, right = right, mixed
    left *= base
    left += right
    return left


def _splitmix64(value: int) -> int:
    """The finaliser of splitmix64: a bijection on 64-bit integers."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def _round_keys(key: int) -> list[np.uint64]:
    return [np.uint64(_splitmix64((key + i * _GOLDEN) & _MASK)) for i in range(1, _NUM_ROUNDS + 1)]


def mixed_seed(seed: int, source: int) -> int:
    """The seed of the shuffled line of a job's source by its number; the first has the job's own."""
    return seed if source == 0 else _splitmix64((_splitmix64(seed & _MASK) ^ source * _GOLDEN) & _MASK)


class Sampler:
    """The sample ids of every step of a job.

    The samples of all epochs stand in one endless line: place p belongs to epoch p // num_samples, and step s
    uses places [s * global_batch, (s + 1) * global_batch), dealt to the virtual workers in contiguous runs.
    So a batch may straddle two epochs, none is dropped, and each epoch uses each id exactly once. Within an
    epoch the order is a permutation that depends on (seed, epoch) only.

    num_samples: samples in an epoch; global_batch: samples in a step, a multiple of virtual_workers; seed:
    any integer, taken modulo 2**64; shuffle: False keeps every epoch in the order of the store.
    """

    def __init__(
        self, num_samples: int, global_batch: int, virtual_workers: int, seed: int, shuffle: bool = True
    ) -> None:
        """Raises ValueError when a count is not positive or the batch does not divide evenly."""
        counts = {
            "num_samples": num_samples,
            "global_batch": global_batch,
            "virtual_workers": virtual_workers,
        }
        for name, count in counts.items():
            if not 1 <= count < _MAX_SIZE:
                raise ValueError(f"{name} is {count}; it must be at least 1 and below 2**62")
        if global_batch % virtual_workers:
            raise ValueError(
                f"global_batch {global_batch} is not a multiple of virtual_workers {virtual_workers}; "
                "every virtual worker takes the same number of samples"
            )
        self.num_samples = num_samples
        self.global_batch = global_batch
        self.virtual_workers = virtual_workers
        self.seed = seed
        self.shuffle = shuffle

    def sample_ids(self, step: int, virtual_worker: int) -> NDArray[np.int64]:
        """The ids one virtual worker uses at one step, int64 [global_batch // virtual_workers].

        Raises ValueError for a negative step or a virtual worker out of range.
        """
        if not 0 <= virtual_worker < self.virtual_workers:
            raise ValueError(f"virtual worker {virtual_worker} is outside range({self.virtual_workers})")
        share = self.global_batch // self.virtual_workers
        return self._ids(step, virtual_worker * share, share)

    def step_ids(self, step: int) -> NDArray[np.int64]:
        """The ids of a whole step in the order of its virtual workers, int64 [global_batch]."""
        return self._ids(step, 0, self.global_batch)

    def uses(self, step: int, ids: NDArray[np.int64]) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        """(source, first place in its line, ids in it): the one source's, of a step whose `ids` [n] these are."""
        yield 0, step * self.global_batch, ids

    def position(self, samples: int) -> dict[str, object]:
        """Where the line is after this many samples."""
        epoch, position = divmod(samples, self.num_samples)
        return {"epoch": epoch, "position": position, "samples_per_epoch": self.num_samples}

    def line(self, place: int, count: int) -> NDArray[np.int64]:
        """The ids at `count` places of the endless line from `place` on, int64 [count]."""
        parts = []
        while count:
            epoch, first = divmod(place, self.num_samples)
            length = min(count, self.num_samples - first)
            parts.append(self._epoch_ids(epoch, first, length))
            place += length
            count -= length
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _ids(self, step: int, offset: int, count: int) -> NDArray[np.int64]:
        if step < 0:
            raise ValueError(f"step {step} is negative")
        return self.line(step * self.global_batch + offset, count)

    def _epoch_ids(self, epoch: int, first: int, length: int) -> NDArray[np.int64]:
        index = np.arange(first, first + length, dtype=np.int64)
        if not self.shuffle:
            return index
        # A bijection in the epoch for a given seed: no two epochs of a job share a key.
        key = _splitmix64((_splitmix64(self.seed & _MASK) + epoch * _GOLDEN) & _MASK)
        return permute(index, self.num_samples, key)
