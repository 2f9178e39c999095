"""Reading source files by byte range, with read-ahead, retries and mirrors; and knowing their content again.

What is read is the same bytes whatever place they came from: a place counts only where the size agrees and, range by
range, the digest of what was there when the build began; or, of a file that only a mirror gives and whose own storage
vouches for it, a checksum that both storages report. Knows nothing of formats and tokens.
"""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from orchestrator.data.locations import Changed, Location, Patience, RemotePlace, persist, place_at
from orchestrator.data.ranges import Begun, Ranges, Unreadable
from orchestrator.data.sources import DataError, SourceFile, resolve_files

RANGE_BYTES = 4 << 20
"""Files are read, and known again, by ranges of this size."""

_AHEAD = 2
_KEPT = 4  # ranges: formats look back a little, and parquet reads its end first
_DIGEST_BYTES = 8

# What a storage reports that is a function of the content alone, so that two storages can be compared by it.
_CHECKSUMS = ("md5Hash", "crc32c", "Content-MD5", "content_md5", "Digest")
# What object stores and web servers report that changes whenever the content does. Times do not qualify.
_VALIDATORS = ("ETag", "etag", "md5Hash", "crc32c", "Content-MD5", "content_md5", "Digest", "generation")


@dataclass(frozen=True)
class Content:
    """What a file held when it was looked at.

    fingerprint: changes when the content does: `xxh3:` and the XXH3-128 digest of the content, or, for a remote file,
    the validators its storage reports; size_bytes: -1 when not known; ranges: the XXH3-64 digests of its ranges of
    RANGE_BYTES, 8 bytes each, or nothing where the content was not read.
    """

    fingerprint: str
    size_bytes: int
    ranges: bytes = b""


class Library:
    """Opens the files of a source: where they are listed, or else in one of the mirrors.

    mirrors: directories or URLs with the same files under the same relative names. A place that was given up once is
    asked last from then on.
    """

    def __init__(self, mirrors: Sequence[str] = (), patience: Patience | None = None) -> None:
        plain = [mirror.removeprefix("file://") for mirror in mirrors]
        # A process that is given a library's mirrors may be in another working directory.
        self.mirrors = tuple(one if "://" in one else os.path.abspath(os.path.expanduser(one)) for one in plain)
        self.patience = patience or Patience()
        self._first = 0

    def files(
        self, source: str | list[str], format: str | None, include: Sequence[str] = ()
    ) -> list[SourceFile]:  # fmt: skip
        """The files of a source (see `resolve_files`), also of those named outright that only a mirror has."""
        return resolve_files(source, format, self._size_in_a_mirror, include)

    def _size_in_a_mirror(self, name: str) -> int | None:
        for mirror in self.mirrors:
            place = place_at(join(mirror, name))
            try:
                size_bytes = persist(self.patience, place.reopen, place.size)
            except Exception:  # every storage library has its own errors; the source's own is told
                continue
            return -1 if size_bytes is None else size_bytes
        return None

    def examine(self, file: SourceFile) -> Content:
        """What a file holds now.

        It is read for that, unless its storage reports a validator (an ETag, a checksum): terabytes need not be read to
        find that they are unchanged. Raises DataError naming the file when it cannot be read.
        """
        place = place_at(file.url)
        if isinstance(place, RemotePlace):
            info = self._info(place)
            if validators := [f"{key}={info[key]}" for key in _VALIDATORS if info.get(key)]:
                return Content(";".join(validators), file.size_bytes)
        whole, ranges = xxhash.xxh3_128(), []
        size_bytes = 0
        with self.open(file) as stream:
            while data := stream.next_range():
                whole.update(data)
                ranges.append(xxhash.xxh3_64_digest(data))
                size_bytes += len(data)
        content = Content(f"xxh3:{whole.hexdigest()}", size_bytes, b"".join(ranges))
        if len(stream.used) > 1:
            self._confirm_mixture(file, content, stream.used)
        return content

    def by_ranges(self, file: SourceFile, content: Content) -> Content:
        """The same content with the digests of its ranges, so that any mirror can be compared with it.

        Without mirrors they are not needed; and where the file's own storage does not give it, there is only its
        checksum to go by.
        """
        if content.ranges or not self.mirrors:
            return content
        ranges = []
        try:
            with self.open(file, content, only=file.url) as stream:
                while data := stream.next_range():
                    ranges.append(xxhash.xxh3_64_digest(data))
        except DataError:
            return content
        return replace(content, ranges=b"".join(ranges))

    def _confirm_mixture(self, file: SourceFile, content: Content, used: Sequence[str]) -> None:
        """Raises DataError when the last of the places that a file came from does not have all that was read: the
        places hold different files of one size, and a mixture of them is no file at all."""
        try:
            with self.open(file, content, only=used[-1]) as stream:
                while stream.next_range():
                    pass
        except DataError as error:
            raise DataError(
                f"{file.url}: only a part of it could be read, and {used[-1]}, where the rest was read, does not have "
                f"that part: {error}"
            ) from error

    def open(
        self, file: SourceFile, content: Content | None = None, stop: int | None = None, only: str | None = None
    ) -> SourceReader:
        """The file, for reading from any place that has it.

        content: what it must hold; stop: the byte up to which it will be read, or a little further; only: the one place
        that it may come from. Raises DataError, as reading from it does, when no place gives it; it names all of them.
        """
        size_bytes = file.size_bytes if content is None else content.size_bytes
        places: list[Location] = [place_at(file.url, has_size=file.size_bytes >= 0)]
        places += [place_at(join(mirror, file.name), has_size=size_bytes >= 0) for mirror in self.mirrors]
        first = self._first
        if only is not None:
            places, first = [place for place in places if place.where == only], 0

        def identify(number: int) -> None:
            size = places[number].size() if size_bytes >= 0 else None
            if size is not None and size != size_bytes:
                raise Changed(f"it has {size:,} bytes, not {size_bytes:,}")
            if content is None or content.ranges:
                return
            place, known = places[number], content.fingerprint.split(";")
            info = place.info() if isinstance(place, RemotePlace) else {}
            same = _compare(known, info, _CHECKSUMS if number else _VALIDATORS)
            if number and not same:
                raise Changed("nothing tells that it holds the same: no checksum that both storages report")

        def verify(number: int, start: int, data: bytes, length: int) -> None:
            if size_bytes >= 0 and len(data) != length:
                raise OSError(f"only {len(data):,} of {length:,} bytes could be read at byte {start:,}")
            if content is not None and content.ranges:
                at = start // RANGE_BYTES * _DIGEST_BYTES
                if xxhash.xxh3_64_digest(data) != content.ranges[at : at + _DIGEST_BYTES]:
                    # What comes over a network may be right the next time.
                    kind = OSError if isinstance(places[number], RemotePlace) else Changed
                    raise kind(f"from byte {start:,} on it holds something else")

        ranges = Ranges(
            places,
            identify=identify,
            verify=verify,
            patience=self.patience,
            # A thread for each of thousands of small files would cost more than it could save.
            own_thread=size_bytes > RANGE_BYTES or any("://" in place.where for place in places),
            first=first,
        )
        return SourceReader(self, file, ranges, size_bytes, stop)

    def _info(self, place: RemotePlace) -> dict[str, Any]:
        """What a storage says about a file; nothing where it does not answer: reading the file will say why, or do."""
        try:
            return persist(self.patience, place.reopen, place.info)
        except Exception:
            return {}

    def confirm(self, file: SourceFile, content: Content) -> None:
        """To be called after reading: raises DataError when the file has changed and its ranges could not tell."""
        place = place_at(file.url)
        if not content.ranges and isinstance(place, RemotePlace):
            try:
                _compare(content.fingerprint.split(";"), self._info(place), _VALIDATORS)
            except Changed as error:
                raise self.failed(file, Unreadable([(file.url, error, 1)])) from error

    def failed(self, file: SourceFile, error: Unreadable) -> DataError:
        """The error that names a file and every place where it cannot be read."""
        changed = [isinstance(problem, Changed) for _, problem, _ in error.problems]
        if changed == [True]:
            return DataError(
                f"{file.url}: on {socket.gethostname()} it is not what it was when the build began ({error}); "
                "the source must stay as it is, and be the same wherever a task runs"
            )
        # The file's own place is the one that the reader knows by name, so it is told first.
        own_first = sorted(error.problems, key=lambda problem: problem[0] != file.url)
        return DataError(
            f"{file.url}: cannot be read on {socket.gethostname()}: {Unreadable(own_first)}; make it readable, or name "
            "a place that holds the same files in data.mirrors"
        )

    def given_up(self, number: int) -> None:
        """A place did not answer although it was asked again and again; others are asked before it."""
        if number == self._first:
            self._first = (number + 1) % (1 + len(self.mirrors))


class SourceReader(io.RawIOBase):
    """A source file as Python, and pyarrow, know files; it may seek where the file's size is known.

    Read from front to back, the next ranges are fetched ahead, at most two of them.
    """

    def __init__(self, library: Library, file: SourceFile, ranges: Ranges, size_bytes: int, stop: int | None) -> None:
        self._library = library
        self._file = file
        self._ranges = ranges
        self._size = size_bytes if size_bytes >= 0 else None
        self._stop = stop
        self._position = 0
        self._latest: int | None = None
        self._kept: dict[int, bytes] = {}
        self._begun: dict[int, Begun] = {}
        self.used: list[str] = []
        """The places that ranges came from, in the order of their first one."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._size is not None

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if self._size is None:
            raise io.UnsupportedOperation(f"{self._file.url}: its storage does not say how long it is")
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def next_range(self) -> bytes:
        """What is left of the range at the current position; nothing at the end. Raises DataError."""
        number, inside = divmod(self._position, RANGE_BYTES)
        data = self._range(number)
        if inside:
            data = data[inside:]
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        number, inside = divmod(self._position, RANGE_BYTES)
        view = memoryview(buffer).cast("B")
        data = memoryview(self._range(number))[inside : inside + len(view)]
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def read(self, size: int | None = -1) -> bytes:
        """That many bytes, fewer only at the end of the file: pyarrow takes a short read for the end."""
        if size is None or size < 0:
            return self.readall()
        parts = []
        while size and (data := super().read(size)):
            parts.append(data)
            size -= len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readall(self) -> bytes:
        parts = []
        while data := self.next_range():
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        self._ranges.close()
        self._kept.clear()
        self._begun.clear()
        super().close()

    def _range(self, number: int) -> bytes:
        start = number * RANGE_BYTES
        if self._size is not None and start >= self._size:
            return b""
        data = self._kept.get(number)
        if data is None:
            first = self._ranges.current
            try:
                data = self._ranges.read(start, self._length(number), self._begun.pop(number, None))
            except Unreadable as error:
                raise self._library.failed(self._file, error) from error
            if self._size is None and len(data) < RANGE_BYTES:
                self._size = start + len(data)
            if self._ranges.current != first:
                self._note_failure(first)
            if (where := self._ranges.places[self._ranges.current].where) not in self.used:
                self.used.append(where)
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[number] = data
            if self._latest is None or number == self._latest + 1:
                self._fetch_ahead(number)
            self._latest = number
        return data

    def _fetch_ahead(self, number: int) -> None:
        if self._size is None:
            return  # where it ends shows when it is read
        stop = self._size if self._stop is None else min(self._size, self._stop)
        window = range(number + 1, number + 1 + _AHEAD)
        self._begun = {n: begun for n, begun in self._begun.items() if n in window}
        for one in window:
            if one * RANGE_BYTES < stop and one not in self._kept and one not in self._begun:
                begun = self._ranges.begin(one * RANGE_BYTES, self._length(one))
                if begun is not None:
                    self._begun[one] = begun

    def _length(self, number: int) -> int:
        return RANGE_BYTES if self._size is None else min(RANGE_BYTES, self._size - number * RANGE_BYTES)

    def _note_failure(self, number: int) -> None:
        if number not in self._ranges.lacking:
            self._library.given_up(number)


def join(place: str, name: str) -> str:
    """Where a file of that name is below a directory or URL."""
    return f"{place.rstrip('/')}/{name}"


def _compare(known: list[str], info: dict[str, Any], keys: Sequence[str]) -> int:
    """How many validators both sides have, which are the same. Raises Changed when one is not."""
    before = dict(validator.partition("=")[::2] for validator in known)
    shared = [key for key in keys if key in before and info.get(key)]
    for key in shared:
        if str(info[key]) != before[key]:
            raise Changed(f"its {key} is {info[key]}, not {before[key]}")
    return len(shared)
