"""MANIFEST.json of a token store: what the store holds, and digests enough to know whether it still does.

Knows the names and sizes of files, and nothing of where text comes from or how it becomes tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from monitoring.outside import parse
from monitoring.values import count, fields, many, text
from orchestrator.data.sources import DataError

FORMAT_VERSION = 3
"""Of the files in a store: 2 has the lengths of documents."""
_CONTENT_VERSION = 1
"""Of how tokens lie in a store, which is what its digest is of."""
MANIFEST_NAME = "MANIFEST.json"

COUNTED_SHIFT = 40
"""Of a sequence of a record, the bits of its length above these say how many of its tokens count."""
DTYPES = {"uint16": 2, "uint32": 4}
LENGTH_BYTES = 8
RANGE_BYTES = 4 << 20
_DIGITS = 16


def _shard_name(value: Any) -> str | None:
    """The name of a file in the store, and nowhere else."""
    is_plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}", value) is not None
    return None if is_plain else "is no name of a file in the store"


_RECORDS = fields({"sequences": count, "label_words": count, "skipped": count, "first_skipped": many(text)})
_SHAPE = fields(
    {
        "key": text, "dtype": text, "vocab_size": count, "total_tokens": count, "digest": text,
        "files": many(fields(
            {"name": text, "fingerprint": text, "documents": count, "tokens": count, "digest": text})),
        "shards": many(fields(
            {"name": _shard_name, "tokens": count, "size_bytes": count, "digest": text, "documents": count,
             "documents_digest": text, "ranges": text})),
    }
)  # fmt: skip


class BrokenStoreError(DataError):
    """A token store that is torn, altered or of another format; it can be rebuilt from its source."""


@dataclass(frozen=True)
class FileEntry:
    """One source file: name, content fingerprint, documents, tokens (ends included) and their digest."""

    name: str
    fingerprint: str
    documents: int
    tokens: int
    digest: str


@dataclass(frozen=True)
class ShardEntry:
    """One file of tokens: its name in the store, tokens, bytes and XXH3-128 digest; how many documents it has, whose
    lengths are in a file beside it with that digest; and the XXH3-64 digests of its ranges of RANGE_BYTES, 16
    hexadecimal digits each, by which what is read of a copy is known to be right."""

    name: str
    tokens: int
    size_bytes: int
    digest: str
    documents: int
    documents_digest: str
    ranges: str

    @property
    def documents_name(self) -> str:
        """The file with the lengths of the documents in tokens (ends included), little-endian int64 [documents]."""
        return self.name.rpartition(".")[0] + ".documents"

    def range_digest(self, number: int) -> str:
        """Of the range that begins at byte `number` * RANGE_BYTES."""
        return self.ranges[number * _DIGITS : (number + 1) * _DIGITS]

    @property
    def documents_bytes(self) -> int:
        """The size of that file."""
        return LENGTH_BYTES * self.documents


@dataclass(frozen=True)
class RecordsEntry:
    """Of a store of records (`orchestrator.data.records`): how many sequences each is, how many words of label follow a
    sequence, and how many bad ones were left out, of which the first are told."""

    sequences: int
    label_words: int
    skipped: int = 0
    first_skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoreManifest:
    """The content of a store. dtype: uint16 or uint32, little-endian; files and shards are in token order."""

    key: str
    dtype: str
    vocab_size: int
    files: tuple[FileEntry, ...]
    shards: tuple[ShardEntry, ...]
    records: RecordsEntry | None = None

    @property
    def total_tokens(self) -> int:
        """Tokens in the store, ends of documents included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def digest(self) -> str:
        """The digest ("sha256:...") of tokens, vocabulary and format; names and shards have no part."""
        return store_digest(self.dtype, self.vocab_size, self.files)

    def to_json(self) -> str:
        """The manifest as the text of MANIFEST.json."""
        content = {
            "format_version": FORMAT_VERSION,
            **asdict(self),
            "total_tokens": self.total_tokens,
            "digest": self.digest,
        }
        if self.records is None:
            del content["records"]
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, raw: str) -> StoreManifest:
        """Parse MANIFEST.json; BrokenStoreError when it is torn, of another version or contradicts itself."""
        try:
            content: dict[str, Any] = parse(raw)
            if content["format_version"] != FORMAT_VERSION:
                raise BrokenStoreError(f"format version {content['format_version']}, not {FORMAT_VERSION}")
            if (wrong := _SHAPE(content)) is not None:
                raise BrokenStoreError(f"torn manifest: {wrong}")
            manifest = cls(
                key=content["key"],
                dtype=content["dtype"],
                vocab_size=int(content["vocab_size"]),
                files=tuple(FileEntry(**entry) for entry in content["files"]),
                shards=tuple(ShardEntry(**entry) for entry in content["shards"]),
                records=_records_of(content.get("records")),
            )
            width = DTYPES[manifest.dtype]
            consistent = (
                content["digest"] == manifest.digest
                and content["total_tokens"] == manifest.total_tokens == sum(file.tokens for file in manifest.files)
                and all(shard.size_bytes == shard.tokens * width > 0 for shard in manifest.shards)
                and all(len(s.ranges) == -(-s.size_bytes // RANGE_BYTES) * _DIGITS for s in manifest.shards)
                and sum(shard.documents for shard in manifest.shards) == sum(file.documents for file in manifest.files)
            )
        except BrokenStoreError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
            raise BrokenStoreError(f"torn manifest: {type(error).__name__}: {error}") from error
        if not consistent:
            raise BrokenStoreError("manifest contradicts itself")
        return manifest


def _records_of(content: Any) -> RecordsEntry | None:
    if content is None:
        return None
    if (wrong := _RECORDS(content)) is not None:
        raise BrokenStoreError(f"torn manifest: records: {wrong}")
    return RecordsEntry(**{**content, "first_skipped": tuple(content["first_skipped"])})


def store_digest(dtype: str, vocab_size: int, files: Sequence[FileEntry]) -> str:
    """A store's digest, from the digests of each file's tokens in order: the same however it was sharded."""
    content = [_CONTENT_VERSION, dtype, vocab_size, [(file.tokens, file.digest) for file in files]]
    return f"sha256:{hashlib.sha256(json.dumps(content, allow_nan=False).encode()).hexdigest()}"
