"""How a file of each format becomes documents, and errors that lead to the line or byte at fault."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO

from orchestrator.data.sources import DataError, SourceFile, open_file

DEFAULT_FIELD = "text"


def documents(file: SourceFile, field: str | None = None) -> Iterator[str]:
    """The documents of one file, in order.

    field: the key (jsonl) or column (parquet) that holds the text, `text` when None; text files have none.

    Raises DataError (while iterating) naming the file, and the line, row or byte offset, when it cannot be
    read, is not UTF-8, is not valid in its format, lacks the field, or holds no document.
    """
    reader = {"text": _text, "jsonl": _jsonl, "parquet": _parquet}[file.format]
    empty = True
    try:
        with open_file(file) as stream:
            for document in reader(file, stream, DEFAULT_FIELD if field is None else field):
                empty = False
                yield document
    except OSError as error:
        raise DataError(f"{file.url}: cannot be read: {error}") from error
    if empty:
        raise DataError(f"{file.url}: holds no document; remove it from data.source")


def _decode(file: SourceFile, data: bytes, offset: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.url}: not UTF-8 at byte offset {offset + error.start} (0x{data[error.start]:02x}); "
            "convert the file to UTF-8 or leave it out of data.source"
        ) from error


def _text(file: SourceFile, stream: BinaryIO, field: str) -> Iterator[str]:
    data = stream.read()
    if data:
        yield _decode(file, data)


def _jsonl(file: SourceFile, stream: BinaryIO, field: str) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(stream, start=1):
        text = _decode(file, line, offset)
        offset += len(line)
        if not text.strip():
            continue  # blank lines, commonly the last one, are no records
        where = f"{file.url}:{number}"
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON: {error}; each line must be one JSON object") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: a {type(record).__name__} where a JSON object was expected")
        if field not in record:
            raise DataError(f"{where}: no field {field!r}, only {sorted(record)[:10]}; set data.field")
        yield _checked(where, field, record[field])


def _parquet(file: SourceFile, stream: BinaryIO, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(stream)
        columns = list(table.schema_arrow.names)
        if field not in columns:
            raise DataError(f"{file.url}: no column {field!r}, only {columns[:10]}; set data.field")
        for batch in table.iter_batches(columns=[field]):
            for scalar in batch.column(0):
                yield _checked(f"{file.url}: row {row}", field, scalar.as_py())
                row += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{file.url}: row {row}: not readable as parquet: {error}") from error


def _checked(where: str, field: str, value: object) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} is {type(value).__name__}, not a string; set data.field")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which is no text
        raise DataError(f"{where}: field {field!r} holds a lone surrogate: {error}") from error
    return value
