"""A file of a source as bytes and lines: unpacked where it is compressed, a part of it where another task has the rest,
with errors that lead to the byte or line at fault."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from orchestrator.data.reading import Content, Library
from orchestrator.data.sources import DataError, SourceFile

_BUFFER_BYTES = 1 << 16
_COUNT_BYTES = 1 << 20


@dataclass(frozen=True)
class ByteSpan:
    """A part of a file: bytes start..stop where documents are lines (a line belongs to the part in which it begins),
    row groups start..stop in parquet. None: to the end."""

    start: int = 0
    stop: int | None = None

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.stop is None


WHOLE = ByteSpan()


@dataclass(frozen=True)
class OpenFile:
    """One file being read. `library`, `content`: as for `Library.open`."""

    file: SourceFile
    library: Library
    content: Content | None
    span: ByteSpan = WHOLE

    @contextmanager
    def stream(self) -> Iterator[IO[bytes]]:
        """What is in it, from its beginning. Raises DataError for what is not compressed as its name says."""
        is_bytes = self.file.format in ("text", "jsonl") and not self.file.compression
        with self.library.open(self.file, self.content, self.span.stop if is_bytes else None) as raw:
            if not self.file.compression:
                yield raw  # type: ignore[misc]
                return
            try:
                with _unpacking(self.file.compression, raw) as unpacked:
                    yield unpacked
            except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
                raise self._damaged(error) from error
            except (OSError, ValueError) as error:
                # What bz2 and Arrow say of data that is none of theirs.
                if isinstance(error, DataError) or not _is_about_data(error):
                    raise
                raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> DataError:
        kind = self.file.compression
        return DataError(f"{self.file.url}: cannot be unpacked: {error}; is it whole, and compressed as {kind} says?")

    def lines(self) -> Iterator[tuple[int, str]]:
        """(byte offset, text) of every line of this part that is not blank; blank ones, commonly the last, are no
        records."""
        with self.stream() as raw, io.BufferedReader(raw, _BUFFER_BYTES) as stream:  # type: ignore[type-var]
            offset = 0
            if self.span.start:
                # The line that goes on into this part belongs to the one before.
                offset = stream.seek(self.span.start - 1)
                offset += len(stream.readline())
            stop = self.span.stop
            while (stop is None or offset < stop) and (line := stream.readline()):
                text = self.decode(line, offset)
                if text.strip():
                    yield offset, text
                offset += len(line)

    def line_at(self, offset: int) -> str:
        """`file:line` of the line that begins at a byte. Counted only when something is wrong with it."""
        newlines = 0
        with OpenFile(self.file, self.library, self.content).stream() as stream:
            left = offset
            while left and (data := stream.read(min(left, _COUNT_BYTES))):
                newlines += data.count(b"\n")
                left -= len(data)
        return f"{self.file.url}:{newlines + 1}"

    def decode(self, data: bytes, offset: int) -> str:
        """Text of bytes that begin at `offset` of the file. Raises DataError."""
        if not offset:
            data = data.removeprefix(codecs.BOM_UTF8)  # a mark of some editors, no character of the text
            if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise DataError(
                    f"{self.file.url}: it begins with the byte order mark of UTF-16; convert it to UTF-8 (iconv -f "
                    "UTF-16 -t UTF-8) or leave it out of data.source"
                )
        if self.file.format == "text" and (at := data.find(b"\0")) >= 0:
            raise DataError(
                f"{self.file.url}: a NUL byte at byte offset {offset + at}: this is no text, whatever data.format "
                "says; leave the file out of data.source"
            )
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.file.url}: not UTF-8 at byte offset {offset + error.start} (0x{data[error.start]:02x}); "
                "convert the file to UTF-8 or leave it out of data.source"
            ) from error


def _unpacking(compression: str, raw: Any) -> Any:
    match compression:
        case ".gz":
            return gzip.GzipFile(fileobj=raw, mode="rb")
        case ".bz2":
            return bz2.BZ2File(raw)
        case ".xz":
            return lzma.LZMAFile(raw)
    import pyarrow

    return io.BufferedReader(_Arrow(pyarrow.CompressedInputStream(raw, "zstd")), _BUFFER_BYTES)


class _Arrow(io.RawIOBase):
    """A stream of Arrow's as one of Python's."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def _is_about_data(error: Exception) -> bool:
    said = str(error).lower()
    return any(word in said for word in ("invalid data", "zstd", "decompress", "compressed"))
