"""The records of a file, each a mapping of fields, and where it is, for errors."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from orchestrator.data.opening import OpenFile
from orchestrator.data.sources import DataError

csv.field_size_limit(1 << 30)


class Located(NamedTuple):
    """A record, and what says where it is (`file:line`, `file: row 3`), which may take a while to find out. Instead of
    a record, what is wrong with it."""

    where: Callable[[], str]
    record: dict[str, Any]
    problem: str = ""


def records(opened: OpenFile, columns: Sequence[str] | None = None) -> Iterator[Located]:
    """The records of a file of one of `orchestrator.data.sources.TABLES`, or of the part of it that is opened, in
    order. Of formats with columns only these are read (None: all); a file without one of them is refused.

    Raises DataError for a file that is not of its format.
    """
    match opened.file.format:
        case "jsonl":
            return _jsonl(opened)
        case "json":
            return _json(opened)
        case "parquet":
            return _parquet(opened, columns)
        case "arrow":
            return _arrow(opened, columns)
        case kind:
            return _csv(opened, "\t" if kind == "tsv" else ",", columns)


def _jsonl(opened: OpenFile) -> Iterator[Located]:
    for offset, text in opened.lines():

        def where(offset: int = offset) -> str:
            return opened.line_at(offset)

        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield Located(where, {}, f"not valid JSON: {error}; each line must be one JSON object")
            continue
        if isinstance(record, dict):
            yield Located(where, record)
        else:
            yield Located(where, {}, f"a {type(record).__name__} where a JSON object was expected")


def _json(opened: OpenFile) -> Iterator[Located]:
    with opened.stream() as stream:
        text = opened.decode(stream.read(), 0)
    url = opened.file.url
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "; set data.format: jsonl if each line is an object" if "Extra data" in str(error) else ""
        raise DataError(f"{url}: not valid JSON: {error}{hint}") from error
    if not isinstance(whole, list):
        raise DataError(
            f"{url}: a {type(whole).__name__} where a list of objects was expected; give one object a line in a .jsonl "
            "file, or a list of them"
        )
    for number, record in enumerate(whole):

        def where(number: int = number) -> str:
            return f"{url}: record {number}"

        if isinstance(record, dict):
            yield Located(where, record)
        else:
            yield Located(where, {}, f"a {type(record).__name__} where an object was expected")


def _csv(opened: OpenFile, delimiter: str, columns: Sequence[str] | None) -> Iterator[Located]:
    url = opened.file.url
    with opened.stream() as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        try:
            names = reader.fieldnames or []
            _need_columns(url, names, columns)
            for record in reader:

                def where(line: int = reader.line_num) -> str:
                    return f"{url}:{line}"

                if None in record or None in record.values():
                    yield Located(where, {}, f"it does not have the {len(names)} fields of the first line")
                else:
                    yield Located(where, record)
        except csv.Error as error:
            raise DataError(f"{url}:{reader.line_num}: not readable as {opened.file.format}: {error}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{url}:{reader.line_num + 1}: not UTF-8: {error}; convert the file to UTF-8") from error


def parquet_file(opened: OpenFile, stream: Any, columns: Sequence[str] | None) -> Any:
    """The file as pyarrow.parquet knows it. Raises DataError when it is none, or lacks a column."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(stream)
    except pyarrow.ArrowException as error:
        raise DataError(f"{opened.file.url}: row 0: not readable as parquet: {error}") from error
    _need_columns(opened.file.url, list(table.schema_arrow.names), columns)
    return table


def _need_columns(url: str, names: Sequence[str], columns: Sequence[str] | None) -> None:
    for column in columns or ():
        if column not in names:
            raise DataError(f"{url}: no column {column!r}, only {list(names)[:10]}; set data.field")


def _parquet(opened: OpenFile, columns: Sequence[str] | None) -> Iterator[Located]:
    import pyarrow

    url, span, row = opened.file.url, opened.span, 0
    try:
        with opened.stream() as stream:
            table = parquet_file(opened, stream, columns)
            metadata = table.metadata
            rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
            stop = len(rows) if span.stop is None else span.stop
            row = sum(rows[: span.start])
            wanted = None if columns is None else list(columns)
            for batch in table.iter_batches(columns=wanted, row_groups=list(range(span.start, stop))):
                for record in _of_batch(batch, url, row):
                    yield record
                    row += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{url}: row {row}: not readable as parquet: {error}") from error


def _arrow(opened: OpenFile, columns: Sequence[str] | None) -> Iterator[Located]:
    """Arrow's streaming format, as `datasets.save_to_disk` writes it, or its file format."""
    import pyarrow

    url, row = opened.file.url, 0
    try:
        with opened.stream() as stream:
            for batch in _batches(stream):
                _need_columns(url, batch.schema.names, columns)
                chosen = batch if columns is None else batch.select(list(columns))
                for record in _of_batch(chosen, url, row):
                    yield record
                    row += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{url}: row {row}: not readable as arrow: {error}") from error


def _batches(stream: Any) -> Iterator[Any]:
    import pyarrow

    magic = stream.read(6)
    stream.seek(0)
    if magic != b"ARROW1":
        yield from pyarrow.ipc.open_stream(stream)
        return
    file = pyarrow.ipc.open_file(stream)
    for number in range(file.num_record_batches):
        yield file.get_batch(number)


def _of_batch(batch: Any, url: str, first: int) -> Iterator[Located]:
    names = batch.schema.names
    columns = [batch.column(number) for number in range(len(names))]
    for index in range(batch.num_rows):

        def where(row: int = first + index) -> str:
            return f"{url}: row {row}"

        yield Located(where, {name: column[index].as_py() for name, column in zip(names, columns, strict=True)})
