"""A file, or a part of one, as the sequences of tokens that a store keeps of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from orchestrator.data.formats import documents, no_document
from orchestrator.data.opening import WHOLE, ByteSpan, OpenFile
from orchestrator.data.reading import Content, Library
from orchestrator.data.records import BadRecord, Encoder, RecordSpec
from orchestrator.data.sources import TABLES, TOKENS, DataError, SourceFile
from orchestrator.data.tables import records
from orchestrator.data.token_files import token_documents
from orchestrator.data.tokenizers import Tokenizer

_SKIPPED_TOLD = 10
_SPLIT = 0x5F1E
"""So that the digest is none that is used elsewhere."""


@dataclass(frozen=True)
class Encoded:
    """What is read: a part of a file, and for texts where in it they are (see `documents`)."""

    file: SourceFile
    library: Library
    content: Content | None = None
    span: ByteSpan = WHOLE
    field: str | None = None
    document: str | None = None
    side: Side | None = None


@dataclass(frozen=True)
class Side:
    """One side of a split: what is held out, a `share` of all documents or records, or the rest. Which one it is, a
    digest of its content decides: so it is on the same side in every run, whatever stands beside it."""

    share: float
    is_held_out: bool

    def has(self, content: bytes) -> bool:
        """Whether a document or record is on this side."""
        place = xxhash.xxh3_64_intdigest(content, seed=_SPLIT) / 2**64
        return (place < self.share) == self.is_held_out


def encoder_of(spec: RecordSpec | None, tokenizer: Tokenizer) -> Encoder | None:
    """What makes sequences of records. Raises DataError when the tokenizer is not up to it."""
    if spec is None:
        return None
    if spec.add_bos and getattr(tokenizer, "begin_of_document", None) is None:
        raise DataError("data.add_bos: the tokenizer has no token that begins a text (bos_token); leave it out")
    return Encoder(spec, tokenizer)


def sequences_of(wanted: Encoded, tokenizer: Tokenizer, encoder: Encoder | None) -> Iterator[NDArray[np.uint32]]:
    """The sequences of a file, in order, uint32 [tokens] each: of texts with an end of document, of records what
    `encoder` makes of them. Bad records are left out and counted there, if it skips them.

    Raises DataError naming the file, and the line, row or byte offset, as `documents` does.
    """
    file = wanted.file
    if encoder is not None:
        yield from _of_records(wanted, encoder)
    elif file.format in TOKENS:
        yield from _of_tokens(wanted, tokenizer)
    else:
        end = np.uint32(tokenizer.end_of_document)
        for text in documents(
            file, wanted.field, wanted.document, library=wanted.library, content=wanted.content, span=wanted.span
        ):
            if wanted.side is None or wanted.side.has(text.encode("utf-8")):
                yield np.append(tokenizer.encode(text), end)


def _of_tokens(wanted: Encoded, tokenizer: Tokenizer) -> Iterator[NDArray[np.uint32]]:
    opened = OpenFile(wanted.file, wanted.library, wanted.content)
    empty = True
    for tokens in token_documents(opened, tokenizer.end_of_document, tokenizer.vocab_size):
        empty = False
        if wanted.side is None or wanted.side.has(tokens.tobytes()):
            yield tokens
    if empty:
        raise no_document(wanted.file)


def content_of(record: dict[str, Any]) -> bytes:
    """What decides on which side of a split a record is (see `Side`): its fields, whatever their order."""
    # Values that JSON has no words for (times, bytes, numbers that are not finite) are told as Python does.
    return repr(_in_order(record)).encode("utf-8", "surrogatepass")


def _in_order(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, _in_order(inner)) for key, inner in sorted(value.items())]
    return [_in_order(inner) for inner in value] if isinstance(value, list) else value


def _of_records(wanted: Encoded, encoder: Encoder) -> Iterator[NDArray[np.uint32]]:
    file = wanted.file
    if file.format not in TABLES:
        raise DataError(
            f"{file.url}: it is {file.format}, and the objective needs records, with fields; give one of "
            f"{', '.join(TABLES)}"
        )
    opened = OpenFile(file, wanted.library, wanted.content, wanted.span)
    empty = True
    try:
        for where, record, wrong in records(opened):
            empty = False
            if wanted.side is not None and not wanted.side.has(content_of(record)):
                continue
            try:
                if wrong:
                    raise BadRecord(wrong)
                sequences = encoder.encode(record)
            except BadRecord as error:
                told = f"{where()}: {error}"
                if not encoder.spec.skips:
                    raise DataError(f"{told} (data.on_bad_record: skip leaves such records out)") from error
                encoder.skipped += 1
                if len(encoder.first_skipped) < _SKIPPED_TOLD:
                    encoder.first_skipped.append(told)
                continue
            yield from sequences
    except OSError as error:
        raise DataError(f"{file.url}: cannot be read: {error}") from error
    if empty and wanted.span.is_whole:
        raise no_document(file)
