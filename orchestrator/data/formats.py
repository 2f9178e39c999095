"""How a file of each format becomes documents, and errors that lead to the line or byte at fault.

A file may be read in parts, each by another task: the documents of the parts, one after the other, are those of the
file.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.data.reading import Content, Library, SourceReader
from orchestrator.data.sources import DataError, SourceFile

DEFAULT_FIELD = "text"

DOCUMENTS = {"text": ("file", "line"), "jsonl": ("record",), "parquet": ("record",)}
"""By format, what can be one document; the first is the default."""

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


def document_of(file: SourceFile, document: str | None) -> str:
    """What one document of a file is: `file`, `line` or `record`. Raises DataError for what its format cannot be."""
    fitting = DOCUMENTS[file.format]
    if document is None:
        return fitting[0]
    if document not in fitting:
        raise DataError(
            f"data.document: {document} does not go with {file.url}, whose format is {file.format}; that takes "
            f"{' or '.join(fitting)}; change data.document, or leave the file out of data.source"
        )
    return document


def check_field(files: Sequence[SourceFile], field: str | None, source: str | list[str]) -> None:
    """Raises DataError for a field that would be ignored, as no file has records."""
    if field not in (None, DEFAULT_FIELD) and all(file.format == "text" for file in files):
        described = source if isinstance(source, str) else ", ".join(source)
        raise DataError(
            f"data.field: {field!r} names a field of records, but {described} is text, which has none; "
            "leave it out, or set data.format"
        )


def can_be_cut(file: SourceFile, document: str | None) -> bool:
    """Whether several tasks can share the documents of a file."""
    return document_of(file, document) != "file" and file.size_bytes >= 0


def documents(
    file: SourceFile,
    field: str | None = None,
    document: str | None = None,
    *,
    library: Library | None = None,
    content: Content | None = None,
    span: ByteSpan = WHOLE,
) -> Iterator[str]:
    """The documents of one file, or of a part of it, in order.

    field: the key (jsonl) or column (parquet) that holds the text, `text` when None; text files have none.
    document: what one document is: `file` (text files, their default), `line` (text files: every line that is not
    blank, without its end) or `record` (jsonl, parquet). library, content: as for `Library.open`.

    Raises DataError (while iterating) naming the file, and the line, row or byte offset, when it cannot be read, is not
    UTF-8, is no text (it has a NUL byte), is not valid in its format, lacks the field, or (read as a whole) holds no
    document.
    """
    kind = document_of(file, document)
    reader = _Reader(file, DEFAULT_FIELD if field is None else field, library or Library(), content, span)
    found = {"file": reader.whole, "line": reader.lines}.get(kind) or getattr(reader, file.format)
    empty = True
    try:
        for text in found():
            empty = False
            yield text
    except OSError as error:
        raise DataError(f"{file.url}: cannot be read: {error}") from error
    if empty and span.is_whole:
        raise no_document(file)


def no_document(file: SourceFile) -> DataError:
    """The error for a file that could as well not be there."""
    return DataError(f"{file.url}: holds no document; remove it from data.source")


def row_groups(file: SourceFile, field: str | None, library: Library, content: Content | None) -> list[int]:
    """For each row group of a parquet file how much text it has: the bytes of the field's column, uncompressed.

    Raises DataError as `documents` does.
    """
    reader = _Reader(file, DEFAULT_FIELD if field is None else field, library, content, WHOLE)
    with library.open(file, content) as stream:
        metadata = reader.table(stream).metadata
        sizes = []
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            columns = [group.column(i) for i in range(group.num_columns)]
            sizes.append(sum(int(c.total_uncompressed_size) for c in columns if c.path_in_schema == reader.field))
        return sizes


@dataclass(frozen=True)
class _Reader:
    """One file being read."""

    file: SourceFile
    field: str
    library: Library
    content: Content | None
    span: ByteSpan

    def whole(self) -> Iterator[str]:
        with self._open() as stream:
            data = stream.readall()
        if data:
            yield self._decode(data, 0)

    def lines(self) -> Iterator[str]:
        for _, text in self._lines():
            yield text.removesuffix("\n").removesuffix("\r")

    def jsonl(self) -> Iterator[str]:
        for offset, text in self._lines():
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                where = self._line(offset)
                raise DataError(f"{where}: not valid JSON: {error}; each line must be one JSON object") from error
            if not isinstance(record, dict):
                raise DataError(f"{self._line(offset)}: a {type(record).__name__} where a JSON object was expected")
            if self.field not in record:
                raise DataError(
                    f"{self._line(offset)}: no field {self.field!r}, only {sorted(record)[:10]}; set data.field"
                )
            value = record[self.field]
            if (problem := _problem(self.field, value)) is not None:
                raise DataError(f"{self._line(offset)}: {problem}")
            yield value

    def parquet(self) -> Iterator[str]:
        import pyarrow

        row = 0
        try:
            with self._open() as stream:
                table = self.table(stream)
                metadata = table.metadata
                rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
                stop = len(rows) if self.span.stop is None else self.span.stop
                row = sum(rows[: self.span.start])
                for batch in table.iter_batches(columns=[self.field], row_groups=list(range(self.span.start, stop))):
                    for scalar in batch.column(0):
                        value = scalar.as_py()
                        if (problem := _problem(self.field, value)) is not None:
                            raise DataError(f"{self.file.url}: row {row}: {problem}")
                        yield value
                        row += 1
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{self.file.url}: row {row}: not readable as parquet: {error}") from error

    def table(self, stream: SourceReader) -> Any:
        """The file as pyarrow.parquet knows it. Raises DataError when it is none, or lacks the field."""
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(stream)
        except pyarrow.ArrowException as error:
            raise DataError(f"{self.file.url}: row 0: not readable as parquet: {error}") from error
        columns = list(table.schema_arrow.names)
        if self.field not in columns:
            raise DataError(f"{self.file.url}: no column {self.field!r}, only {columns[:10]}; set data.field")
        return table

    def _open(self) -> SourceReader:
        is_bytes = self.file.format != "parquet"
        return self.library.open(self.file, self.content, self.span.stop if is_bytes else None)

    def _lines(self) -> Iterator[tuple[int, str]]:
        """(byte offset, text) of every line of this part that is not blank; blank ones, commonly the last, are no
        records."""
        with self._open() as raw, io.BufferedReader(raw, _BUFFER_BYTES) as stream:
            offset = 0
            if self.span.start:
                # The line that goes on into this part belongs to the one before.
                offset = stream.seek(self.span.start - 1)
                offset += len(stream.readline())
            stop = self.span.stop
            while (stop is None or offset < stop) and (line := stream.readline()):
                text = self._decode(line, offset)
                if text.strip():
                    yield offset, text
                offset += len(line)

    def _line(self, offset: int) -> str:
        """`file:line` of the line that begins at a byte. Counted only now that something is wrong with it."""
        newlines = 0
        with self.library.open(self.file, self.content, offset) as stream:
            left = offset
            while left and (data := stream.read(min(left, _COUNT_BYTES))):
                newlines += data.count(b"\n")
                left -= len(data)
        return f"{self.file.url}:{newlines + 1}"

    def _decode(self, data: bytes, offset: int) -> str:
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


def _problem(field: str, value: object) -> str | None:
    """Why a value is no text; None when it is."""
    if not isinstance(value, str):
        return f"field {field!r} is {type(value).__name__}, not a string; set data.field"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which is no text
        return f"field {field!r} holds a lone surrogate: {error}"
    return None
