"""How a file of each format becomes documents, and errors that lead to the line or byte at fault.

A file may be read in parts, each by another task: the documents of the parts, one after the other, are those of the
file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orchestrator.data.opening import WHOLE, ByteSpan, OpenFile
from orchestrator.data.reading import Content, Library
from orchestrator.data.sources import TABLES, TOKENS, DataError, SourceFile
from orchestrator.data.tables import parquet_file, records

DEFAULT_FIELD = "text"

DOCUMENTS: dict[str, tuple[str, ...]] = {
    "text": ("file", "line"),
    **dict.fromkeys(TABLES, ("record",)),
    **dict.fromkeys(TOKENS, ("tokens",)),
}
"""By format, what can be one document; the first is the default."""


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
    if file.size_bytes < 0 or file.compression:
        return False
    return file.format in ("jsonl", "parquet") or (file.format == "text" and document_of(file, document) == "line")


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

    field: the key or column that holds the text, `text` when None; text files have none. document: what one document
    is: `file` (text files, their default), `line` (text files: every line that is not blank, without its end) or
    `record` (formats with fields). library, content: as for `Library.open`.

    Raises DataError (while iterating) naming the file, and the line, row or byte offset, when it cannot be read, is not
    UTF-8, is no text (it has a NUL byte), is not valid in its format, lacks the field, or (read as a whole) holds no
    document.
    """
    kind = document_of(file, document)
    opened = OpenFile(file, library or Library(), content, span)
    match kind:
        case "file":
            found = _whole(opened)
        case "line":
            found = _lines(opened)
        case _:
            found = _texts(opened, DEFAULT_FIELD if field is None else field)
    empty = True
    try:
        for text in found:
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
    """For each row group of a parquet file how much text it has: the bytes of the field's column, uncompressed; of all
    columns where no field is named.

    Raises DataError as `documents` does.
    """
    opened = OpenFile(file, library, content)
    with opened.stream() as stream:
        metadata = parquet_file(opened, stream, None if field is None else [field]).metadata
        sizes = []
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            columns = [group.column(i) for i in range(group.num_columns)]
            wanted = (c for c in columns if field is None or c.path_in_schema == field)
            sizes.append(sum(int(c.total_uncompressed_size) for c in wanted))
        return sizes


def _whole(opened: OpenFile) -> Iterator[str]:
    with opened.stream() as stream:
        data = stream.read()
    if data:
        yield opened.decode(data, 0)


def _lines(opened: OpenFile) -> Iterator[str]:
    for _, text in opened.lines():
        yield text.removesuffix("\n").removesuffix("\r")


def _texts(opened: OpenFile, field: str) -> Iterator[str]:
    # What has columns says once which it has; of the rest each record is asked.
    columns = [field] if opened.file.format in ("parquet", "arrow", "csv", "tsv") else None
    for where, record, wrong in records(opened, columns):
        problem: str | None = wrong
        if not problem and field not in record:
            problem = f"no field {field!r}, only {sorted(record)[:10]}; set data.field"
        problem = problem or text_problem(field, record[field])
        if problem is not None:
            raise DataError(f"{where()}: {problem}")
        yield record[field]


def text_problem(field: str, value: object) -> str | None:
    """Why a value is no text; None when it is."""
    if not isinstance(value, str):
        return f"field {field!r} is {type(value).__name__}, not a string; set data.field"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which is no text
        return f"field {field!r} holds a lone surrogate: {error}"
    return None
