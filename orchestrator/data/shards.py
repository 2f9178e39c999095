"""Reading tokens out of a store's shards while a job trains: quickly where all is well, and patiently where it is not.

A read that fails or comes short is tried again, then done from a mirror's copy of the store, then an error that names
the shard and every place. Shards are not memory mapped: what is behind a mapping that fails ends the process.

No token is handed out unverified. A range of a shard counts as verified by its digest for as long as the file system
says that the file was not touched; after that it is read and compared again, before anything of it is used.
"""

from __future__ import annotations

import functools
import os
import socket
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import xxhash
from numpy.typing import NDArray

from orchestrator.data.locations import Descriptor, LocalPlace, Patience, persist, place_at
from orchestrator.data.manifest import DTYPES, MANIFEST_NAME, RANGE_BYTES, BrokenStoreError, ShardEntry, StoreManifest
from orchestrator.data.ranges import Lane, Ranges, Unreadable
from orchestrator.data.reading import join
from orchestrator.data.sources import DataError

TRAINING_PATIENCE = Patience(attempts=3, timeout_s=10.0, pause_s=0.2, longest_pause_s=1.0)
"""Ranks wait for each other: a shard that does not come in seconds is better read elsewhere."""
_KEPT = 8
"""Ranges of a copy that are kept, as samples are much smaller."""
_CHANCES = 3
"""How often a read is done again because the file was touched in the middle of it."""

Signature = tuple[int, int, int, int]
"""Inode, size, and the times of the last change of the content and of anything at all, in ns. Where it is another, the
content may be another. No program can set the last; the device is left out, as a shared file system has another one on
every node."""


@dataclass
class _Verified:
    """Which ranges of a shard are known to be what was written, while its file has that signature. None: all."""

    signature: Signature
    ranges: set[int] | None = field(default_factory=set)

    def has(self, number: int) -> bool:
        return self.ranges is None or number in self.ranges


def signature_of(descriptor: int) -> Signature:
    """Of an open file. Raises OSError."""
    status = os.fstat(descriptor)
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_manifest(location: str, patience: Patience) -> StoreManifest:
    """The manifest of the store in a directory or at a URL. Raises BrokenStoreError when it is torn or missing."""
    place = place_at(join(location, MANIFEST_NAME))
    try:
        text = persist(patience, place.reopen, lambda: place.read(0, place.size() or 0)).decode("utf-8")
    except Exception as error:  # every storage library has its own errors
        raise BrokenStoreError(f"{location}: {error}") from error
    return StoreManifest.from_json(text)


class Shards:
    """The shards of a store as one line of tokens. Any number of threads may read at once."""

    def __init__(
        self,
        location: str,
        manifest: StoreManifest,
        mirrors: Sequence[str],
        patience: Patience,
        signatures: Sequence[Signature | None] = (),
    ) -> None:
        """location, mirrors: directories or URLs, each of a copy of the store; signatures: those of the shards when
        somebody verified all of each, so that what still has its own need not be verified again.

        Raises BrokenStoreError when a shard at the location is missing or has another size.
        """
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._width = DTYPES[manifest.dtype]
        self._manifest = manifest
        self._locations = (location, *mirrors)
        self._patience = patience
        self._ends = list(accumulate(shard.tokens for shard in manifest.shards))
        self._lock = threading.Lock()
        self._ranges: dict[int, Ranges] = {}
        self._kept: dict[tuple[int, int], bytes] = {}
        self._lane: Lane | None = None
        self._files: list[Descriptor | None] = [self._open(shard) for shard in manifest.shards]
        self._confirmed: set[str] = {location}
        self._verified: dict[int, _Verified] = {
            shard: _Verified(signature, None) for shard, signature in enumerate(signatures) if signature is not None
        }

    @property
    def signatures(self) -> list[Signature | None]:
        """Of each shard that is known to be what was written as a whole; None for the others."""
        found = [self._verified.get(shard) for shard in range(len(self._files))]
        return [None if known is None or known.ranges is not None else known.signature for known in found]

    def verify(self, shard: int) -> None:
        """Reads a whole shard and compares its digest. Raises OSError when it cannot be read, BrokenStoreError when it
        is not what was written."""
        entry = self._manifest.shards[shard]
        file = self._files[shard]
        if file is None:
            raise BrokenStoreError(f"{entry.name}: not on this machine; its ranges are verified when they are read")
        signature = signature_of(file.number)
        digest, at = xxhash.xxh3_128(), 0
        while data := os.pread(file.number, RANGE_BYTES, at):
            digest.update(data)
            at += len(data)
        if digest.hexdigest() != entry.digest or signature_of(file.number) != signature:
            raise BrokenStoreError(f"{join(self._locations[0], entry.name)}: its content is not what was written")
        self._verified[shard] = _Verified(signature, None)

    def fill(self, tokens: NDArray[np.unsignedinteger], first: int) -> None:
        """Fill tokens [length], of dtype `dtype` and contiguous, with those from place `first` on, across borders of
        shards. Raises DataError."""
        shard = bisect_right(self._ends, first)
        before = self._ends[shard - 1] if shard else 0
        view = tokens.view(np.uint8).data
        while view:
            end = self._ends[shard]
            length = min((end - first) * self._width, len(view))
            self._read(shard, (first - before) * self._width, view[:length])
            view = view[length:]
            first = before = end
            shard += 1

    def document_lengths(self) -> NDArray[np.int64]:
        """The lengths of all documents in tokens, int64 [documents]. Raises DataError."""
        found = [np.frombuffer(self._documents(shard), dtype="<i8") for shard in self._manifest.shards]
        return (found[0] if len(found) == 1 else np.concatenate(found)).astype(np.int64, copy=False)

    def _documents(self, shard: ShardEntry) -> bytes:
        """The file with the lengths of a shard's documents, from the first place that has it whole."""
        problems = []
        for location in self._locations:
            place = place_at(join(location, shard.documents_name))
            try:
                data = persist(
                    self._patience, place.reopen, functools.partial(place.read, 0, shard.documents_bytes)
                )  # fmt: skip
            except Exception as error:  # every storage library has its own errors
                problems.append(f"{place.where}: {error}")
                continue
            if xxhash.xxh3_128_hexdigest(data) == shard.documents_digest:
                return data
            problems.append(f"{place.where}: its content is not what was written")
        raise DataError(f"the lengths of documents cannot be read on {socket.gethostname()}: {'; '.join(problems)}")

    def _read(self, shard: int, start: int, view: memoryview) -> None:
        file = self._files[shard]
        if file is not None:
            try:
                if self._read_own(shard, file, start, view):
                    return
            except OSError:  # also a TimeoutError: the patient way finds out what it is, and whether it lasts
                pass
        view[:] = self._read_patiently(shard, start, len(view))

    def _read_own(self, shard: int, file: Descriptor, start: int, view: memoryview) -> bool:
        """Whether all was there and right. Where there is a mirror, a file system that does not answer is given up for
        it."""
        if len(self._locations) == 1:
            return self._read_verified(shard, file, start, view)
        with self._lock:
            lane = self._lane = self._lane or Lane()
        scratch = memoryview(bytearray(len(view)))
        try:
            is_right = self._patience.wait(lane.submit(lambda: self._read_verified(shard, file, start, scratch)))
        except TimeoutError:
            with self._lock:
                self._lane = None
            lane.close()
            raise
        view[:] = scratch
        return is_right

    def _read_verified(self, shard: int, file: Descriptor, start: int, view: memoryview) -> bool:
        """Fills the view with what is known to be right; False when it is not right, or not all there."""
        numbers = range(start // RANGE_BYTES, (start + len(view) - 1) // RANGE_BYTES + 1)
        for _ in range(_CHANCES):
            signature = signature_of(file.number)
            known = self._verified.get(shard)
            if known is None or known.signature != signature:
                known = self._verified[shard] = _Verified(signature)
            unknown = [number for number in numbers if not known.has(number)]
            if not all(self._is_right(shard, file, number) for number in unknown):
                return False
            if os.preadv(file.number, [view], start) != len(view):
                return False
            if signature_of(file.number) == signature:
                if known.ranges is not None:
                    known.ranges.update(unknown)
                return True
        return False

    def _is_right(self, shard: int, file: Descriptor, number: int) -> bool:
        entry = self._manifest.shards[shard]
        data = os.pread(file.number, min(RANGE_BYTES, entry.size_bytes - number * RANGE_BYTES), number * RANGE_BYTES)
        return xxhash.xxh3_64_hexdigest(data) == entry.range_digest(number)

    def _read_patiently(self, shard: int, start: int, length: int) -> bytes:
        parts = []
        with self._lock:
            while length:
                number, inside = divmod(start, RANGE_BYTES)
                part = self._range(shard, number)[inside : inside + length]
                parts.append(part)
                start += len(part)
                length -= len(part)
        return b"".join(parts)

    def _range(self, shard: int, number: int) -> bytes:
        """A range of a shard, known to be what was written; the last few are kept."""
        if (known := self._kept.get((shard, number))) is not None:
            return known
        entry = self._manifest.shards[shard]
        ranges = self._ranges.get(shard)
        if ranges is None:
            ranges = self._ranges[shard] = self._make_ranges(entry)
        start = number * RANGE_BYTES
        try:
            data = ranges.read(start, min(RANGE_BYTES, entry.size_bytes - start))
        except Unreadable as error:
            where = join(self._locations[0], entry.name)
            raise DataError(
                f"{where}: cannot be read on {socket.gethostname()}: {error}; remove the token store, which "
                "is made again when the run is resumed, or name a place that holds a copy of it in data.mirrors"
            ) from error
        place = ranges.places[ranges.current]
        # Only of the store itself, which was verified when it was opened, is less read than can be verified.
        is_own = ranges.current == 0 and isinstance(place, LocalPlace)
        self._files[shard] = place.open() if is_own and isinstance(place, LocalPlace) else None
        while len(self._kept) >= _KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[shard, number] = data
        return data

    def _make_ranges(self, entry: ShardEntry) -> Ranges:
        places = [place_at(join(location, entry.name)) for location in self._locations]

        def identify(number: int) -> None:
            self._confirm(self._locations[number], entry)
            size_bytes = places[number].size()
            if size_bytes != entry.size_bytes:
                raise OSError(f"it has {size_bytes} bytes, not {entry.size_bytes}")

        def verify(number: int, start: int, data: bytes, length: int) -> None:
            if len(data) != length:
                raise OSError(f"only {len(data)} of {length} bytes could be read at byte {start}")
            if xxhash.xxh3_64_hexdigest(data) != entry.range_digest(start // RANGE_BYTES):
                raise OSError(f"what it holds from byte {start} on is not what was written")

        return Ranges(
            places,
            identify=identify,
            verify=verify,
            patience=self._patience,
            own_thread=len(self._locations) > 1 or "://" in self._locations[0],
        )

    def _confirm(self, location: str, entry: ShardEntry) -> None:
        """Raises DataError when what is at a location is no copy of this store, shard by shard."""
        if location in self._confirmed:
            return
        other = read_manifest(location, self._patience)
        if other.digest != self._manifest.digest or entry not in other.shards:
            raise DataError(
                f"it is another store ({other.digest}, not {self._manifest.digest}), or cut in other shards"
            )
        self._confirmed.add(location)

    def _open(self, shard: ShardEntry) -> Descriptor | None:
        """The shard's descriptor, where it has one: the store may lose its name while somebody has it open."""
        place = place_at(join(self._locations[0], shard.name))
        try:
            size_bytes = persist(self._patience, place.reopen, place.size)
        except Exception as error:
            raise BrokenStoreError(f"{place.where}: {error}") from error
        if size_bytes != shard.size_bytes:
            raise BrokenStoreError(f"{shard.name}: {size_bytes} bytes, should be {shard.size_bytes}")
        return place.open() if isinstance(place, LocalPlace) else None
